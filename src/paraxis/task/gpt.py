"""`gpt`: GPT-2 (Radford et al. 2019) on bytes: its structure and its parameters' names, with an alphabet of 256."""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraxis.errors import TaskError

ALPHABET = 256
_FORMS = "gpt:nano, gpt:small or gpt:LAYERS-WIDTH-HEADS-CONTEXT, such as gpt:4-128-4-64, and ,dropout=P after it"
_SIZE = r"[1-9]\d{0,8}"
_OPTIONS = re.compile(rf"(nano|small|{_SIZE}(?:-{_SIZE}){{3}})?(?:(?:^|(?<=.),)dropout=([\d.]+))?", re.ASCII)


@dataclass(frozen=True)
class Shape:
    """How large a network is: `layers` blocks of `heads` heads, `width` numbers a byte, at most `context` bytes."""

    layers: int
    width: int
    heads: int
    context: int
    dropout: float = 0.0


NAMED = {"nano": Shape(4, 128, 4, 64), "small": Shape(12, 768, 12, 256)}


def shape_of(options: str) -> Shape:
    """The shape that `gpt:OPTIONS` means, "" being nano; raises TaskError."""
    match = _OPTIONS.fullmatch(options)
    if match is None:
        raise TaskError(f"gpt:{options}: it takes {_FORMS}")
    name, noise = match[1] or "nano", match[2]
    base = NAMED[name] if name in NAMED else Shape(*map(int, name.split("-")))
    if base.width % base.heads:
        raise TaskError(f"gpt:{options}: a width of {base.width} cannot be split among {base.heads} heads")
    try:
        p = float(noise or 0)
    except ValueError:
        p = 1.0
    if p >= 1:
        raise TaskError(f"gpt:{options}: dropout takes a probability from 0 to below 1, such as dropout=0.1")
    return Shape(base.layers, base.width, base.heads, base.context, p)


def _dropout(p: float) -> nn.Module:
    """What draws nothing is no dropout: then masks need not be keyed, and any engine can do without."""
    return nn.Dropout(p) if p else nn.Identity()


class Attention(nn.Module):
    """Causal self-attention, (n, t, width) to the same. Rows of `c_attn` are (query, key, value) x heads x size."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size, self.p = shape.width // shape.heads, shape.dropout
        self.c_attn = nn.Linear(shape.width, 3 * shape.width)
        self.c_proj = nn.Linear(shape.width, shape.width)
        self.dropout = _dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """What every position gathers from itself and those before it; as many heads as `c_attn` gives."""
        q, k, v = self.c_attn(x).unflatten(-1, (3, -1, self.size)).permute(2, 0, 3, 1, 4)
        noise = self.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=noise, is_causal=True)
        return self.dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers on each position: (n, t, width) -> (n, t, width)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.c_fc = nn.Linear(shape.width, 4 * shape.width)
        self.gelu = nn.GELU(approximate="tanh")  # as GPT-2 has it
        self.c_proj = nn.Linear(4 * shape.width, shape.width)
        self.dropout = _dropout(shape.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The second layer of the first one's GELU."""
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    """Attention and the linear layers, each on what a layer-norm gives and added to what came: (n, t, width), same."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = Attention(shape)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor) -> Tensor:
        """The residual stream after this block."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Embed(nn.Module):
    """The first stage: bytes int64 (n, t) -> (n, t, width), a vector for the byte plus one for its position."""

    def __init__(self, wte: nn.Embedding, wpe: nn.Embedding, drop: nn.Module) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = wte, wpe, drop

    def forward(self, ids: Tensor) -> Tensor:
        """The residual stream at its beginning."""
        if ids.shape[1] > self.wpe.num_embeddings:
            raise TaskError(f"{ids.shape[1]} bytes are more than the network's context of {self.wpe.num_embeddings}")
        positions = torch.arange(ids.shape[1], device=ids.device)
        return self.drop(self.wte(ids) + self.wpe(positions))


class Head(nn.Module):
    """The last stage: (n, t, width) -> scores of the next byte (n, t, 256)."""

    def __init__(self, ln_f: nn.LayerNorm, lm_head: nn.Linear) -> None:
        super().__init__()
        self.ln_f, self.lm_head = ln_f, lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Scores before the softmax."""
        return self.lm_head(self.ln_f(x))


class GPT(nn.Module):
    """Bytes int64 (n, t) -> scores of the byte after each, (n, t, 256).

    `lm_head.weight` is `wte.weight`: one parameter that the first and the last stage use.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.wte = nn.Embedding(ALPHABET, shape.width)
        self.wpe = nn.Embedding(shape.context, shape.width)
        self.drop = _dropout(shape.dropout)
        self.h = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self.lm_head = nn.Linear(shape.width, ALPHABET, bias=False)
        self.lm_head.weight = self.wte.weight

    def stages(self) -> list[nn.Module]:
        """Embedding, blocks and head, whose composition is the network: a pipeline may cut between any two."""
        return [Embed(self.wte, self.wpe, self.drop), *self.h, Head(self.ln_f, self.lm_head)]

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of the next byte at every position."""
        x = ids
        for stage in self.stages():
            x = stage(x)
        return x

    def reset(self, module: nn.Module) -> None:
        """A module's initial weights, GPT-2's: deviation 0.02, of what adds to the stream 0.02 / sqrt(2 layers)."""
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, (nn.Linear, nn.Embedding)) and module is not self.lm_head:
            adding = [own.c_proj for own in self.modules() if isinstance(own, (Attention, MLP))]
            nn.init.normal_(module.weight, std=0.02 / (2 * self.shape.layers) ** 0.5 if module in adding else 0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
