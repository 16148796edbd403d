"""A released classifier for other runtimes, beside the file that was scored:

    onnx        the file itself, model.onnx: whatever reads ONNX takes it
    openvino    model.xml and model.bin, whose weights stay the codes that they are

What was written is opened by its own runtime and asked for the classes of pictures; other answers
than the scored file's, where there are more than rounding in another order explains, are an error,
and nothing is left behind. executorch is known by name and refused: it lowers programs of torch.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpq_core.arithmetic.distance import distance
from dpq_core.convnet.artifact import read_manifest
from dpq_core.convnet.executor import Classifier, other_answers, too_many
from dpq_core.convnet.files import MODEL
from dpq_core.convnet.images import Images, square
from dpq_core.convnet.recipe import ImagesSection
from dpq_core.errors import InputError, check_extra, one_line

_BATCH = 32
_LEAST = 8  # pictures that tell anything
_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}

Runs = Callable[[Tensor], Tensor]  # fp32 [n, channels, height, width] → logits [n, classes]


class ConvExportError(InputError):
    """A format that is not written, or a file that gives other answers."""


@dataclass(frozen=True)
class Written:
    """An export and how it compares with the scored file: same: pictures of the same class.
    distance: of the logits, the norm of the difference over the norm."""

    format: str
    files: dict[str, int]  # name → bytes
    pictures: int
    same: int
    distance: float


@dataclass(frozen=True)
class _Format:
    """write: (model.onnx, folder). runs: the folder, opened by its runtime. package: needed, and
    the name of its extra. refused: why it is not written."""

    write: Callable[[Path, Path], None] | None = None
    runs: Callable[[Path], Runs] | None = None
    package: str | None = None
    refused: str = ""


def export_classifier(folder: Path, name: str, to: Path, pictures: Images) -> Written:
    """Write an artifact's classifier as another runtime's, into a new folder.

    Raises:
        ConvExportError: the format is refused, `to` exists, the tool does not take the file, or the
            export gives other classes.
        MissingExtraError: the tool is not installed.
    """
    format_ = writable(name)
    assert format_.write is not None
    assert format_.runs is not None
    if to.exists():
        raise ConvExportError(f"{to} exists: name a folder that does not")
    try:
        to.mkdir(parents=True)
        format_.write(folder / MODEL, to)
        found = _logits(format_.runs(to), pictures)
        return _compared(name, to, _logits(Classifier(folder), pictures), found)
    except BaseException as error:
        shutil.rmtree(to, ignore_errors=True)
        if isinstance(error, InputError) or not isinstance(error, Exception):
            raise
        raise ConvExportError(f"{name}: {one_line(error, 300)}") from error  # of the tool's own


def writable(name: str) -> _Format:
    """A row of the table, whose tool is installed.

    Raises:
        ConvExportError: unknown, or refused. MissingExtraError: its tool is missing.
    """
    row = FORMATS.get(name)
    if row is None:
        raise ConvExportError(f"format {name!r} is unknown: there are {', '.join(FORMATS)}")
    if row.refused:
        raise ConvExportError(f"format {name}: {row.refused}")
    if row.package:
        check_extra(f"dpq convnet export --format {name}", row.package, row.package)
    return row


def sample(folder: Path, pictures: Sequence[Path]) -> Images:
    """Pictures as an artifact's network reads them.

    Raises:
        ConvExportError: too few, or one that cannot be read. ArtifactError: no artifact.
    """
    from PIL import Image

    seen: dict[str, Any] = read_manifest(folder)["pictures"]
    known = {key: value for key, value in seen.items() if key != "channels"}
    section, pixels = ImagesSection(**known), []
    if len(pictures) < _LEAST:
        raise ConvExportError(
            f"{len(pictures)} pictures ({', '.join(sorted(_ENDINGS))}) to compare with: give a"
            f" folder of at least {_LEAST}"
        )
    for path in pictures:
        try:
            with Image.open(path) as picture:
                grey = picture.convert("L") if seen["channels"] == 1 else picture
                pixels.append(square(grey, section)[: seen["channels"]])
        except OSError as error:
            raise ConvExportError(f"{path}: no picture that can be read: {error}") from error
    x = torch.from_numpy(np.stack(pixels))
    return Images(x, torch.zeros(len(x), dtype=torch.long), tuple(seen["mean"]), tuple(seen["std"]))


def pictures_in(folder: Path, most: int) -> list[Path]:
    """Files that are pictures by their names, spread over a folder and those in it."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _ENDINGS)
    step = max(1, len(found) // most)
    return found[::step][:most]


def _logits(model: Runs, pictures: Images) -> Tensor:
    starts = range(0, len(pictures), _BATCH)
    return torch.cat([model(pictures.inputs(slice(i, i + _BATCH))) for i in starts])


def _compared(name: str, to: Path, expected: Tensor, found: Tensor) -> Written:
    count, other = len(expected), other_answers(expected, found)
    off = distance(found, expected)
    if too_many(other, count) or not found.isfinite().all():
        raise ConvExportError(
            f"{name}: another class than the scored file's for {other} of {count} pictures,"
            f" logits {100 * off:.1f} % away: nothing is kept"
        )
    files = {path.name: path.stat().st_size for path in sorted(to.iterdir())}
    return Written(name, files, count, count - other, off)


def _copy(model: Path, to: Path) -> None:
    shutil.copyfile(model, to / MODEL)


def _onnx_runs(to: Path) -> Runs:
    import onnxruntime

    session = onnxruntime.InferenceSession(to / MODEL, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(
        session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    )


def _openvino(model: Path, to: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(model), to / "model.xml", compress_to_fp16=False)


def _openvino_runs(to: Path) -> Runs:
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}  # by itself it may compute in BF16
    compiled = openvino.Core().compile_model(to / "model.xml", "CPU", exact)
    return lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0]))


FORMATS: dict[str, _Format] = {
    "onnx": _Format(_copy, _onnx_runs),
    "openvino": _Format(_openvino, _openvino_runs, "openvino"),
    "executorch": _Format(
        refused="ExecuTorch lowers programs of torch.export, and a released classifier is an ONNX"
        " file: its codes and roundings would be made anew, and not be those that were scored."
        " Write onnx or openvino"
    ),
}
