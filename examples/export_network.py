"""A trained CIFAR-10 ResNet-20 (github.com/akamaster/pytorch_resnet_cifar10) as an archive that
`dpq convnet` quantizes. Any network goes the same way: pixels as x / 127.5 - 1, logits out.

    python examples/export_network.py resnet20-12fca82f.th resnet20.pt2
    dpq convnet recipes/convnet-cifar10.yaml --set network.id=./resnet20.pt2
"""

import argparse

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class Block(nn.Module):
    """Two convolutions beside the input; where they halve the picture, so is the input, by every
    second pixel, with channels of zeros added on both sides."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, after // before, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.added = after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.added:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))
        return (x + y).relu()


class ResNet20(nn.Module):
    """For pixels in -1 ... 1; what it was trained on were x / 255 less a mean, over a deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            tensor = torch.tensor(values)[:, None, None]
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = ((x + 1) / 2 - self.mean) / self.std
        x = self.bn1(self.conv1(x)).relu()
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("weights", help="resnet20-12fca82f.th")
    parser.add_argument("archive", help="file to write, .pt2")
    arguments = parser.parse_args()
    network = ResNet20().eval()
    state = torch.load(arguments.weights, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict({name.removeprefix("module."): state[name] for name in state})
    batch = torch.export.Dim("batch", min=1, max=2**16)
    program = torch.export.export(
        network, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},)
    )
    torch.export.save(program, arguments.archive)


if __name__ == "__main__":
    main()
