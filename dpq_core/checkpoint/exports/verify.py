"""Whether an export says what the native checkpoint says: tensors, size, and logits.

Two comparisons of logits, on a few fixed tokens. The reader's must be equal, to the last bit, to
those of the native codes in the reader's own arithmetic (`Arithmetic.reference`): a wrong code,
scale or zero point shows here. And they must be near those of the model that was evaluated, where
the reader's arithmetic differs from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpq_core.arithmetic.distance import distance
from dpq_core.checkpoint.exports.format import Format, Target
from dpq_core.checkpoint.native import QuantizedCheckpoint, load_quantized
from dpq_core.kernels import products
from dpq_core.layer.storage import expected_shapes
from dpq_core.model.reader import CheckpointError, CheckpointReader

_PROBE = (2, 64)  # windows, tokens
_SIZE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Checked:
    """What was found of an export. checks: name → None where it passed, else what is wrong.
    distance: of its logits from the evaluated model's. None: it did not come so far."""

    checks: dict[str, str | None]
    bits_per_weight: float | None = None
    distance: float | None = None


def check_content(
    folder: Path, checkpoint: QuantizedCheckpoint, form: Format, targets: Sequence[Target]
) -> Checked:
    """All checks of a written export."""
    reader = CheckpointReader(folder, as_stored=True)
    checks: dict[str, str | None] = {"tensors": _tensors(reader, checkpoint, form, targets)}
    if checks["tensors"]:
        return Checked(checks)
    bits, checks["size"] = _size(reader, form, targets)
    try:
        found = probe_logits(form.load(folder, checkpoint))
    except CheckpointError as error:
        return Checked(checks | {"reader": str(error)}, bits)
    same = probe_logits(load_quantized(checkpoint.folder, linear=form.arithmetic.reference))
    checks["reader"] = _unequal(found, same, 0.0)
    evaluated = probe_logits(load_quantized(checkpoint.folder))
    checks["logits"] = _unequal(found, evaluated, form.arithmetic.tolerance)
    return Checked(checks, bits, distance(found, evaluated))


def probe_logits(model: Any) -> Tensor:
    """Logits of a model for a few fixed tokens, [windows, tokens, vocabulary] fp32."""
    limit = getattr(model.config, "max_position_embeddings", _PROBE[1])
    shape = (_PROBE[0], min(_PROBE[1], limit))
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), products.by_libraries():  # as the format's own reader
        logits: Tensor = model(input_ids=tokens).logits.float()
    return logits


def _unequal(found: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if torch.equal(found, expected):
        return None
    apart = distance(found, expected)
    if tolerance and apart <= tolerance:
        return None
    allowed = f"{tolerance:g} are allowed" if tolerance else "they must be equal"
    return f"logits differ by {apart:.3g} of their norm: {allowed}"


def _tensors(
    reader: CheckpointReader,
    checkpoint: QuantizedCheckpoint,
    form: Format,
    targets: Sequence[Target],
) -> str | None:
    expected: dict[str, tuple[list[int], str]] = {}
    native: set[str] = set()
    for target in targets:
        stored = expected_shapes(target.rows, target.features, target.scheme)
        native |= {f"{target.name}.{suffix}" for suffix in stored}
        expected |= {f"{target.name}.{key}": entry for key, entry in _shapes(form, target).items()}
    for name in checkpoint.reader.names:
        if name not in native:
            expected[name] = checkpoint.reader.shape_and_type(name)
    for name in sorted(expected.keys() | set(reader.names)):
        if name not in reader or name not in expected:
            return f"tensor {name} is {'missing' if name in expected else 'not of the format'}"
        if reader.shape_and_type(name) != expected[name]:
            return f"tensor {name} is {reader.shape_and_type(name)}, expected {expected[name]}"
    try:
        reader.check_finite()
    except CheckpointError as error:
        return str(error)
    return None


def _shapes(form: Format, target: Target) -> dict[str, tuple[list[int], str]]:
    if target.scheme.method == "none":
        return {"weight": ([target.rows, target.features], target.stored_dtype)}
    return form.shapes(target)


def _size(
    reader: CheckpointReader, form: Format, targets: Sequence[Target]
) -> tuple[float, str | None]:
    """Bits a weight in the file, and what is wrong where the format's arithmetic gives others."""
    weights = sum(target.rows * target.features for target in targets)
    stored = [f"{target.name}.{suffix}" for target in targets for suffix in _shapes(form, target)]
    found = 8 * sum(tensor.nbytes for name in stored for tensor in [reader.tensor(name)]) / weights
    expected = sum(_bits(form, t) * t.rows * t.features for t in targets) / weights
    if abs(found / expected - 1) <= _SIZE_TOLERANCE:
        return found, None
    return found, f"{found:.3f} bits a weight, where the format's arithmetic gives {expected:.3f}"


def _bits(form: Format, target: Target) -> float:
    return 16.0 if target.scheme.method == "none" else form.bits(target)
