"""The bits of dropout masks: a counter hash of (seed, step, layer, sample, element), alike on every rank and device.

The hash is in uint32 with wrap-around, so that any rank computes its part of a mask without the others. `mix32` is
lowbias32 (Wellons 2018), `splitmix64` Steele, Lea and Flood 2014.
"""

from functools import lru_cache

import numpy as np

MASK64 = (1 << 64) - 1


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
    return _survivors(key, first, samples, _columns((elements + 1) // 2), p)[:, :elements]


def kept_of_part(
    key: int, first: int, samples: int, outer: int, run: int, index: int, parts: int, p: float
) -> np.ndarray:
    """The same of a tensor of which one of `parts` ranks has its part: bool (samples, outer x run).

    The whole has (outer, parts, run) elements a sample, of which the rank has [:, index].
    """
    if run % 2:  # one draw serves two elements, and here the two may lie on different ranks
        whole = kept(key, first, samples, outer * parts * run, p)
        return whole.reshape(samples, outer, parts, run)[:, :, index].reshape(samples, -1)
    return _survivors(key, first, samples, _columns_of_part(outer, run // 2, index, parts), p)


@lru_cache(maxsize=64)
def _columns_of_part(outer: int, words: int, index: int, parts: int) -> np.ndarray:
    return np.ascontiguousarray(_columns(outer * parts * words).reshape(outer, parts, words)[:, index]).reshape(-1)


def _survivors(key: int, first: int, samples: int, columns: np.ndarray, p: float) -> np.ndarray:
    low, high = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32)
    rows = mix32(np.arange(first, first + samples, dtype=np.uint32) + low) ^ high
    bits = mix32(rows[:, None] + columns[None, :])
    return np.asarray(bits.view(np.uint16).reshape(samples, -1) >= threshold(p))


def threshold(p: float) -> int:
    """A 16-bit draw below this one is dropped."""
    return round(65536 * p)
