"""Randomness that belongs to the task, never to the plan: a dropout mask follows from (seed, step, layer, sample).

The bits come from `masks`; here modules and functions are made to draw them, and what draws otherwise is found.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle as Handle

from paraxis.errors import TaskError
from paraxis.task.masks import Words, dropout_key, kept_of_part, kept_on, threshold, words_of

ATTENTION = F.scaled_dot_product_attention
Call = tuple[str, int]  # (the module's name, which of its draws in one forward)
RECOMPUTED = (
    "dropout in {} is drawn again in the backward (activation checkpointing), where it cannot be keyed; "
    "leave out the checkpointing or the dropout"
)


@dataclass
class Draw:
    """Which samples are being computed: set before each forward by whoever runs it, read by the keyed layers.

    `calls` counts how often each place has drawn in this forward; `dims` is the dimension of a call's tensor that
    counts samples (-1: none, one mask for all), learned by `key_randomness`. `parts`: of calls whose tensor is split
    over ranks, (the dimension from the end, this rank's part, of how many). `words` are a call's key in the memory of a
    device, where whoever has set them changes them from step to step; without them the key is that of `step`.
    """

    seed: int = 0
    step: int = 0
    first: int = 0  # position of the microbatch's first sample in the global batch
    samples: int = 1
    place: list[str] = field(default_factory=lambda: [""])  # the module being computed, for functional calls
    calls: dict[str, int] = field(default_factory=dict)
    dims: dict[Call, int] = field(default_factory=dict)
    shapes: dict[Call, tuple[int, ...]] = field(default_factory=dict)  # as last seen
    parts: dict[Call, tuple[int, int, int]] = field(default_factory=dict)
    backward: bool = False
    words: Callable[[Call], Words] | None = None

    def at(self, step: int, first: int, samples: int) -> None:
        """Move to a microbatch."""
        self.step, self.first, self.samples = step, first, samples
        self.calls = {}

    def dropout(self, x: Tensor, p: float, name: str) -> Tensor:
        """x with the task's own mask for the layer `name`; raises TaskError where a mask cannot be told."""
        cut = threshold(p)
        if cut <= 0 or x.numel() == 0:
            return x
        if cut >= 65536:
            return x * 0
        if self.backward:
            raise TaskError(RECOMPUTED.format(name))
        self.calls[name] = number = self.calls.get(name, -1) + 1
        call = name, number
        self.shapes[call] = tuple(x.shape)
        dim = self.dims.get(call, -1 if x.shape[0] % self.samples else 0)
        if dim >= 0 and x.shape[dim] % self.samples:
            raise TaskError(f"dropout in {name}: dimension {dim} of {tuple(x.shape)} does not count {self.samples}")
        samples, first = (self.samples, self.first) if dim >= 0 else (1, 0)
        moved = x.movedim(dim, 0) if dim > 0 else x
        mask = self._mask(call, first, samples, moved, p).reshape(moved.shape)
        return x * (mask.movedim(0, dim) if dim > 0 else mask) * (65536 / (65536 - cut))

    def key(self, call: Call, step: int) -> int:
        """The key of a call's mask in a step."""
        return dropout_key(self.seed, step, crc32(f"{call[0]}#{call[1]}".encode()))

    def _mask(self, call: Call, first: int, samples: int, x: Tensor, p: float) -> Tensor:
        """Bool, as many as x has, where x is: of its elements within the whole tensor if x is a rank's part of it."""
        dim, index, parts = self.parts.get(call, (1, 0, 1))
        run = math.prod(x.shape[dim:]) if parts > 1 else x.numel() // samples
        place = x.numel() // samples // run, run, index, parts
        if self.words is None and x.device.type == "cpu":  # where numpy is faster
            return torch.from_numpy(kept_of_part(self.key(call, self.step), first, samples, *place, p))
        words = self.words(call) if self.words else words_of(self.key(call, self.step))
        return kept_on(x.device, words, first, samples, place, p)


class KeyedDropout(nn.Module):
    """nn.Dropout with the task's own masks."""

    def __init__(self, p: float, name: str, draw: Draw) -> None:
        super().__init__()
        self.p, self.name, self.draw = p, name, draw

    def forward(self, x: Tensor) -> Tensor:
        """x (samples first or anywhere) with its mask; as it is when not training."""
        return self.draw.dropout(x, self.p, self.name) if self.training else x


class KeyedFunctions(TorchFunctionMode):
    """Within it, F.dropout and the dropout inside attention draw the task's masks."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw, self.used = draw, False

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Replace the two functions, pass on all others."""
        kwargs = kwargs or {}
        if func is F.dropout:
            return self._dropout(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:  # inside it the mode is off, but it looks both up by name
            with patch.multiple(F, dropout=self._dropout, scaled_dot_product_attention=self._attention):
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return input
        self.used = True
        out = self.draw.dropout(input, p, self.draw.place[-1])
        return input.copy_(out) if inplace else out

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if dropout_p == 0:
            rest: dict[str, Any] = {
                "attn_mask": attn_mask,
                "is_causal": is_causal,
                "scale": scale,
                "enable_gqa": enable_gqa,
            }
            return ATTENTION(query, key, value, **rest)
        self.used = True
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            hidden = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, float("-inf")) if hidden else scores + attn_mask
        return self.draw.dropout(scores.softmax(-1), dropout_p, self.draw.place[-1]) @ value


def _generators() -> tuple[bytes, object, object]:
    """Where the generators stand that a network's code may draw from (torch, numpy, random)."""
    numpy_state: Any = np.random.get_state(legacy=True)
    return bytes(torch.random.get_rng_state().numpy()), (bytes(numpy_state[1]), numpy_state[2:]), random.getstate()


@dataclass(frozen=True)
class Keyed:
    """What became of a network's randomness; modules by name, "" is the network itself."""

    functions: bool = False  # dropout is called as a function: run the network within KeyedFunctions
    switched_off: tuple[str, ...] = ()  # modules whose randomness could not be keyed and is off (they are in eval mode)
    unkeyed: tuple[str, ...] = ()  # modules that draw even so
    unreached: frozenset[int] = frozenset()  # ids of parameters that the loss does not depend on


def key_randomness(net: nn.Module, draw: Draw, run: Callable[[int], Tensor], samples: int) -> Keyed:
    """Swap nn.Dropout for keyed masks in place, and find what else is random.

    `run(n)` is the loss of the first n samples in training mode. Raises TaskError for dropout in recomputed forwards.
    """
    for name, module in list(net.named_modules()):
        for child, layer in module.named_children():
            if type(layer) is nn.Dropout:
                setattr(module, child, KeyedDropout(layer.p, f"{name}.{child}".strip("."), draw).train(layer.training))
    functions = KeyedFunctions(draw)
    handles = [handle for name, module in net.named_modules() for handle in track(module, name, draw)]
    try:
        with torch.no_grad(), functions:
            _learn_dimensions(draw, run, samples)
    finally:
        for handle in handles:
            handle.remove()
    found, unreached = _random_places(net, draw, functions, run, samples)
    modules = dict(net.named_modules())
    for name in found:
        modules[name].training = False  # of this module alone: its children may well be keyed
    left, _ = _random_places(net, draw, functions, run, samples) if found else (set(), unreached)
    if functions.used:
        for name, module in modules.items():
            track(module, name, draw)
    return Keyed(functions.used, tuple(sorted(found)), tuple(sorted(left)), frozenset(unreached))


def _learn_dimensions(draw: Draw, run: Callable[[int], Tensor], samples: int) -> None:
    """The dimension that counts samples is the one that follows their number."""
    seen = []
    for count in (samples, samples // 2) if samples > 1 else ():
        draw.shapes.clear()
        run(count)
        seen.append(dict(draw.shapes))
    for call in seen[0].keys() & seen[1].keys() if seen else ():
        pairs = enumerate(zip(seen[0][call], seen[1][call], strict=True))
        draw.dims[call] = next((d for d, (a, b) in pairs if a != b and a * (samples // 2) == b * samples), -1)


def track(module: nn.Module, name: str, draw: Draw, look: Callable[[], None] = lambda: None) -> list[Handle]:
    """Hooks by which the draw knows in which module a functional call stands; `look` is called at every border."""

    def enter(*_: object) -> None:
        look()
        draw.place.append(name)

    def leave(*_: object) -> None:
        look()
        draw.place.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _random_places(
    net: nn.Module, draw: Draw, functions: KeyedFunctions, run: Callable[[int], Tensor], samples: int
) -> tuple[set[str], set[int]]:
    """(the innermost modules in whose forward a generator has moved, ids of parameters without a gradient)."""
    found: set[str] = set()
    last = _generators()

    def look() -> None:
        nonlocal last
        now = _generators()
        if now != last:
            found.add(draw.place[-1])
            last = now

    handles = [handle for name, module in net.named_modules() for handle in track(module, name, draw, look)]
    trained = [p for p in net.parameters() if p.requires_grad]
    try:
        with functions:
            loss = run(samples)
        look()
        draw.backward = True
        # autograd.grad refuses reentrant checkpointing; the mode does not reach into a backward, the names in F do
        with patch.multiple(F, dropout=functions._dropout, scaled_dot_product_attention=functions._attention):
            if loss.requires_grad:
                loss.backward()
        unreached = {id(p) for p in trained if p.grad is None} if loss.requires_grad else set()
        if _generators() != last and functions.used:
            raise TaskError(RECOMPUTED.format("this network"))
    finally:
        draw.backward = False
        for p in trained:
            p.grad = None
        for handle in handles:
            handle.remove()
    return found, unreached
