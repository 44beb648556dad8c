"""`paraxis verify` and `train` in mixed precision, with real ranks."""

from typing import Any

import pytest
from safetensors.torch import load_file


@pytest.mark.parametrize(
    "network, plan",
    [
        ("mlp", "dp=2,precision=bf16"),
        *(
            pytest.param("mlp:784-1024-1024-10", plan, marks=pytest.mark.slow)
            for plan in (
                "pp=2,microbatches=2,precision=fp16",
                "tp=2,precision=bf16,comm=gloo",
                "dp=2,zero=3,precision=bf16,comm=gloo",
            )
        ),
    ],
)
def test_mixed_precision_is_proved_in_it(desk: Any, network: str, plan: str) -> None:
    done = desk.run("verify", network, "--plan", plan, "--steps", 4, "--json")
    assert done.rc == 0, done.err + done.out
    (result,) = done.document["results"]
    precision = "fp16" if "fp16" in plan else "bf16"
    found = result["verified"]
    assert found["against"] == f"serial run in {precision}" and f"proved in {precision}" in found["note"]
    assert 0 < found["max_relative_difference"] <= found["tolerance"] < 0.5


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_fault_is_seen_in_mixed_precision(desk: Any, precision: str) -> None:
    plan = f"dp=2,precision={precision}"
    done = desk.run("verify", "mlp", "--plan", plan, "--steps", 4, "--json", "--fault", "dropped-reduction")
    assert done.rc == 1 and not done.document["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["dp=2,precision=fp16", "today,precision=bf16"])
def test_training_ends_with_float32_weights(desk: Any, plan: str) -> None:
    done = desk.run("train", "mlp", "--plan", plan, "--steps", 5, "--json")
    assert done.rc == 0, done.err
    state = load_file(desk.folder / done.document["weights"])
    assert len(done.document["losses"]) == 5
    assert all(str(value.dtype) == "torch.float32" and bool(value.isfinite().all()) for value in state.values())
