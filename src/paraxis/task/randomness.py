"""Randomness that belongs to the task, never to the plan: a dropout mask follows from (seed, step, layer, sample).

The mask is a counter hash in uint32 with wrap-around, so that any rank computes its part of it without the others.
`mix32` is lowbias32 (Wellons 2018), `splitmix64` Steele, Lea and Flood 2014.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from unittest.mock import patch
from zlib import crc32

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle as Handle

MASK64 = (1 << 64) - 1
ATTENTION = F.scaled_dot_product_attention


def splitmix64(x: int) -> int:
    """One step of the splitmix64 generator from state x."""
    x = (x + 0x9E3779B97F4A7C15) & MASK64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


def mix32(x: np.ndarray) -> np.ndarray:
    """lowbias32 of every element of a uint32 array, in place."""
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x7FEB352D)
    x ^= x >> np.uint32(15)
    x *= np.uint32(0x846CA68B)
    x ^= x >> np.uint32(16)
    return x


def dropout_key(seed: int, step: int, layer: int) -> int:
    """The 64-bit key of one layer's mask in one step."""
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ layer)


@lru_cache(maxsize=64)
def _columns(words: int) -> np.ndarray:
    w = np.arange(words, dtype=np.uint32)
    return mix32(w * np.uint32(0x9E3779B9) + np.uint32(1))


def kept(key: int, first: int, samples: int, elements: int, p: float) -> np.ndarray:
    """Which elements of samples [first, first + samples) survive dropout p: bool (samples, elements)."""
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    rows = mix32(np.arange(first, first + samples, dtype=np.uint32) + low) ^ high
    bits = mix32(rows[:, None] + _columns((elements + 1) // 2)[None, :])
    halves = bits.view(np.uint16).reshape(samples, -1)[:, :elements]
    return np.asarray(halves >= threshold(p))


def threshold(p: float) -> int:
    """A 16-bit draw below this one is dropped."""
    return round(65536 * p)


@dataclass
class Draw:
    """Which samples are being computed: set before each forward by whoever runs it, read by the keyed layers."""

    seed: int = 0
    step: int = 0
    first: int = 0  # position of the microbatch's first sample in the global batch
    samples: int = 1
    place: list[str] = field(default_factory=lambda: [""])  # the module being computed, for functional calls
    calls: dict[str, int] = field(default_factory=dict)  # how often each place has drawn in this forward

    def at(self, step: int, first: int, samples: int) -> None:
        """Move to a microbatch."""
        self.step, self.first, self.samples = step, first, samples
        self.calls.clear()

    def dropout(self, x: Tensor, p: float, name: str) -> Tensor:
        """x with the task's own mask for the layer `name`; the batch dimension is the one of `samples`."""
        cut = threshold(p)
        if cut <= 0 or x.numel() == 0:
            return x
        if cut >= 65536:
            return x * 0
        call = self.calls[name] = self.calls.get(name, -1) + 1
        dim = next((d for d, size in enumerate(x.shape) if size == self.samples), 0)
        if x.shape[dim] % self.samples:
            raise RuntimeError(f"dropout in {name}: no dimension of {tuple(x.shape)} counts the {self.samples} samples")
        key = dropout_key(self.seed, self.step, crc32(f"{name}#{call}".encode()))
        moved = x.movedim(dim, 0)
        mask = kept(key, self.first, self.samples, x.numel() // self.samples, p)
        scaled = torch.from_numpy(mask).to(x.device).view(moved.shape).movedim(0, dim)
        return x * scaled * (65536 / (65536 - cut))


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
    """What became of a network's randomness."""

    functions: bool  # dropout is called as a function: run the network within KeyedFunctions
    switched_off: tuple[str, ...]  # modules whose randomness could not be keyed and is off (they are in eval mode)
    unkeyed: tuple[str, ...]  # modules that draw even so


def key_randomness(net: nn.Module, draw: Draw, run: Callable[[], object], switch_off: bool = True) -> Keyed:
    """Swap nn.Dropout for keyed masks in place, find what else is random by running `run` (one training forward)."""
    for name, module in list(net.named_modules()):
        for child, layer in module.named_children():
            if type(layer) is nn.Dropout:
                setattr(module, child, KeyedDropout(layer.p, f"{name}.{child}".strip("."), draw).train(layer.training))
    functions = KeyedFunctions(draw)
    found = _random_places(net, draw, functions, run)
    modules = dict(net.named_modules())
    off = sorted(found) if switch_off else []
    for name in off:
        modules[name].eval()
    unkeyed = _random_places(net, draw, functions, run) if off else found
    if functions.used:
        for name, module in modules.items():
            track(module, name, draw)
    named = tuple(f"{name or 'the network'} ({type(modules[name]).__name__})" for name in off)
    return Keyed(functions.used, named, tuple(sorted(unkeyed)))


def track(module: nn.Module, name: str, draw: Draw, look: Callable[[], None] = lambda: None) -> list[Handle]:
    """Hooks by which the draw knows in which module a functional call stands; `look` is called at every border."""

    def enter(*_: object) -> None:
        look()
        draw.place.append(name)

    def leave(*_: object) -> None:
        look()
        draw.place.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _random_places(net: nn.Module, draw: Draw, functions: KeyedFunctions, run: Callable[[], object]) -> set[str]:
    """The innermost modules in whose forward a generator has moved."""
    found: set[str] = set()
    last = _generators()

    def look() -> None:
        nonlocal last
        now = _generators()
        if now != last:
            found.add(draw.place[-1])
            last = now

    handles = [handle for name, module in net.named_modules() for handle in track(module, name, draw, look)]
    with torch.no_grad(), functions:
        run()
    look()
    for handle in handles:
        handle.remove()
    return found
