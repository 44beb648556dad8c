"""DiLoCo: replicas train apart for H steps, then an outer Nesterov step follows the mean change of their weights.

Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models" (2023). Options: the change
travels as `bf16` or `int8`; `fragments=P` cuts the parameters in P parts that agree in turn, one every H/P steps, so
that less is sent at once (Douillard et al., "Streaming DiLoCo with overlapping communication", 2025). `overlap=T` sends
a fragment's change T steps before it agrees, as in that paper: replicas train on meanwhile, and what each has learned
since is kept by half, the other half being what all have agreed on.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from paraxis.errors import PlanError
from paraxis.sync.rule import Do, Rule, fragment_of

if TYPE_CHECKING:
    from torch import Tensor

RATE, MOMENTUM = 0.7, 0.9  # of the outer step, as in the paper
MIXED = 0.5  # of what has been agreed on, where replicas have trained on meanwhile


def snapshot(params: "Tensor", snapshot: "Tensor") -> None:
    """Remember the weights from which replicas part."""
    snapshot.copy_(params)


def delta(params: "Tensor", snapshot: "Tensor", delta: "Tensor") -> None:
    """How far this replica has gone since, as a gradient points: downhill is negative."""
    delta.copy_(snapshot).sub_(params)


def nesterov(momentum: "Tensor", delta: "Tensor") -> None:
    """What has been gathered so far, and a look ahead along it."""
    momentum.mul_(MOMENTUM).add_(delta)
    delta.add_(momentum, alpha=MOMENTUM)


def outer(delta: "Tensor", snapshot: "Tensor") -> None:
    """The outer step."""
    snapshot.sub_(delta, alpha=RATE)


def copy(snapshot: "Tensor", params: "Tensor") -> None:
    """All replicas go on from there."""
    params.copy_(snapshot)


def mix(snapshot: "Tensor", params: "Tensor") -> None:
    """All replicas go half the way to there, from where each has come meanwhile."""
    params.lerp_(snapshot, MIXED)


def agreements(every: int, payload: str, fragments: int, overlap: int) -> dict[int, list[Do]]:
    """Each fragment's outer step, evenly over the period; the last one with its last step.

    At most one is on its way, and none from one period to the next, so that a period can be repeated and left.
    """
    if every < fragments:
        raise PlanError(f"diloco@{every}: {fragments} fragments agree at as many steps; H={fragments} or more would do")
    if overlap >= every // fragments:
        most, least = every // fragments - 1, fragments * (overlap + 1)
        other = f"overlap={most} or " if most else ""
        raise PlanError(f"diloco@{every}: overlap={overlap} reaches beyond the step before; {other}H={least} would do")
    found: dict[int, list[Do]] = {}
    for n in range(fragments):
        at, steps = every * (n + 1) // fragments, agree(n if fragments > 1 else -1, payload)
        if overlap:
            sent, taken = apart(steps)
            found |= {at - overlap: sent, at: taken}
        else:
            found[at] = steps
    return found


def apart(steps: list[Do]) -> tuple[list[Do], list[Do]]:
    """(what begins a fragment's outer step, what ends it some steps later)."""
    change, mean, *rest, _ = steps
    begun, ended = (replace(mean, op=f"AllReduce{end}") for end in ("Start", "Wait"))
    return [change, begun], [ended, *rest, Do("Update", rule=mix.__name__, bucket=mean.bucket)]


def agree(bucket: int, payload: str) -> list[Do]:
    """The outer step of a fragment."""
    mean = Do("AllReduce", buffer="delta", reduction="mean", payload=payload, bucket=bucket)
    steps = [Do("Update", rule=f.__name__, bucket=bucket) for f in (delta, nesterov, outer, copy)]
    return [steps[0], mean, *steps[1:]]


def emulate(
    replicas: "list[dict[str, Tensor]]", every: int, payload: str, fragments: int, overlap: int
) -> Iterator[None]:
    """The same by plain code: an optimiser of the framework steps a global copy of the parameters."""
    import torch

    whole = {name: value.detach().clone() for name, value in replicas[0].items()}
    part = fragment_of({name: value.numel() for name, value in whole.items()}, fragments)
    optimizers = {name: torch.optim.SGD([own], RATE, MOMENTUM, nesterov=True) for name, own in whole.items()}
    step = 0
    while True:
        yield
        step += 1
        for name, number in part.items():
            agreed = every * (number + 1) // fragments
            if (step + overlap) % every == agreed % every:
                changes = [_sent(whole[name] - own[name], payload) for own in replicas]
                whole[name].grad = _sent(torch.stack(changes).sum(0), payload) / len(replicas)
            if step % every == agreed % every:
                optimizers[name].step()
                for own in replicas:
                    own[name].copy_((own[name] + whole[name]) / 2 if overlap else whole[name])


def _sent(x: "Tensor", payload: str) -> "Tensor":
    """What is left of numbers that have travelled: 8 bits of mantissa, or 1 of 255 levels of each 128 in a row."""
    if payload == "bf16":
        return x.bfloat16().to(x.dtype)
    if payload == "int8":
        kept = x.clone()
        for row in kept.view(-1).split(128):
            unit = (row.abs().max() / 127).float().to(x.dtype)
            row.copy_((row / unit).round().clamp(-127, 127) * unit if unit else row * 0)
        return kept
    return x


RULE = Rule(
    "diloco",
    "Douillard et al. 2023",
    options={"payload": "", "fragments": 1, "overlap": 0},
    buffers=("snapshot", "delta", "momentum"),
    updates=(snapshot, delta, nesterov, outer, copy, mix),
    prologue=(Do("Update", rule="snapshot"),),
    agreements=agreements,
    epilogue=(Do("AllReduce", buffer="params", reduction="mean"),),
    emulate=emulate,
)
