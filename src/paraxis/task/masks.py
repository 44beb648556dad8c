"""The bits of dropout masks: a counter hash of (seed, step, layer, sample, element), alike on every rank and device.

The hash is in uint32 with wrap-around, so that any rank computes its part of a mask without the others. `mix32` is
lowbias32 (Wellons 2018), `splitmix64` Steele, Lea and Flood 2014.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

MASK64 = (1 << 64) - 1
Words = tuple[int | Tensor, int | Tensor]  # low and high word of a key, as int32 or its value


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


def mix32_(x: Tensor) -> Tensor:
    """The same of an int32 tensor, whose shifts bring its sign along."""
    x ^= (x >> 16) & 0xFFFF
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


def dropout_key(seed: int, step: int, layer: int) -> int:
    """The 64-bit key of one layer's mask in one step."""
    return splitmix64(splitmix64(splitmix64(seed) ^ step) ^ layer)


def words_of(key: int) -> tuple[int, int]:
    """Low and high word of a key, as values of int32."""
    low, high = key & 0xFFFFFFFF, key >> 32
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


def kept(key: int, first: int, samples: int, elements: int, p: float) -> np.ndarray:
    """Which elements of samples [first, first + samples) survive dropout p: bool (samples, elements)."""
    return kept_of_part(key, first, samples, 1, elements, 0, 1, p)


def kept_of_part(
    key: int, first: int, samples: int, outer: int, run: int, index: int, parts: int, p: float
) -> np.ndarray:
    """The same of a tensor of which one of `parts` ranks has its part: bool (samples, outer x run).

    The whole has (outer, parts, run) elements a sample, of which the rank has [:, index].
    """

    def survivors(*columns: int) -> np.ndarray:
        low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
        rows = mix32(np.arange(first, first + samples, dtype=np.uint32) + low) ^ high
        bits = mix32(rows[:, None] + _columns(*columns)[None, :])
        return np.asarray(bits.view(np.uint16).reshape(samples, -1) >= threshold(p))

    return np.asarray(_of_part(survivors, samples, outer, run, index, parts))


def kept_on(
    device: torch.device, words: Words, first: int, samples: int, place: tuple[int, int, int, int], p: float
) -> Tensor:
    """`kept_of_part` by tensor operations, the same bits: bool (samples, outer x run), on the device.

    `words` are the two of the key (`words_of`); as tensors there, they may change while the operations stay the same.
    """

    def survivors(*columns: int) -> Tensor:
        low, high = words
        rows = mix32_(torch.arange(first, first + samples, dtype=torch.int32, device=device) + low) ^ high
        bits = mix32_(rows[:, None] + _columns_on(device, *columns))
        return (bits.view(torch.int16) ^ -32768) >= threshold(p) - 32768  # with signs, in the order of those without

    kept: Tensor = _of_part(survivors, samples, *place)
    return kept


def _of_part(survivors: Callable[..., Any], samples: int, outer: int, run: int, index: int, parts: int) -> Any:
    """`survivors(outer, words, index, parts)` has two elements for every word; of the whole or of a part."""
    if run % 2:  # one draw serves two elements, and here the two may lie on different ranks
        elements = outer * parts * run
        whole = survivors(1, (elements + 1) // 2, 0, 1)[:, :elements]
        return whole if parts == 1 else whole.reshape(samples, outer, parts, run)[:, :, index].reshape(samples, -1)
    return survivors(outer, run // 2, index, parts)


@lru_cache(maxsize=64)
def _columns(outer: int, words: int, index: int, parts: int) -> np.ndarray:
    """What the hash takes of an element's place: uint32 (outer x words), one for two elements."""
    w = mix32(np.arange(outer * parts * words, dtype=np.uint32) * np.uint32(0x9E3779B9) + np.uint32(1))
    return np.ascontiguousarray(w.reshape(outer, parts, words)[:, index]).reshape(-1)


@cache  # for good: what has been captured reads them where they lie
def _columns_on(device: torch.device, outer: int, words: int, index: int, parts: int) -> Tensor:
    return torch.from_numpy(_columns(outer, words, index, parts).view(np.int32)).to(device)


def threshold(p: float) -> int:
    """A 16-bit draw below this one is dropped."""
    return round(65536 * p)
