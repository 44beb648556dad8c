"""Layers that several ranks share (Shoeybi et al. 2019): each computes with its part of the weights.

The first of a pair gives each rank some columns of its output, the second makes of them its part of a sum over all
ranks. Whoever computes a stage adds that sum up, and the gradient of what the first layer was given; see `Sharing`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from paraxis.engine.precision import summed, wide
from paraxis.program.shares import Split, Tokens
from paraxis.task.batches import Nest
from paraxis.task.gathering import gathered, scattered
from paraxis.task.gpt import Attention
from paraxis.task.randomness import Draw

Leaving = Callable[[Any, Tensor, Tensor | None], Tensor]  # (module, its part, bias) -> what it makes


class Sharing(Protocol):
    """Where ranks that share layers add up their parts, in place; the tensors are contiguous."""

    kind: str  # of the computation: F, B or E

    def share(self, part: Tensor) -> Tensor:
        """In a forward: the sum over all ranks."""

    def passed(self, word: str) -> int:
        """In a forward: the number of the border that is met in the backward only."""

    def share_back(self, number: int, part: Tensor) -> Tensor:
        """In the backward of that border: the sum over all ranks."""


@dataclass(frozen=True)
class Shard:
    """A rank's part of a tensor: of each of `blocks` equal blocks of dimension `dim`, the `index`-th of `parts`."""

    dim: int
    index: int
    parts: int
    blocks: int = 1

    def of(self, whole: Tensor) -> Tensor:
        """The part, in memory of its own."""
        blocks = whole.unflatten(self.dim, (self.blocks, self.parts, -1))
        return blocks.select(self.dim + 1, self.index).flatten(self.dim, self.dim + 1).contiguous()


class Enter(torch.autograd.Function):
    """x as every rank has it -> x for this rank's part of a layer; its gradient is the sum of those of all parts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: Sharing) -> Tensor:
        ctx.at, ctx.number = at, at.passed("grad")
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return summed(partial(ctx.at.share_back, ctx.number), dy.contiguous()).to(dy.dtype), None


class Leave(torch.autograd.Function):
    """(this rank's part of a sum, bias or None) -> the sum over all ranks plus the bias, which thus counts once."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, bias: Tensor | None, at: Sharing) -> Tensor:
        total = summed(at.share, part)
        if total is part:
            ctx.mark_dirty(part)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return (total if bias is None else total.add_(bias)).to(part.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return dy, dy.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None, None


class CrossEntropy(torch.autograd.Function):
    """(scores (n, own classes), labels (n,) of all classes, index and number of the rank, meeting) -> sum of losses.

    Each rank tells its largest score, its sum of exponentials below that, and the label's score if it has it: one sum
    of (2 ranks + 1, n) numbers is all that is sent. Labels of -100 are left out, as in PyTorch's own.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, index: int, ranks: int, at: Sharing) -> Tensor:
        rows, own = scores.shape
        counted = labels != -100
        local = labels - index * own
        here = counted & (local >= 0) & (local < own)
        local = local.clamp(0, own - 1)
        told = scores.new_zeros(2 * ranks + 1, rows)
        top = scores.amax(1)
        told[index], told[ranks + index] = top, (scores - top[:, None]).exp().sum(1)
        told[2 * ranks] = scores.gather(1, local[:, None])[:, 0] * here
        at.share(told)
        most = told[:ranks].amax(0)
        log_sum = (told[ranks : 2 * ranks] * (told[:ranks] - most).exp()).sum(0).log() + most
        ctx.save_for_backward(scores, log_sum, local, here, counted)
        return ((log_sum - told[2 * ranks]) * counted).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, log_sum, local, here, counted = ctx.saved_tensors
        slope = (scores - log_sum[:, None]).exp_().mul_(counted[:, None])
        slope.scatter_add_(1, local[:, None], -here[:, None].to(slope.dtype))
        return slope.mul_(dy), None, None, None, None


def split(
    net: nn.Module, splits: Sequence[Split], draw: Draw, index: int, parts: int, tokens: Tokens | None = None
) -> dict[int, Shard]:
    """Keep one of `parts` equal parts of every split, in place; of which parameters (by id) that leaves which part.

    Every module that meets others gets an attribute `meeting`, which whoever computes it sets. With `tokens` the ranks
    share these, too.
    """
    modules, shards = dict(net.named_modules()), {}
    for own in splits:
        for number, name in enumerate(own.modules):
            module = modules[name]
            last = number == len(own.modules) - 1
            for key, p in module.named_parameters(recurse=False):
                if id(p) not in shards and (shard := _shard(own, key, last, index, parts)):
                    shards[id(p)] = shard
                    p.data = shard.of(p.data)
            _share(own, module, last, index, parts if tokens else 0)
    noise = [call for own in splits for call in own.noise] + list(tokens.noise if tokens else ())
    draw.parts |= {call: (dim, index, parts) for call, dim in noise}
    return shards


def _shard(own: Split, key: str, last: bool, index: int, parts: int) -> Shard | None:
    """A second layer's bias stays whole; what has classes or words has them in its rows."""
    if own.unit in ("classes", "words"):
        return Shard(0, index, parts)
    if last:
        return Shard(1, index, parts) if key == "weight" else None
    return Shard(0, index, parts, 3 if own.unit == "heads" else 1)


def _share(own: Split, module: nn.Module, last: bool, index: int, apart: int) -> None:
    """Give a module the forward of its part; `apart`: by how many ranks tokens are shared, 0: each has all of them."""
    vars(module)["meeting"] = None
    enter = partial(gathered, index, apart) if apart else _entering
    leave = partial(_own_tokens, index, apart) if apart else _summed
    if isinstance(module, nn.Embedding):
        vars(module)["forward"] = partial(_embedding, module, index, leave)
    elif own.unit == "classes":
        module.register_forward_pre_hook(enter)
        vars(module)["forward"] = partial(_scores, module, index, own.size)
    elif last:
        vars(module)["forward"] = partial(_second, module, leave)
    else:
        module.register_forward_pre_hook(enter)


def _entering(module: Any, given: tuple[Tensor]) -> tuple[Tensor] | None:
    """A hook in front of a first layer: only where its input needs a gradient are there any to add up."""
    (x,) = given
    if module.meeting is None or not (torch.is_grad_enabled() and x.requires_grad):
        return None
    entered: Tensor = Enter.apply(x, module.meeting)
    return (entered,)


def _summed(layer: Any, part: Tensor, bias: Tensor | None) -> Tensor:
    """The sum over all ranks, and once the bias."""
    made: Tensor = part if layer.meeting is None else Leave.apply(part, bias, layer.meeting)
    return made


def _own_tokens(index: int, parts: int, layer: Any, part: Tensor, bias: Tensor | None) -> Tensor:
    """One's own tokens of the sum over all ranks, each with the bias."""
    made = scattered(layer, part, index, parts)
    return made if bias is None else made + bias


def _second(layer: Any, leave: Leaving, x: Tensor) -> Tensor:
    """A second layer: the product of its part, and what it leaves."""
    return leave(layer, F.linear(x, layer.weight), layer.bias)


def _embedding(layer: Any, index: int, leave: Leaving, words: Tensor) -> Tensor:
    """Vectors of the words in one's own part of the vocabulary, zero for all others; then the sum over all ranks."""
    rows = layer.weight.shape[0]
    local = words - index * rows
    here = (local >= 0) & (local < rows)
    return leave(layer, F.embedding(local.clamp(0, rows - 1), layer.weight) * here[..., None], None)


def _scores(layer: Any, index: int, classes: int, x: Tensor) -> Tensor:
    """Scores of one's own classes; in an evaluation of all, because there they are also compared."""
    own = F.linear(x, layer.weight, layer.bias)
    if layer.meeting is None or layer.meeting.kind != "E":
        return own
    every = wide(own).new_zeros(*own.shape[:-1], classes)
    every.narrow(-1, index * own.shape[-1], own.shape[-1]).copy_(own)
    made: Tensor = layer.meeting.share(every)
    return made


def loss_of_parts(net: nn.Module, splits: Sequence[Split], index: int, parts: int) -> Callable[..., Any] | None:
    """The default loss, (sum of the samples' losses, their number), where the scores' classes are split."""
    heads = [own.modules[-1] for own in splits if own.unit == "classes"]
    return partial(_loss, net.get_submodule(heads[0]), index, parts) if heads else None


def _loss(head: Any, index: int, parts: int, scores: Tensor, batch: Nest) -> tuple[Tensor, int]:
    labels = batch[1]
    tokens = labels[0].numel()
    flat: Tensor = CrossEntropy.apply(scores.flatten(0, -2), labels.flatten(), index, parts, head.meeting)
    return flat / tokens if tokens > 1 else flat, len(labels)


def heads_of(module: nn.Module) -> int:
    """The heads of an attention whose parts are attentions again; 0: of none known here."""
    return module.c_attn.out_features // 3 // module.size if isinstance(module, Attention) else 0
