"""The zoo: networks that Paraxis ships, each an nn.Sequential or with `stages`, so that it can be cut anywhere.

Initial weights depend on (seed, parameter name) alone.
"""

import itertools
from collections.abc import Callable
from zlib import crc32

import torch
from torch import nn

from paraxis.errors import TaskError
from paraxis.task.gpt import GPT, shape_of
from paraxis.task.masks import splitmix64
from paraxis.task.resnet import ResNet

CLASSES = 10


def mlp(widths: str = "") -> nn.Sequential:
    """`mlp`: 784-50-10 with a sigmoid. `mlp:784-1024-1024-10`: any widths, with ReLU."""
    if not widths:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.Sigmoid(), nn.Linear(50, CLASSES))
    try:
        sizes = [int(width) for width in widths.split("-")]
    except ValueError:
        sizes = []
    if len(sizes) < 2 or min(sizes) < 1:
        raise TaskError(f"mlp:{widths}: it takes at least two widths, such as mlp:784-1024-1024-10")
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn(dropout: str = "") -> nn.Sequential:
    """Two convolutions and two linear layers for 1x28x28 images; `cnn:0` has no dropout, `cnn:0.3` another one."""
    try:
        p = float(dropout or 0.5)
    except ValueError:
        p = -1.0
    if not 0 <= p < 1:
        raise TaskError(f"cnn:{dropout}: it takes a dropout probability from 0 to below 1, such as cnn:0.5")
    first = nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()
    second = nn.Conv2d(10, 20, 5), nn.MaxPool2d(2), nn.ReLU()
    noise = (nn.Dropout(p),) if p else ()
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), *noise, nn.Linear(50, CLASSES))


def resnet18(options: str = "") -> ResNet:
    """18 layers with batch-norm and torchvision's parameter names, for images of one channel."""
    if options:
        raise TaskError(f"resnet18:{options}: it takes no options; write resnet18")
    return ResNet(CLASSES)


def gpt(options: str = "") -> GPT:
    """GPT-2's structure on bytes: `gpt:nano` (the default), `gpt:small`, `gpt:LAYERS-WIDTH-HEADS-CONTEXT`."""
    return GPT(shape_of(options))


ZOO: dict[str, Callable[[str], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet18": resnet18, "gpt": gpt}


def build(name: str, seed: int) -> nn.Module:
    """A shipped network with its initial weights; raises TaskError for an unknown name."""
    family, _, options = name.partition(":")
    if family not in ZOO:
        raise TaskError(f"network {name!r} is not known; there are {', '.join(ZOO)}, or a file such as mine.py")
    net = ZOO[family](options)
    initialise(net, seed)
    return net


def initialise(net: nn.Module, seed: int) -> None:
    """PyTorch's own initial distributions, or the network's `reset`; each module draws keyed by (seed, its name)."""
    reset = getattr(net, "reset", lambda module: module.reset_parameters())
    state = torch.random.get_rng_state()
    for name, module in net.named_modules():
        if hasattr(module, "reset_parameters"):
            torch.manual_seed(splitmix64(splitmix64(seed) ^ crc32(name.encode())) >> 1)
            reset(module)
    torch.random.set_rng_state(state)
