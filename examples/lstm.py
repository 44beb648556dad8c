"""An LSTM that says which of two halves of a sequence is larger. Its inner dropout cannot be keyed: verify names it."""

import torch
from torch import nn


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 32, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def net():
    return Classifier()


def batches():  # 16 batches of 32 sequences, each 12 steps of 8 features
    x = torch.randn(16, 32, 12, 8, generator=torch.Generator().manual_seed(0))
    y = (x[:, :, :6].sum((2, 3)) > x[:, :, 6:].sum((2, 3))).long()
    return list(zip(x, y, strict=True))
