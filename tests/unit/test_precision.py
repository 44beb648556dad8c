"""What a precision means in a plan, in a program and in one rank's scaling; sums in another order."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paraxis.engine.precision import cast, products
from paraxis.engine.scaling import Scaling
from paraxis.errors import PlanError, ProgramError
from paraxis.plan.plan import Plan, parse
from paraxis.plan.precision import PATIENCE, first_scale, told_of_precision
from paraxis.plan.space import in_bf16
from paraxis.program.check import check
from paraxis.program.cut import Layout
from paraxis.program.instructions import Program, parse_program
from paraxis.program.lower import lower
from paraxis.program.shares import Split
from paraxis.run import mixed
from paraxis.session import Session
from paraxis.task.spec import TaskSpec

SPLIT = Split("columns", 4, ("0", "1"), ((0, 1, "act"),), (0, 1))


def program(text: str) -> Program:
    return lower(parse(text), Layout((4, 4), splits=(SPLIT,)))


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("precision=tf32", "precision=tf32: its products are of NVIDIA GPUs"),
        ("dp=2,engine=native,precision=bf16", "precision=bf16: engine=native"),
    ],
)
def test_what_cannot_be_had_is_refused(text: str, wanted: str) -> None:
    with pytest.raises(PlanError, match=wanted):
        parse(text)
    assert parse("device=cuda,precision=tf32").precision == "tf32"


def test_today_takes_keys() -> None:
    assert parse("today,precision=bf16,compile=1") == Plan(engine="plain", precision="bf16", compile=1)
    assert parse("today") == Plan(engine="plain") and "bf16" in parse("today,precision=bf16").label()


def test_a_program_tells_its_precision() -> None:
    bf16, fp32 = program("pp=2,precision=bf16"), program("pp=2")
    assert "precision bf16\n" in bf16.text() and "precision" not in fp32.text()
    assert parse_program(bf16.text()) == bf16 and bf16.digest() != fp32.digest()


@pytest.mark.parametrize(
    "text, axis", [("pp=2,precision=fp16", "pp"), ("tp=2,precision=fp16", "tp"), ("dp=2,zero=1,precision=fp16", "dp")]
)
def test_ranks_must_tell_each_other_of_overflows(text: str, axis: str) -> None:
    whole = program(text)
    check(whole)

    def without(buffer: str = "", rule: str = "") -> Program:
        """Neither that buffer's reduction, nor that update."""
        bodies = tuple(
            (
                name,
                tuple(
                    tuple(i for i in row if not (buffer and i.buffer == buffer) and not (rule and i.rule == rule))
                    for row in ranks
                ),
            )
            for name, ranks in whole.bodies
        )
        return replace(whole, bodies=bodies)

    with pytest.raises(ProgramError, match=f"before ranks along {axis} tell each other of overflows"):
        check(without(buffer="norm"))
    with pytest.raises(ProgramError, match="without their norm"):
        check(without(rule="norm"))
    check(replace(without(buffer="norm"), precision="bf16"))  # nothing is scaled there


def test_the_scale_halves_and_doubles() -> None:
    scaling = Scaling(1024.0)
    assert not scaling.takes(float("inf")) and not scaling.takes(float("nan"))
    assert (scaling.scale, scaling.skipped) == (256.0, 2)
    assert all(scaling.takes(1.0) for _ in range(PATIENCE - 1)) and scaling.scale == 256.0
    assert scaling.takes(1.0) and scaling.scale == 512.0 and scaling.good == 0


def test_losses_begin_with_the_scale_of_their_mean() -> None:
    assert [first_scale(n) for n in (1, 128, 100, 1 << 20)] == [65536.0, 512.0, 512.0, 1.0]


@pytest.mark.parametrize("layer, shape", [(nn.Linear(7, 5), (3, 7)), (nn.Conv2d(5, 4, 3, padding=1), (2, 5, 6, 6))])
def test_sums_in_another_order_are_the_same_sums(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = layer.double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = []
    for parts in (1, 2, 3):
        out = mixed.compute(layer, lambda: layer(x), "fp32", parts)
        found.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
    for other in found[1:]:
        assert all(torch.allclose(a, b) for a, b in zip(found[0], other, strict=True))
    half = layer.float()
    whole, apart = (mixed.compute(half, lambda: half(x.float()), "bf16", parts) for parts in (1, 2))
    assert whole.dtype == torch.float32 and not torch.equal(whole, apart) and torch.allclose(whole, apart, atol=0.05)


def test_a_segment_is_cast_and_the_network_ends_in_float32() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    (inner,), ends = cast([layer], "bf16"), cast([layer], "bf16", ends=True)
    assert inner(x).dtype == torch.bfloat16 and ends[1](ends[0](x)).dtype == torch.float32
    assert cast([layer], "fp32", ends=True) == [layer] == cast([layer], "tf32")
    F.mse_loss(ends[1](inner(x)), x).backward()
    assert layer.weight.grad is not None and layer.weight.grad.dtype == torch.float32


def test_tf32_is_on_for_its_plans_alone() -> None:
    try:
        for precision, wanted in (("tf32", "tf32"), ("fp32", "ieee"), ("bf16", "ieee")):
            products(precision)
            assert torch.backends.cuda.matmul.fp32_precision == wanted  # type: ignore[union-attr]
            assert torch.backends.cuda.matmul.allow_tf32 == (wanted == "tf32"), "what compilers look at may be asked"
            assert torch.backends.cudnn.conv.fp32_precision == wanted  # type: ignore[attr-defined]
    finally:
        products("fp32")


def test_gpus_are_tried_in_bf16_and_the_row_says_so() -> None:
    plans = [Plan(dp=2), *(Plan(dp=2, device="cuda", zero=zero) for zero in (0, 1)), Plan(device="cuda")]
    found = list(in_bf16(plans))
    assert found == [Plan(dp=2, device="cuda", precision="bf16"), Plan(device="cuda", precision="bf16")]
    assert "networks in bf16" in told_of_precision(found[0]) and not told_of_precision(plans[0])
    assert "bf16" in found[0].label()


def test_a_serial_run_in_bf16_is_made_where_the_plan_computes(tmp_path: Path) -> None:
    """A CPU rounds its sums in another order than a GPU: neither is held to the other's run."""
    asked: list[str] = []

    class Solo:
        def ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
            asked.append(request["plan"])
            return [{"losses": []}]

    session = Session(TaskSpec(), {}, {}, None, tmp_path, lambda *_: None)
    session.facts = Mock(batch=16, steps_per_epoch=1, layout=Layout((4,)))
    session.pool = lambda transport: Solo()  # type: ignore[assignment, method-assign, return-value]
    texts = ["precision=bf16", "precision=bf16,device=cuda", "dp=2,precision=bf16,device=cuda", "device=cuda", "serial"]
    files = [session.oracle(parse(text), 4, "float32")["file"] for text in texts]
    assert [parse(text).device for text in asked] == ["cpu", "cuda", "cpu"], "in fp32 the CPU is as good"
    assert len(set(files)) == 3 and files[1] == files[2] and files[3] == files[4]
