"""Batch norm in halves, and the thread that stands still between them."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paraxis.engine.pausing import Pausing
from paraxis.errors import ProgramError
from paraxis.task.moments import Count, Synchronised


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


class Parts:
    """A meeting of parts of a batch that are computed one after the other: one pass writes, the next one reads."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.reading = False

    def total(self, name: str, sums: Tensor) -> Tensor:
        if self.reading:
            return self.sums[name]
        self.sums[name] = self.sums.get(name, torch.zeros_like(sums)) + sums
        return sums

    def met(self, sums: Tensor) -> tuple[int, Tensor]:
        return 0, self.total("forward", sums)

    def met_back(self, number: int, sums: Tensor) -> Tensor:
        return self.total("backward", sums)


def synchronised(x: Tensor, norm: nn.BatchNorm1d, dy: Tensor, parts: int, pivot: Tensor | None) -> list[Tensor]:
    """(y, dx, dweight, dbias, mean, variance) of a batch cut into parts that know each other's sums alone."""
    meeting, found = Parts(), []
    for phase in ("forward", "backward", "all"):
        weight, bias = (p.detach().clone().requires_grad_() for p in (norm.weight, norm.bias))
        found = []
        for own, above in zip(x.chunk(parts), dy.chunk(parts), strict=True):
            own = own.detach().clone().requires_grad_()
            meeting.reading = phase != "forward"
            y, mean, variance = Synchronised.apply(own, weight, bias, norm.eps, pivot, meeting)
            meeting.reading = phase == "all"
            y.backward(above)
            found.append((y.detach(), own.grad, mean, variance))
        meeting.sums.pop("backward") if phase == "forward" else None
    ys, dxs, means, variances = zip(*found, strict=True)
    assert weight.grad is not None and bias.grad is not None
    return [torch.cat(ys), torch.cat(dxs), weight.grad, bias.grad, means[0], variances[-1]]


@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 3), (12, 5, 3, 2)])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_that_know_the_sums_of_all_are_the_whole_batch(shape: tuple[int, ...], parts: int) -> None:
    kind: Any = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}[len(shape)]
    norm = kind(5, momentum=1.0).double()
    nn.init.normal_(norm.weight)
    x, dy = 3 * random(*shape) + 2, random(*shape[::-1]).reshape(shape)
    plain = x.clone().requires_grad_()
    y = norm(plain)
    y.backward(dy)
    wanted = [y.detach(), plain.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]
    found = synchronised(x, norm, dy, parts, None)
    for a, b in zip(found, wanted, strict=True):
        assert b is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    alone = synchronised(x[: len(x) // 2], norm, dy[: len(x) // 2], 1, None)
    assert not torch.allclose(alone[0], wanted[0][: len(x) // 2], rtol=1e-3)


@pytest.mark.parametrize("pivot", [None, 0.0, 9000.0])
def test_a_mean_far_from_the_spread_costs_no_digits(pivot: float | None) -> None:
    """In single precision sums of squares would leave nothing of a variance of 1 beside a mean of 10,000."""
    x, norm = random(64, 4) + 10_000, nn.BatchNorm1d(4)
    own = x.float()
    about = None if pivot is None else torch.full((4,), pivot)
    y = synchronised(own, norm, torch.ones(64, 4), 4, about)
    exact = own.double()
    wanted = (exact - exact.mean(0)) / (exact.var(0, correction=0) + norm.eps).sqrt()
    plain = float((norm(own).detach().double() - wanted).abs().max())
    assert float((y[0].double() - wanted).abs().max()) < 4 * plain < 0.02, "the rounding of PyTorch's own"
    assert torch.allclose(y[5].double(), exact.var(0), rtol=1e-3), "the rounding of the parts' means"


# -- the thread ------------------------------------------------------------------------------------------------


def pausing(count: int = 2) -> Pausing:
    return Pausing([torch.zeros(3, dtype=torch.float64) for _ in range(count)])


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "paraxis-stage"]


def meets(made: Pausing, times: int, then: Callable[[], Any] = lambda: "made") -> Callable[[], Any]:
    def compute() -> Any:
        found = [made.met(torch.full((3,), 1.0 + n, dtype=torch.float64))[1] for n in range(times)]
        return then() if then() != "made" else found

    return compute


def test_a_computation_stands_still_until_its_sums_are_there() -> None:
    made = pausing()
    made.forward(meets(made, 2))
    assert made.at == 0 and made.moments[0].tolist() == [1, 1, 1]
    made.moments[0] *= 10
    made.resume()
    assert made.at == 1 and made.moments[1].tolist() == [2, 2, 2]
    made.moments[1] *= 10
    made.resume()
    assert made.at is None
    assert [t.tolist() for t in made.end()] == [[10, 10, 10], [20, 20, 20]]
    assert made.run(threading.current_thread) is not threading.current_thread()
    made.close()
    assert not threads()


def test_its_backwards_run_in_its_own_thread_on_a_gpu_too() -> None:
    """Else one that stands still would stop those of all other stages on its GPU."""
    made = pausing()
    assert torch._C._is_multithreading_enabled() and not made.run(torch._C._is_multithreading_enabled)
    made.close()


def test_an_error_comes_out_and_the_thread_goes_on() -> None:
    made = pausing()

    def fails() -> None:
        raise ValueError("of the layer")

    with pytest.raises(ValueError, match="of the layer"):
        made.run(fails)
    assert made.run(lambda: 7) == 7
    made.close()
    made.close()


def test_what_stands_still_is_given_up_by_what_begins_anew_and_by_the_end() -> None:
    made, left = pausing(), []

    def compute() -> None:
        try:
            made.met(torch.zeros(3, dtype=torch.float64))
        finally:
            left.append(1)

    for _ in range(2):
        made.forward(compute)
    assert len(left) == 1
    made.close()
    assert len(left) == 2 and not threads()


def test_other_batch_norms_than_when_it_was_tried_are_refused() -> None:
    made = pausing(1)
    made.forward(meets(made, 2))
    with pytest.raises(ProgramError, match="synchronised batch norm 1 was not there"):
        made.resume()
    made.forward(meets(made, 0))
    with pytest.raises(ProgramError, match="has ended, unlike when"):
        made.check_forward(0)
    with pytest.raises(ProgramError, match="computed again in the backward"):
        made.backward(meets(made, 1))
    made.close()


def test_the_backward_keeps_the_forwards_order() -> None:
    made = pausing()
    zeros = torch.zeros(3, dtype=torch.float64)
    made.backward(lambda: [made.met_back(number, zeros + 1) for number in (0, 1)])
    made.moments[1].fill_(5)
    made.check_backward(2)
    assert made.moments[1].tolist() == [0, 0, 0], "of a batch norm whose gradient nobody needs"
    made.resume()
    with pytest.raises(ProgramError, match="out of order"):
        made.check_backward(0)
    made.close()
    assert not threads()


def test_counting_writes_down_what_there_is() -> None:
    count = Count()
    number, total = count.met(torch.ones(7))
    assert (number, total.tolist(), count.sizes) == (0, [1.0] * 7, [7])
