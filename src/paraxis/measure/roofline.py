"""The roofline of a network's layers (Williams, Waterman and Patterson 2009): what a machine allows, what they reach.

Arithmetic intensity is flops per byte of compulsory traffic: every operand read once and every result written once, as
if caches were large enough. Attainable is the lesser of the peak and intensity x bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paraxis.errors import TaskError
from paraxis.measure.records import Roof


@dataclass(frozen=True)
class Work:
    """What one direction of a layer has to do, whoever does it: floating-point operations and compulsory bytes."""

    flops: float
    bytes: float

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


NOTHING = Work(0.0, 0.0)


@dataclass(frozen=True)
class LayerWork:
    """A layer's forward and backward on `samples` samples; `index` is its place in the network's chain of layers."""

    index: int
    name: str
    samples: int
    forward: Work
    backward: Work


def work_of(document: dict[str, Any]) -> LayerWork:
    """The inverse of `dataclasses.asdict`."""
    return LayerWork(**document | {key: Work(**document[key]) for key in ("forward", "backward")})


def affine_work(
    samples: int, inputs: int, outputs: int, weights: int, biases: int, per_output: int, size: int, first: bool
) -> tuple[Work, Work]:
    """(forward, backward) of a linear or convolution layer.

    `inputs`, `outputs`: numbers a sample; `weights`, `biases`: of the layer; `per_output`: products summed for one
    output; `size`: bytes of a number; `first`: nobody wants its input gradient, so half of the backward falls away.
    """
    products = 2.0 * samples * outputs * per_output
    sums = float(samples * outputs) if biases else 0.0
    x, y = samples * inputs, samples * outputs
    forward = Work(products + sums, float(size * (x + weights + biases + y)))
    weight_gradient = Work(products + sums, float(size * (x + y + weights + biases)))
    input_gradient = NOTHING if first else Work(products, float(size * (y + weights + x)))
    return forward, weight_gradient + input_gradient


def attention_work(samples: int, positions: int, width: int, size: int) -> tuple[Work, Work]:
    """(forward, backward) of causal attention between its linear layers; `width`: of all heads together.

    Forward: each position's product with the keys up to its own, and their values' weighted sum. Backward: the
    gradients of both products' two factors. Traffic is queries, keys, values and results, once: scores need not leave
    a cache (Dao et al. 2022).
    """
    product = 2.0 * samples * width * positions * (positions + 1) / 2
    one = float(size * samples * positions * width)
    return Work(2 * product, 4 * one), Work(4 * product, 7 * one)


def roofline(
    layers: Sequence[LayerWork],
    forward: Sequence[float],
    backward: Sequence[float],
    peak: float,
    bandwidth: float,
) -> list[Roof]:
    """Layers with their measured seconds (by index) under a peak (flops/s) and a bandwidth (bytes/s), both measured.

    Raises TaskError for peaks that are none, and where a time is missing. Layers that took no measurable time are left
    out.
    """
    if not (peak > 0 and bandwidth > 0):
        raise TaskError(f"peak={peak:g}, bandwidth={bandwidth:g}: a roofline takes flops/s and bytes/s above 0")
    points = []
    for layer in layers:
        if layer.index >= min(len(forward), len(backward)):
            raise TaskError(f"layer {layer.index} ({layer.name}) has no measured time; there are {len(forward)}")
        for work, times, direction in ((layer.forward, forward, "forward"), (layer.backward, backward, "backward")):
            seconds = times[layer.index]
            if seconds > 0 and work.flops > 0:
                points.append(_roof(layer, work, seconds, direction, peak, bandwidth))
    return points


def _roof(layer: LayerWork, work: Work, seconds: float, direction: str, peak: float, bandwidth: float) -> Roof:
    intensity, achieved = work.flops / work.bytes, work.flops / seconds
    attainable = min(peak, intensity * bandwidth)
    return Roof(
        layer=layer.index,
        name=layer.name,
        direction="forward" if direction == "forward" else "backward",
        flops=work.flops,
        bytes=work.bytes,
        seconds=seconds,
        intensity=intensity,
        attainable=attainable,
        achieved=achieved,
        share=achieved / attainable,
        bound="compute" if intensity * bandwidth >= peak else "memory",
    )


def in_words(points: Sequence[Roof]) -> str:
    """The layer that takes longest, in a sentence; "" without points."""
    if not points:
        return ""
    longest = max(points, key=lambda p: p.seconds)
    total = sum(p.seconds for p in points)
    limit = "the peak" if longest.bound == "compute" else "memory"
    return (
        f"{longest.name}'s {longest.direction} takes {longest.seconds / total:.0%} of the time in linear and "
        f"convolution layers at {longest.achieved / 1e9:.1f} GFLOP/s: {longest.share:.0%} of the "
        f"{longest.attainable / 1e9:.1f} that {limit} allows at {longest.intensity:.1f} flops a byte."
    )
