"""The native checkpoint: quantized layers and everything else, in one verified folder.

    model-00001-of-0000N.safetensors …   see `linear.layer_tensors` for a quantized layer's tensors;
                                         an FP8 cache's scales are `k_scale` and `v_scale` of each
                                         attention, [1] or [heads, 1, 1], of the model's type
    model.safetensors.index.json         tensor → shard, as in transformers
    config.json, tokenizer files, …      the base model's, with `quantization_config` added
    dpq.json                             the manifest, written last: format version, base model,
                                         scheme, each layer's report and where its scheme differs,
                                         SHA-256 and size of every file

A folder without `dpq.json` is not a checkpoint; another format version is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpq_core.checkpoint.importers import fill_gptq, load_compressed_tensors, unsupported
from dpq_core.checkpoint.shards import check_files
from dpq_core.layer.kv_cache import KEY_SCALE, VALUE_SCALE
from dpq_core.layer.linear import MakeLinear, W4A8Linear
from dpq_core.layer.records import LayerReport, QuantizedLinear
from dpq_core.layer.storage import expected_shapes, layer_from_tensors, layer_tensors
from dpq_core.model.anatomy import parts_of, path_of
from dpq_core.model.empty import building
from dpq_core.model.filling import fill_parameters
from dpq_core.model.given import reader_of
from dpq_core.model.given_layouts import read_by_codes
from dpq_core.model.outside import Outside
from dpq_core.model.plan import Outside as Part
from dpq_core.model.quantization import quantization_of, reads_fp8
from dpq_core.model.reader import (
    CheckpointError,
    CheckpointReader,
    read_json,
)
from dpq_core.model.source import check_parameters, check_source, check_values
from dpq_core.model.streaming import empty_model
from dpq_core.recipe.scheme import Scheme

FORMAT_VERSION = 2
MANIFEST = "dpq.json"


def save_layer(folder: Path, layer: QuantizedLinear) -> None:
    """One quantized layer as `layer.safetensors` and `layer.json` (its scheme and report)."""
    save_file(layer_tensors(layer), folder / "layer.safetensors")
    about = {
        "features": layer.features,
        "scheme": layer.scheme.model_dump(mode="json"),
        "report": layer.report.as_row(),
    }
    (folder / "layer.json").write_text(json.dumps(about))


def load_layer(folder: Path) -> QuantizedLinear:
    """Inverse of `save_layer`."""
    about = json.loads((folder / "layer.json").read_text())
    scheme = Scheme.model_validate(about["scheme"])
    tensors = load_file(folder / "layer.safetensors")
    layer = layer_from_tensors(tensors, about["features"], scheme)
    return dataclasses.replace(layer, report=load_report(folder))


def load_report(folder: Path) -> LayerReport:
    """What `save_layer` wrote beside the tensors."""
    return LayerReport.of_row(json.loads((folder / "layer.json").read_text())["report"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a native checkpoint.

    Raises:
        CheckpointError: no manifest, or a format version that this code does not know.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {MANIFEST}: not a (complete) checkpoint")
    manifest = read_json(path)
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {version} is unknown: this release reads {FORMAT_VERSION}"
        )
    missing = [key for key in ("scheme", "layers", "files") if key not in manifest]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    return manifest


def files_of(folder: Path) -> list[str]:
    """Names of the files that a native checkpoint is of: what its manifest lists, and that. Others
    are put beside them later, or by who loads it.

    Raises:
        CheckpointError: as `read_manifest`.
    """
    return [*read_manifest(folder)["files"], MANIFEST]


class QuantizedCheckpoint:
    """A native checkpoint folder, opened for reading.

    Args:
        trust_remote_code: run the checkpoint's own model code.

    Raises:
        CheckpointError: as `read_manifest` and `CheckpointReader` do.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder = folder
        self.trust_remote_code = trust_remote_code
        self.manifest = read_manifest(folder)
        try:
            self.scheme = Scheme.model_validate(self.manifest["scheme"])
            rows = {row["name"]: row for row in self.manifest["layers"]}
            self.shapes: dict[str, list[int]] = {name: row["shape"] for name, row in rows.items()}
            self.outside: dict[str, Part] = {n: row.get("outside", "") for n, row in rows.items()}
            base = self.scheme.of_layers.model_dump()
            self.schemes = {
                name: Scheme.model_validate({**base, **row["scheme"]}) for name, row in rows.items()
            }
            self.cache: dict[str, list[list[int]]] = self.manifest.get("kv_cache", {})
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(f"{folder / MANIFEST}: no valid scheme and layers") from error
        self.reader = CheckpointReader(folder)

    def empty_model(self) -> Any:
        """The model that `config.json` describes, without memory, checked against the manifest.

        Raises:
            CheckpointError: a quantized layer is no linear of the model, or of another shape.
        """
        model = empty_model(self.folder, self.trust_remote_code)
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, shape in self.shapes.items():
            expected = parameters.get(f"{name}.weight")
            if expected is None or list(expected.shape) != shape:
                asked = "has no such layer" if expected is None else f"asks for {[*expected.shape]}"
                raise CheckpointError(
                    f"{self.folder}: tensor {name}.weight is {shape}, but config.json {asked}"
                )
        return model

    def layer(self, name: str) -> QuantizedLinear:
        """A quantized layer by name."""
        rows, features = self.shapes[name]
        suffixes = expected_shapes(rows, features, self.schemes[name])
        tensors = self.reader.tensors(f"{name}.{suffix}" for suffix in suffixes)
        by_suffix = {full.removeprefix(f"{name}."): tensor for full, tensor in tensors.items()}
        return layer_from_tensors(by_suffix, features, self.schemes[name])

    def verify(self) -> None:
        """Every file has its digest; every tensor is there, of its shape and type, and finite.

        Raises:
            CheckpointError: naming the file or the tensor.
        """
        check_files(self.folder, self.manifest["files"])
        for name, (shape, dtype) in self._expected().items():
            if name not in self.reader:
                raise CheckpointError(f"{self.folder}: tensor {name} is missing")
            found = self.reader.shape_and_type(name)
            if found[0] != shape or (dtype and found[1] != dtype):
                raise CheckpointError(
                    f"{self.folder}: tensor {name} is {found[1]} {found[0]}, "
                    f"expected {dtype or found[1]} {shape}"
                )
        self.reader.check_finite()

    def _expected(self) -> dict[str, tuple[list[int], str | None]]:
        expected: dict[str, tuple[list[int], str | None]] = {}
        model = self.empty_model()
        half = model.dtype == torch.float16  # kept weights are too, or BF16 of earlier releases
        for name, parameter in model.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in self.shapes:
                rows, features = self.shapes[layer]
                stored = expected_shapes(rows, features, self.schemes[layer])
                kept = half and self.schemes[layer].method == "none"
                expected |= {
                    f"{layer}.{suffix}": (shape, None if kept else dtype)
                    for suffix, (shape, dtype) in stored.items()
                }
            else:
                expected[name] = (list(parameter.shape), None)
        expected |= self._expected_of_cache()
        if model.config.tie_word_embeddings:
            expected.pop(f"{path_of(model, model.get_output_embeddings())}.weight", None)
        return expected

    def _expected_of_cache(self) -> dict[str, tuple[list[int], str | None]]:
        per_head = self.scheme.kv_cache_scale == "head"
        return {
            f"{name}.{scale}": ([heads, 1, 1] if per_head else [1], None)
            for name, shapes in self.cache.items()
            for scale, (heads, _) in zip((KEY_SCALE, VALUE_SCALE), shapes, strict=True)
        }


def check_checkpoint(folder: Path, trust_remote_code: bool = False) -> None:
    """Check every tensor of a checkpoint that `load_model` reads, but for a third party's, which
    its own loader checks.

    Raises:
        CheckpointError: unreadable, damaged, or not finite, with the file or tensor.
    """
    if (folder / MANIFEST).is_file():
        QuantizedCheckpoint(folder, trust_remote_code).verify()
        return
    quantization = quantization_of(folder)
    if quantization is None or reads_fp8(quantization):
        check_source(folder, trust_remote_code)
        check_values(folder, trust_remote_code)
    elif read_by_codes(quantization):
        check_source(folder, trust_remote_code, keeps=True)
        check_values(folder, trust_remote_code)


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    source: bool = False,
) -> Any:
    """A transformers causal LM from any checkpoint: native, 16 bits, or a third party's.

    Args:
        source: as what it is quantized from. FP8 of compressed-tensors is measured with its
            activations' rounding, by the library, and quantized from its weights in 16 bits. Codes
            of 4 bits are read by one reader, `dpq_core.model.given`.

    Raises:
        CheckpointError: see `load_quantized`, `check_source`, and `dpq_core.checkpoint.importers`.
    """
    with building:
        if (folder / MANIFEST).is_file():
            return load_quantized(folder, device, trust_remote_code)
        quantization = quantization_of(folder)
        by_codes = read_by_codes(quantization, source)
        library = by_its_library(folder) and not by_codes
        if library and not (source and reads_fp8(quantization)):
            return load_compressed_tensors(folder).to(device).eval()
        model = empty_model(folder, trust_remote_code)
        reader = reader_of(folder) if by_codes else CheckpointReader(folder)
        if quantization is None or by_codes or reads_fp8(quantization):
            check_parameters(model, reader)
        elif quantization["quant_method"] == "gptq":
            fill_gptq(model, reader, quantization)
        else:
            raise unsupported(folder, quantization["quant_method"])
        return _complete(model, reader, device)


def by_its_library(folder: Path) -> bool:
    """Whether `load_model` has the library of a format load it."""
    quantization = quantization_of(folder)
    return quantization is not None and quantization["quant_method"] == "compressed-tensors"


def load_quantized(
    folder: str | Path,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    linear: MakeLinear = W4A8Linear,
) -> Any:
    """A transformers model from a native checkpoint, its quantized linears `W4A8Linear`: a causal
    LM, or one that takes images too. A quantized embedding looks decoded rows up.

    `linear` makes another module of a quantized layer and its bias: another arithmetic.

    Raises:
        CheckpointError: missing manifest, unknown version, missing or misshapen tensors.
    """
    checkpoint = QuantizedCheckpoint(Path(folder), trust_remote_code)
    model, reader = checkpoint.empty_model(), checkpoint.reader
    parts = parts_of(model)
    for name in checkpoint.shapes:
        if name in (parts.embedding, parts.head):
            continue
        bias = f"{name}.bias"
        given = reader.tensor(bias).to(device) if bias in reader else None
        model.set_submodule(name, linear(checkpoint.layer(name).to(device), given))
    outside = Outside(parts, reader)
    outside.quantize(checkpoint.shapes, lambda name: checkpoint.layer(name).to(device))
    for path in (parts.embedding, parts.head):
        part = model.get_submodule(path)
        if outside.quantized(path):
            model.set_submodule(path, outside.filled(path, part, model.dtype, linear))
    return _complete(model, checkpoint.reader, device)


def _complete(model: Any, reader: CheckpointReader, device: torch.device | str) -> Any:
    """Load what has no memory yet; an output head that is not stored is the input embedding."""
    head = model.get_output_embeddings()
    empty = isinstance(head, nn.Linear) and head.weight.is_meta  # else a quantized layer
    tied = empty and f"{path_of(model, head)}.weight" not in reader
    if tied:
        head.weight = None
    fill_parameters(model, "", reader, model.dtype)
    if tied:
        head.weight = model.get_input_embeddings().weight
    return model.to(device).eval()
