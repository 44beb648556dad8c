"""What the native engine's threads make of a network together: a letter for each layer that it has in C++.

The letters are those of program.slices. They say what C++ makes of a module before there is any C++; a module that it
cannot take has one, too, and is refused when it is compiled.
"""

from collections.abc import Iterable, Sequence

from torch import nn

from paraxis.task import gpt
from paraxis.task.randomness import KeyedDropout
from paraxis.task.resnet import Block

NOTHING = (nn.Flatten, nn.Identity)


def letters(chain: Iterable[nn.Module]) -> tuple[str, ...]:
    """Of each layer of the chain, the letters of what it consists of."""
    return tuple(map(_letters, chain))


def _letters(m: nn.Module) -> str:
    if isinstance(m, (nn.Linear, nn.Conv2d)):
        return "m"
    if isinstance(m, nn.LayerNorm):
        return "a"
    if isinstance(m, nn.ReLU):
        return "r"
    if isinstance(m, NOTHING) or (isinstance(m, (nn.Dropout, KeyedDropout)) and not m.p):
        return ""
    parts = _parts(m)
    return "".join(part if isinstance(part, str) else _letters(part) for part in parts) if parts else "o"


def _parts(m: nn.Module) -> Sequence[nn.Module | str]:
    """What a module of several layers consists of, in their order in C++; a letter where that is no module."""
    if isinstance(m, nn.Sequential):
        return [*m]
    if isinstance(m, Block):
        return [m.conv1, m.bn1, "r", m.conv2, *(m.downsample or ()), m.bn2]
    if isinstance(m, gpt.Embed):
        return [m.wte, m.wpe, m.drop]
    if isinstance(m, gpt.Attention):
        return [m.c_attn, "a", m.c_proj, m.dropout]
    if isinstance(m, gpt.MLP):
        return [m.c_fc, m.gelu, m.c_proj, m.dropout]
    if isinstance(m, gpt.Block):
        return [m.ln_1, m.attn, "o", m.ln_2, m.mlp, "o"]
    return [m.ln_f, m.lm_head] if isinstance(m, gpt.Head) else []
