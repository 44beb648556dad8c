"""Networks of tokens on the native engine: embeddings, attention, the blocks of `gpt`.

In C++ the tokens of a sample stand side by side where other networks have samples, so that a layer of one row of
features is a layer of one token, whatever it does; only what is here looks at more than one.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from zlib import crc32

from torch import nn

from paraxis.task import gpt
from paraxis.task.randomness import KeyedDropout

if TYPE_CHECKING:
    from paraxis.engine.native_engine import Compiler

Layer = Callable[[Any, "Compiler"], None]


def first_draw(name: str) -> int:
    """What tells the masks of a module that draws once in a forward from those of others."""
    return crc32(f"{name}#0".encode())


def embedding(m: Any, c: "Compiler", name: str) -> None:
    """Rows of a table, by symbol."""
    c.need(c.symbols, name, m, "to be the first layer, and --data text")
    plain = m.padding_idx is None and m.max_norm is None and not m.scale_grad_by_freq and not m.sparse
    c.need(plain, name, m, "no padding_idx, max_norm, scale_grad_by_freq or sparse")
    c.need_trained(m, name)
    c.symbols = False
    c.add("embedding", m, (1, 1, m.embedding_dim), entries=m.num_embeddings, weight=m.weight)


def embed(m: gpt.Embed, c: "Compiler", layer: Layer) -> None:
    """The first stage of `gpt`: symbols and places."""
    layer(m.wte, c)
    c.need(m.wpe.num_embeddings >= c.tokens, "wpe", m.wpe, f"{c.tokens} places")
    c.need_trained(m.wpe, "wpe")
    c.add("position", m.wpe, entries=m.wpe.num_embeddings, weight=m.wpe.weight)
    layer(m.drop, c)


def block(m: gpt.Block, c: "Compiler", layer: Layer) -> None:
    """A block of `gpt`: attention and two linear layers, each added to what came."""
    entry = c.place
    layer(m.ln_1, c)
    layer(m.attn, c)
    c.add("residual", nn.Identity(), skip=entry)
    middle = c.place
    layer(m.ln_2, c)
    layer(m.mlp, c)
    c.add("residual", nn.Identity(), skip=middle)


def attention(m: gpt.Attention, c: "Compiler", layer: Layer) -> None:
    """Causal self-attention, whose probabilities may be dropped."""
    width, name = c.shape[2], c.names[id(m)]
    layer(m.c_attn, c)
    c.need(c.shape[2] == 3 * width and width % m.size == 0, name, m, "all of its heads")
    c.add("attention", m, (1, 1, width), heads=width // m.size, entries=c.tokens, p=m.p, key=first_draw(name))
    layer(m.c_proj, c)
    layer(m.dropout, c)


def mlp(m: gpt.MLP, c: "Compiler", layer: Layer) -> None:
    """Two linear layers on each token."""
    for part in (m.c_fc, m.gelu, m.c_proj, m.dropout):
        layer(part, c)


def head(m: gpt.Head, c: "Compiler", layer: Layer) -> None:
    """The last stage of `gpt`."""
    layer(m.ln_f, c)
    layer(m.lm_head, c)


PARTS: dict[type[nn.Module], Callable[[Any, "Compiler", Layer], None]] = {
    gpt.Embed: embed,
    gpt.Block: block,
    gpt.Attention: attention,
    gpt.MLP: mlp,
    gpt.Head: head,
}
TOKENWISE = (
    *(nn.Embedding, nn.Linear, nn.LayerNorm, nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.Identity),
    *(nn.Dropout, KeyedDropout),
)
