"""The same model in several formats, for their time alone: BF16, FP8 (W8A8), W4A16, W4A8.

A kernel's time does not depend on the values that it multiplies, so a variant that nobody has
quantized is rounded to nearest as it is loaded, its static activation scale an arbitrary number.
Its accuracy means nothing. Of a shape (`SHAPES`) there are no values at all: weights are drawn on
the device, quantized ones straight in the form in which they are stored.

Layers are made one at a time, on the device; neither the 16-bit model as a whole nor a copy of it
in FP32 is ever held beside a quantized one.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from dpq_core.benchmark.roofline import Load
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_quantized
from dpq_core.errors import InputError
from dpq_core.layer.grid import choose_grid
from dpq_core.layer.linear import MakeLinear
from dpq_core.layer.quantize import round_weight
from dpq_core.layer.records import LayerReport, QuantizedLinear, QuantizedWeight
from dpq_core.layer.storage import expected_shapes, layer_from_tensors, stored_bytes
from dpq_core.model.anatomy import path_of
from dpq_core.model.empty import building
from dpq_core.model.given import reader_of
from dpq_core.model.plan import plan_layers
from dpq_core.model.streaming import StreamedModel, empty_model
from dpq_core.recipe import Recipe
from dpq_core.recipe.layer_choices import CHOICES
from dpq_core.recipe.scheme import Scheme
from dpq_core.serving.decoding import context_bytes

_NEAREST = {"method": "rtn", "order": "none", "rounding": "nearest", "scale_search": "minmax"}

# Name → fields that change of the recipe's scheme; all else (group size, symmetry, …) stays.
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": CHOICES["bf16"],
    "fp8": {**_NEAREST, "bits": 8, "inner": "e4m3"},
    "w4a16": {**_NEAREST, "inner": "none", "activations": "none", "group_scale": "bf16"},
    "w4a8": _NEAREST,
}

# Names of Llama models with these sides: the released ones' configurations on the hub.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-160m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "llama-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}

_WINDOW = 8192
_SPREAD = 0.02  # standard deviation of random weights: transformers' own
_STEPS = 4.6  # the same of codes minus zero points
_AMAX = 8.0  # of activations, for static scales


class VariantError(InputError):
    """A variant that the scheme or the model does not have."""


@dataclass(frozen=True)
class Linear:
    """A linear to quantize: full name, shape, and how."""

    name: str
    rows: int
    features: int
    scheme: Scheme


class Source(Protocol):
    """A model to make variants of."""

    def empty(self) -> Any:
        """The transformers model, parameters without memory."""

    def linears(self, variant: str) -> list[Linear]:
        """What a variant quantizes; nothing of `bf16`."""

    def build(self, variant: str, device: torch.device, linear: MakeLinear) -> Any:
        """The model, its quantized layers made by `linear`."""


def variant_scheme(scheme: Scheme, variant: str) -> Scheme:
    """The recipe's scheme as a variant changes it.

    Raises:
        VariantError: none such, or none that goes with the scheme.
    """
    if variant not in VARIANTS:
        raise VariantError(f"variant {variant!r} is unknown: there are {', '.join(VARIANTS)}")
    if variant == "w4a8" and (scheme.inner == "none" or scheme.bits != 4):
        raise VariantError(
            f"variant w4a8 is the scheme's own, which has {scheme.bits} bits and inner"
            f" {scheme.inner!r}: set scheme.bits: 4 and scheme.inner: e4m3, or leave it out of"
            " benchmark.variants"
        )
    try:
        return Scheme.model_validate({**scheme.model_dump(), **VARIANTS[variant]})
    except ValidationError as error:
        raise VariantError(f"variant {variant}: {error.errors()[0]['msg']}") from error


@dataclass(frozen=True)
class Checkpoint:
    """A 16-bit checkpoint, and the native one that was made of it, which stands for `w4a8`; without
    it that is rounded to nearest too. choices: of single layers, for `w4a8`."""

    folder: Path
    scheme: Scheme
    choices: dict[str, str]
    native: Path | None = None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, recipe: Recipe, folder: Path, native: Path | None = None) -> "Checkpoint":
        """The model of a recipe, in `folder`."""
        trusted = recipe.model.trust_remote_code
        return cls(folder, recipe.scheme, recipe.layers, native, trusted)

    def empty(self) -> Any:
        model = empty_model(self.folder, self.trust_remote_code)
        head = path_of(model, model.get_output_embeddings())
        if f"{head}.weight" not in reader_of(self.folder):
            model.config.tie_word_embeddings = True
        return model

    def linears(self, variant: str) -> list[Linear]:
        scheme = variant_scheme(self.scheme, variant)
        if variant == "bf16":
            return []
        if variant == "w4a8" and self.native is not None:
            return self._stored(QuantizedCheckpoint(self.native, self.trust_remote_code))
        stream = StreamedModel(self.folder, trust_remote_code=self.trust_remote_code)
        if stream.vision is not None:
            raise VariantError(f"{self.folder}: has a vision tower: text models alone are timed")
        plan = plan_layers(stream, scheme, self.choices if variant == "w4a8" else None)
        _check_outside(each.name for each in plan.layers if each.outside)
        return [Linear(each.name, each.rows, each.features, each.scheme) for each in plan.layers]

    def _stored(self, native: QuantizedCheckpoint) -> list[Linear]:
        _check_outside(name for name, part in native.outside.items() if part)
        parameters = dict(self.empty().named_parameters())
        for name, shape in native.shapes.items():
            expected = parameters.get(f"{name}.weight")
            if expected is None or list(expected.shape) != shape:
                raise VariantError(
                    f"{native.folder} was not made of {self.folder}: its layer {name} of {shape} is"
                    " no linear there: give the checkpoint of this model, or none"
                )
        return [
            Linear(name, rows, features, native.schemes[name])
            for name, (rows, features) in native.shapes.items()
        ]

    def build(self, variant: str, device: torch.device, linear: MakeLinear) -> Any:
        if variant == "w4a8" and self.native is not None:
            return load_quantized(self.native, device, self.trust_remote_code, linear)
        reader = reader_of(self.folder)

        def layer(each: Linear) -> QuantizedLinear:
            return rounded(reader.tensor(f"{each.name}.weight").to(device), each.scheme)

        def parameter(name: str, empty: Tensor) -> Tensor:
            return reader.tensor(name).to(device, empty.dtype)

        return _filled(self.empty(), self.linears(variant), layer, parameter, linear, device)


def _check_outside(quantized: Iterable[str]) -> None:
    """Raises VariantError: a head or an embedding is among the quantized layers."""
    for name in quantized:
        raise VariantError(
            f"{name} is quantized, and the output head and the embedding are timed in 16 bits"
            " alone: leave it out of layers, or benchmark.devices out"
        )


@dataclass(frozen=True)
class Shape:
    """A Llama of these sides with random weights."""

    name: str
    scheme: Scheme
    sides: dict[str, Any]

    @classmethod
    def named(cls, name: str, scheme: Scheme) -> "Shape":
        """A row of `SHAPES`. VariantError: none such."""
        if name not in SHAPES:
            raise VariantError(f"shape {name!r} is unknown: there are {', '.join(SHAPES)}")
        return cls(name, scheme, SHAPES[name])

    def empty(self) -> Any:
        config = LlamaConfig(max_position_embeddings=_WINDOW, **self.sides)
        with building, init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()

    def linears(self, variant: str) -> list[Linear]:
        scheme = variant_scheme(self.scheme, variant)
        if variant == "bf16":
            return []
        return [
            Linear(name, module.out_features, module.in_features, scheme)
            for name, module in self.empty().named_modules()
            if isinstance(module, nn.Linear) and name.startswith("model.layers.")
        ]

    def build(self, variant: str, device: torch.device, linear: MakeLinear) -> Any:
        generator = torch.Generator(device).manual_seed(0)

        def layer(each: Linear) -> QuantizedLinear:
            return random_layer(each.rows, each.features, each.scheme, generator)

        def parameter(_: str, empty: Tensor) -> Tensor:
            made = torch.ones(empty.shape, dtype=empty.dtype, device=device)
            return made if made.ndim == 1 else made.normal_(0, _SPREAD, generator=generator)

        return _filled(self.empty(), self.linears(variant), layer, parameter, linear, device)


def load_of(source: Source, variant: str) -> Load:
    """What a decoding step of a variant has to read and to multiply."""
    model = source.empty()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    tied = model.config.get_text_config().tie_word_embeddings
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    linears = {f"{each.name}.weight": each for each in source.linears(variant)}
    kept = sum(size for name, size in sizes.items() if name not in linears)
    kept -= embedding.numel() if not tied or head is not embedding else 0
    stored = sum(stored_bytes(e.rows, e.features, e.scheme) for e in linears.values())
    weights = kept + sum(each.rows * each.features for each in linears.values())
    return Load(2 * kept + stored, weights, context_bytes(model.config))


def rounded(weight: Tensor, scheme: Scheme) -> QuantizedLinear:
    """A layer [out, in] of any float type rounded to nearest, without calibration."""
    report, scale = LayerReport(0.0, scheme.damp_frac, 0), _static_scale(scheme, weight.device)
    if scheme.method == "none":
        return QuantizedLinear(scheme, weight.to(torch.bfloat16), scale, report)
    weight = weight.float()
    if scheme.bits == 8:
        return QuantizedLinear(scheme, round_weight(weight, scheme), scale, report)
    grid = choose_grid(weight, scheme, None)
    columns = torch.arange(weight.shape[1], device=weight.device)
    codes = grid.at(columns).encode(weight.T).T.to(torch.uint8).contiguous()
    return QuantizedLinear(scheme, QuantizedWeight(codes, grid), scale, report)


def random_layer(
    rows: int, features: int, scheme: Scheme, generator: torch.Generator
) -> QuantizedLinear:
    """A layer of random stored tensors, on the generator's device, of weights' usual size."""
    device = generator.device
    inner = scheme.inner_format
    group = _SPREAD / _STEPS if inner is None else inner.maximum / 32  # |k - z| <= 15: no overflow
    values = inner.maximum / 8 if inner is not None and scheme.bits == 8 else _STEPS * group
    shapes = expected_shapes(rows, features, scheme)
    tensors: dict[str, Tensor] = {}
    for name, (shape, kind) in shapes.items():
        if name == "channel_scale":
            tensors[name] = torch.full(shape, _SPREAD / values, device=device)
        elif name == "group_scale":
            scales = torch.full(shape, group, dtype=torch.bfloat16, device=device)
            powers = torch.randint(0, 2, shape, device=device, generator=generator)
            tensors[name] = torch.ldexp(scales, -powers).to(torch.bfloat16)
        elif name == "input_scale":
            scale = _static_scale(scheme, device)
            assert scale is not None
            tensors[name] = scale
        elif kind in _WORDS:
            low, high, dtype = _WORDS[kind]
            tensors[name] = torch.randint(
                low, high, shape, dtype=dtype, device=device, generator=generator
            )
        else:
            drawn = torch.randn(shape, device=device, generator=generator) * values
            tensors[name] = drawn.to(_FLOATS[kind])
    return layer_from_tensors(tensors, features, scheme)


_WORDS = {
    "I32": (-(1 << 31), 1 << 31, torch.int32),
    "U8": (0, 1 << 8, torch.uint8),
    "I8": (-127, 128, torch.int8),
}
_FLOATS = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16}


def _static_scale(scheme: Scheme, device: torch.device) -> Tensor | None:
    if scheme.activations != "static":
        return None
    assert scheme.inner_format is not None
    return torch.tensor(_AMAX / scheme.inner_format.maximum, device=device)


def _filled(
    model: Any,
    linears: list[Linear],
    layer: Callable[[Linear], QuantizedLinear],
    parameter: Callable[[str, Tensor], Tensor],
    linear: MakeLinear,
    device: torch.device,
) -> Any:
    """An empty model with quantized linears, and all other parameters, made one by one."""
    with torch.no_grad():
        for each in linears:
            bias = model.get_submodule(each.name).bias
            given = None if bias is None else parameter(f"{each.name}.bias", bias)
            model.set_submodule(each.name, linear(layer(each), given))
        head = model.get_output_embeddings()
        tied = model.config.get_text_config().tie_word_embeddings
        if tied:
            head.weight = None
        for name, empty in list(model.named_parameters()):
            if empty.is_meta:
                owner, _, own = name.rpartition(".")
                made = nn.Parameter(parameter(name, empty), requires_grad=False)
                setattr(model.get_submodule(owner), own, made)
        if tied:
            head.weight = model.get_input_embeddings().weight
        return model.to(device).eval()
