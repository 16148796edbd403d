"""Classifiers to quantize: two small networks of our own, those of transformers, and any that
torch.export has saved.

mobilenet: depthwise-separable convolutions, batch norm and ReLU6 (Howard et al., 2017).
resnet: basic blocks with an addition (He et al., 2015).

Both are tables of rows, for pictures of 8 to 32 pixels. Whatever the network, `logits` is its only
output, fp32 [n, classes], so that it exports.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpq_core.convnet.archive import graph_of, open_archive
from dpq_core.convnet.recipe import NetworkSection
from dpq_core.errors import InputError, one_line

_MULTIPLE = 8  # of channels
_PICTURES = 3  # at a time: what takes three and two takes any number

# Channels after the first convolution; then (channels, stride) of each block.
_MOBILENET = (16, ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1)))
_RESNET = (16, ((16, 1), (32, 2), (64, 2)))


class NetworkError(InputError):
    """A network that does not fit its images."""


def build_network(section: NetworkSection, shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network of a recipe, untrained unless it has an `id`.

    Args:
        shape: channels, height, width of the images.

    Raises:
        NetworkError: transformers does not know the configuration, the archive cannot be read, or
            the network does not take such images or has another number of classes.
    """
    if section.kind == "transformers":
        network: nn.Module = _Logits(_transformers(section, shape[0], classes))
    elif section.kind == "exported":
        network = _exported(section)
    else:
        first, blocks = _MOBILENET if section.kind == "mobilenet" else _RESNET
        block = _separable if section.kind == "mobilenet" else _Residual
        channels = _wide(first, section.width)
        stride = 1 if shape[1] < 16 else 2
        layers: list[nn.Module] = [_convolution(shape[0], channels, 3, stride)]
        for wanted, stride in blocks:
            after = _wide(wanted, section.width)
            layers.append(block(channels, after, stride))
            channels = after
        head = nn.Linear(channels, classes)
        network = nn.Sequential(*layers, _Mean(), head)
    _check(network, shape, classes)
    return network


def _wide(channels: int, width: float) -> int:
    return max(_MULTIPLE, round(channels * width / _MULTIPLE) * _MULTIPLE)


def _convolution(
    before: int, after: int, size: int, stride: int = 1, groups: int = 1, relu: bool = True
) -> nn.Sequential:
    """Convolution, batch norm, and ReLU6 unless what follows has its own."""
    layers: list[nn.Module] = [
        nn.Conv2d(before, after, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
    ]
    return nn.Sequential(*layers, *([nn.ReLU6()] if relu else []))


def _separable(before: int, after: int, stride: int) -> nn.Module:
    depthwise = _convolution(before, before, 3, stride, groups=before)
    return nn.Sequential(depthwise, _convolution(before, after, 1))


class _Residual(nn.Module):
    """ReLU(x' + conv(conv(x))), x' brought to the output's shape by a 1×1 convolution."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(before, after, 3, stride)
        self.second = _convolution(after, after, 3, relu=False)
        same = before == after and stride == 1
        self.short = None if same else _convolution(before, after, 1, stride, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return cast(
            Tensor,
            self.relu(self.second(self.first(x)) + (x if self.short is None else self.short(x))),
        )


class _Mean(nn.Module):
    """Over height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class _Logits(nn.Module):
    """A classifier of transformers as a function of pixels alone."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixel_values=x).logits)


def _transformers(section: NetworkSection, channels: int, classes: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification

    try:
        if section.id:
            config = AutoConfig.from_pretrained(section.id, trust_remote_code=False)
            fields = {name: section.config[name] for name in section.config if name != "model_type"}
            _check_fields(config, fields)
            found = AutoModelForImageClassification.from_pretrained(
                section.id,
                config=AutoConfig.from_pretrained(section.id, trust_remote_code=False, **fields),
                trust_remote_code=False,
                use_safetensors=True,
            )
            return cast(nn.Module, found)
        fields = {"num_channels": channels, "num_labels": classes} | section.config
        _check_fields(AutoConfig.for_model(section.config["model_type"]), fields)
        config = AutoConfig.for_model(**fields)
        found = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        return cast(nn.Module, found)
    except (ValueError, OSError, TypeError, KeyError) as error:
        what = section.id or section.config["model_type"]
        raise NetworkError(f"network {what}: {one_line(error)}") from error


def _check_fields(config: Any, fields: Mapping[str, Any]) -> None:
    """Fields of a configuration, and nothing else that its loader would take.

    Raises:
        NetworkError: one is none.
    """
    known = {name for name in vars(config) if name[0] != "_"} | {"num_labels", "model_type"}
    for name in fields:
        if name not in known and name not in config.attribute_map:
            raise NetworkError(
                f"network.config.{name} is no field of {config.model_type}, and nothing else is"
                f" passed on: there are {', '.join(sorted(known))}"
            )


def _exported(section: NetworkSection) -> nn.Module:
    """The graph of an archive."""
    try:
        graph = graph_of(open_archive(network_file(section)))
    except Exception as error:  # of zip, pickle and torch
        raise NetworkError(f"{section.id}: unreadable: {one_line(error)}") from error
    del graph.train, graph.eval  # which raise; `dpq_core.convnet.quantize` trains graphs
    return cast(nn.Module, graph)


def network_file(section: NetworkSection) -> Path:
    """The archive of an exported network.

    Raises:
        NetworkError: it is not there.
    """
    path = Path(section.id or "")
    if not path.is_file():
        raise NetworkError(f"{path}: no file: network.id names an archive of torch.export.save")
    return path


def _check(network: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """A few pictures through the network."""
    was = network.training
    try:
        with torch.no_grad():
            found = network.eval()(torch.zeros(_PICTURES, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "×".join(map(str, shape))
        raise NetworkError(
            f"the network does not take images of {size}: {one_line(error, 300)}"
        ) from error
    finally:
        network.train(was)
    if found.shape[1] < classes:
        raise NetworkError(
            f"the network tells {found.shape[1]} classes apart, and the images have {classes}"
        )
