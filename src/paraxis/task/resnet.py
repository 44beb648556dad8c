"""`resnet18`: the residual network of He et al. (2015) with torchvision's parameter names, for small grey images."""

from collections.abc import Sequence

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
BLOCKS = 2  # of each width


class Block(nn.Module):
    """Two 3x3 convolutions and a way around them: (n, inputs, h, w) -> (n, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)  # only ever on what this block has made itself, never on its input
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Sequential | None = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The rectified sum of both ways."""
        around = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + around)


class ResNet(nn.Module):
    """The 18-layer network: images (n, channels, h, w) -> scores (n, classes).

    Its state_dict has torchvision's names, and its shapes but for the first convolution's input channels.
    """

    def __init__(self, classes: int, channels: int = 1, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        inputs = widths[0]
        self.conv1 = nn.Conv2d(channels, inputs, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU()  # not in place: a pipeline may cut in front of it
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        for number, width in enumerate(widths, 1):
            first = Block(inputs, width, stride=1 if number == 1 else 2)
            rest = (Block(width, width, 1) for _ in range(BLOCKS - 1))
            self.add_module(f"layer{number}", nn.Sequential(first, *rest))
            inputs = width
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(inputs, classes)

    def stages(self) -> list[nn.Module]:
        """The layers in order, whose composition is the network: a pipeline may cut between any two."""
        blocks = [block for name, layer in self.named_children() if name[:5] == "layer" for block in layer.children()]
        return [self.conv1, self.bn1, self.relu, self.maxpool, *blocks, self.avgpool, self.flatten, self.fc]

    def forward(self, x: Tensor) -> Tensor:
        """Scores of images, before the softmax."""
        for layer in self.stages():
            x = layer(x)
        return x

    @staticmethod
    def reset(module: nn.Module) -> None:
        """A module's initial weights: convolutions keep the variance of what flows back (He et al. 2015)."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            module.reset_parameters()  # type: ignore[operator]
