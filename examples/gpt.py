"""A small GPT with dict batches as transformers has them: padding, ignored labels, parameter groups, a schedule."""
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
        x = input_ids, attention_mask
        for part in self: x = part(*x)
        return x
def net(): return GPT([Embed(64, 64), Block(64, 4), Block(64, 4), Head(64, 64)])
def stages(net): return list(net)  # where a pipeline may cut it: each takes what the one before returns
def inputs(batch): return {key: batch[key] for key in ("input_ids", "attention_mask")}
def loss(output, batch):  # (sum, weight): labels of -100 count for nothing
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(output[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum"), (labels != -100).sum()
def optimizer(params): return torch.optim.AdamW([{"params": [p for p in params if p.ndim > 1], "weight_decay": 0.1},
                                                 {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}], 3e-3)
def scheduler(optimizer): return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200)
def batches():  # 8 batches of 16 sequences that count upwards from anywhere, cut off anywhere
    ids, ends = (torch.randint(64, (8, 16, 1)) + torch.arange(32)) % 64, torch.randint(8, 33, (8, 16, 1))
    return [{"input_ids": i, "attention_mask": 1 * m, "labels": i.where(m, -100)} for i, m in zip(ids, torch.arange(32) < ends)]
