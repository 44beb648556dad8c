"""Weights that lie in parts on several ranks, put together into the plain tensors of a state_dict."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Parts = Mapping[str, Sequence[int]]  # name -> (dimension, blocks), of the tensors that are split


def whole(parts: Sequence[np.ndarray], dim: int, blocks: int) -> np.ndarray:
    """The tensor of which each rank in order has one part of every block; see task.shared.Shard."""
    cut = [part.reshape(*part.shape[:dim], blocks, -1, *part.shape[dim + 1 :]) for part in parts]
    joined = np.concatenate(cut, dim + 1)
    return joined.reshape(*parts[0].shape[:dim], -1, *parts[0].shape[dim + 1 :])


def together(states: Sequence[dict[str, Any]], split: Parts) -> dict[str, Any]:
    """One state of those of a `tp` group's ranks, in order: what is not split they all have alike."""
    own = {name: whole([state[name] for state in states], *split[name]) for name in states[0] if name in split}
    return states[0] | own
