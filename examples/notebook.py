"""Paraxis from Python with live objects, as in a notebook: explore, prove, train. python examples/notebook.py"""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paraxis


class Net(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, 3))

    def forward(self, x):
        return self.body(x)


def data(samples=1024):
    x = torch.randn(samples, 20, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x[:, :3].argmax(1))


def main():
    net, loader = Net(), DataLoader(data(), batch_size=64)
    proof = paraxis.verify(net, loader, plan="dp=2,comm=gloo", steps=5)
    print("proved:", proof["passed"], proof["results"][0]["verified"]["max_relative_difference"])

    study = paraxis.explore(net, loader, workers=2, budget=20, comms=("gloo",), lr=0.2)
    print(study.recommendation.sentence)

    run = paraxis.train(net, loader, plan=study.recommendation.plan, epochs=3, lr=0.2, out="paraxis-run")
    print("losses:", run["losses"][0], "to", run["losses"][-1], "in", run["weights"])


if __name__ == "__main__":  # ranks are processes of their own; Net travels to them by value
    main()
