"""A small GPT with dict batches, as transformers has them: padding, ignored labels, parameter groups, schedule."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import nn


class Embed(nn.Embedding):
    def forward(self, input_ids, attention_mask):
        return super().forward(input_ids), attention_mask.bool()


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h, mask):
        q, k, v = self.qkv(self.norm1(h)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = mask[:, None, None] & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        mixed = F.scaled_dot_product_attention(q, k, v, seen, dropout_p=0.1 if self.training else 0.0)
        h = h + self.out(mixed.transpose(1, 2).flatten(2))
        return h + self.mlp(self.norm2(h)), mask


class Head(nn.Linear):
    def forward(self, h, mask):
        return super().forward(h)


class GPT(nn.ModuleList):
    def forward(self, input_ids, attention_mask):
        return reduce(lambda x, part: part(*x), self, (input_ids, attention_mask))


def net():
    return GPT([Embed(64, 64), Block(64, 4), Block(64, 4), Head(64, 64)])


def stages(net):  # what a pipeline may cut: each part takes what the one before it returns
    return list(net)


def inputs(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def loss(output, batch):  # (sum, weight): -100 counts for nothing
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(output[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()


def optimizer(parameters):
    decay, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim < 2]
    return torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=3e-3)


def scheduler(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)


def batches():  # 8 batches of 16 sequences that count upwards from anywhere
    random = torch.Generator().manual_seed(0)
    ids = (torch.randint(64, (8, 16, 1), generator=random) + torch.arange(32)) % 64
    mask = (torch.arange(32) < torch.randint(8, 33, (8, 16, 1), generator=random)).long()
    labels = ids.where(mask > 0, -100)
    return [{"input_ids": ids[n], "attention_mask": mask[n], "labels": labels[n]} for n in range(8)]
