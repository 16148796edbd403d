"""Labelled images: of scikit-learn, of idx files (MNIST's format), of anything `datasets` loads.

All are `uint8 [n, channels, height, width]` and `int64 [n]`; a network reads
(x / 255 − mean) / std, a mean and a deviation for all channels or one for each.

idx (http://yann.lecun.com/exdb/mnist): two zero bytes, the type (8: unsigned byte), the number of
dimensions, each dimension as a big-endian int32, then the values, the last dimension fastest.
"""

import gzip
import hashlib
import json
import math
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpq_core.convnet.recipe import ImagesSection
from dpq_core.data.data_files import check_folder, literal
from dpq_core.digests import file_digest, identity
from dpq_core.errors import InputError

_DIGITS_HELD_OUT = 360  # of 1797: the last fifth, other writers than the first
_UNSIGNED_BYTE = 8


class ImagesError(InputError):
    """Images that cannot be read, with the file or column."""


@dataclass(frozen=True)
class Images:
    """Pictures and their classes."""

    pixels: Tensor  # [n, channels, height, width] uint8
    labels: Tensor  # [n] int64
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int | None) -> "Images":
        return replace(self, pixels=self.pixels[:count], labels=self.labels[:count])

    def inputs(self, which: slice | Tensor) -> Tensor:
        """What a network reads of these pictures: fp32 [n, channels, height, width]."""
        mean, std = (torch.tensor(each).reshape(-1, 1, 1) for each in (self.mean, self.std))
        return (self.pixels[which].float() / 255 - mean) / std

    def names(self) -> list[str]:
        """SHA-256 of each picture and its class."""
        return [
            hashlib.sha256(picture.tobytes() + bytes([int(label) % 256])).hexdigest()
            for picture, label in zip(self.pixels.numpy(), self.labels, strict=True)
        ]


@dataclass(frozen=True)
class ImageSet:
    """To train and calibrate on, and held out."""

    train: Images
    test: Images
    names: tuple[str, ...] = ()  # of the classes, where the source has any

    @property
    def classes(self) -> int:
        return int(torch.cat([self.train.labels, self.test.labels]).max()) + 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width


def sources(section: ImagesSection) -> dict[str, Any]:
    """What tells the files apart that `load_images` will read: SHA-256 of idx files; name
    and identity of those in `data_dir`, which may be a million.

    Raises:
        ImagesError: a file or folder is missing.
    """
    if section.source == "idx":
        folder = Path(section.folder or "")
        return {
            f"{split} {kind}": file_digest(_idx_file(folder, split, kind))
            for split in ("train", "t10k")
            for kind in ("images-idx3", "labels-idx1")
        }
    if section.data_dir is None:
        return {}
    folder = Path(section.data_dir)
    if not folder.is_dir():
        raise ImagesError(f"{folder}: no such folder: images.data_dir names one")
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): identity(path) for path in found}


def load_images(section: ImagesSection) -> ImageSet:
    """Both splits, as the recipe asks.

    Raises:
        ImagesError: a file, column or class is not what it should be.
    """
    load = {"digits": _digits, "idx": _idx, "datasets": _datasets}[section.source]
    images, seen = load(section), section.pictures
    channels = images.shape[0]
    for name, values in (("mean", seen.mean), ("std", seen.std)):
        if len(values) not in (1, channels):
            raise ImagesError(
                f"images.{name} has {len(values)} numbers, and the pictures {channels} channels:"
                " give one for all, or one for each; images.preset names some"
            )
    mean, std = tuple(seen.mean), tuple(seen.std)
    found = replace(
        images,
        train=replace(images.train.first(section.train_samples), mean=mean, std=std),
        test=replace(images.test.first(section.test_samples), mean=mean, std=std),
    )
    if len(found.train) == 0 or len(found.test) == 0:
        raise ImagesError(
            f"{section.source}: {len(found.train)} training and {len(found.test)} test images:"
            " both splits need some"
        )
    return found


def save_images(images: ImageSet, path: Path) -> None:
    """Write both splits as safetensors."""
    parts = {"train": images.train, "test": images.test}
    about = {"mean": images.train.mean, "std": images.train.std, "names": images.names}
    save_file(
        {f"{name}.pixels": part.pixels.contiguous() for name, part in parts.items()}
        | {f"{name}.labels": part.labels.contiguous() for name, part in parts.items()},
        path,
        {name: json.dumps(values) for name, values in about.items()},
    )


def read_images(path: Path) -> ImageSet:
    """Inverse of `save_images`."""
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        about = {name: tuple(json.loads(text)) for name, text in file.metadata().items()}
    train, test = (
        Images(tensors[f"{name}.pixels"], tensors[f"{name}.labels"], about["mean"], about["std"])
        for name in ("train", "test")
    )
    return ImageSet(train, test, about["names"])


def _digits(_section: ImagesSection) -> ImageSet:
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = np.rint(found.images * (255 / 16)).astype(np.uint8)[:, None]
    everything = Images(torch.from_numpy(grey), torch.from_numpy(found.target.astype(np.int64)))
    train = everything.first(-_DIGITS_HELD_OUT)
    rest = slice(-_DIGITS_HELD_OUT, None)
    return ImageSet(train, Images(everything.pixels[rest], everything.labels[rest]))


def _idx(section: ImagesSection) -> ImageSet:
    folder = Path(section.folder or "")
    return ImageSet(_idx_split(folder, "train"), _idx_split(folder, "t10k"))


def _idx_split(folder: Path, split: str) -> Images:
    pixels = read_idx(_idx_file(folder, split, "images-idx3"))
    labels = read_idx(_idx_file(folder, split, "labels-idx1"))
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise ImagesError(
            f"{folder}: {split}: images of shape {pixels.shape} and labels of shape {labels.shape}"
            " do not belong together"
        )
    return Images(
        torch.from_numpy(pixels.copy())[:, None], torch.from_numpy(labels.astype(np.int64))
    )


def _idx_file(folder: Path, split: str, kind: str) -> Path:
    name = f"{split}-{kind}-ubyte"
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise ImagesError(f"{folder}: neither {name}.gz nor {name}: images.folder names their folder")


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of one idx file of bytes, gzipped or not.

    Raises:
        ImagesError: not idx, another type, or not as long as its header says.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ImagesError(f"{path}: unreadable: {error}") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UNSIGNED_BYTE:
        raise ImagesError(f"{path}: no idx file of bytes: it begins with {content[:4].hex()}")
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ImagesError(f"{path}: {len(content)} bytes, cut in its header")
    shape = struct.unpack(f">{content[3]}i", content[4:start])
    if min(shape, default=0) < 0 or len(content) - start != int(np.prod(shape)):
        raise ImagesError(f"{path}: {len(content) - start} values, and its header says {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _datasets(section: ImagesSection) -> ImageSet:
    train, names = _split(section, section.train_split, section.train_samples)
    test, _ = _split(section, section.test_split, section.test_samples)
    return ImageSet(train, test, names)


def _split(section: ImagesSection, split: str, count: int | None) -> tuple[Images, tuple[str, ...]]:
    """Pictures, and the names of their classes."""
    from datasets import load_dataset

    assert section.path is not None
    check_folder(section.path)
    folder = None if section.data_dir is None else literal(section.data_dir)
    try:
        rows = load_dataset(section.path, data_dir=folder, split=split)
    except Exception as error:  # of any loader
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ImagesError(f"{section.path}: {split}: {reason}") from error
    for column in (section.image_column, section.label_column):
        if column not in rows.column_names:
            found = ", ".join(rows.column_names)
            raise ImagesError(f"{section.path}: no column {column!r}, but {found}: {_CLASSES}")
    chosen = range(min(count or len(rows), len(rows)))
    if not chosen:
        raise ImagesError(f"{section.path}: {split}: no rows")
    pictures, labels = zip(*(_row(section, rows, split, number) for number in chosen), strict=True)
    names = getattr(rows.features[section.label_column], "names", None) or ()
    return Images(torch.from_numpy(np.stack(pictures)), torch.tensor(labels)), tuple(names)


_CLASSES = (
    "pictures lie in a folder for each class, or images.image_column and images.label_column name"
    " the columns"
)


def _row(
    section: ImagesSection, rows: Any, split: str, number: int
) -> tuple[NDArray[np.uint8], int]:
    """A picture [3, size, size] and its class.

    Raises:
        ImagesError: no picture, or no class.
    """
    where = f"{section.path}: {split}: row {number}"
    try:
        row = rows[number]
        picture = square(row[section.image_column], section)
    except (AttributeError, OSError, ValueError) as error:  # no picture; Pillow's
        raise ImagesError(f"{where}: no picture that can be read: {error}") from error
    label = row[section.label_column]
    if not isinstance(label, int) or label < 0:
        raise ImagesError(f"{where}: its class is {label!r}, no number from 0: {_CLASSES}")
    return picture, label


def square(picture: Any, section: ImagesSection) -> NDArray[np.uint8]:
    """The shorter side resized to size / crop_ratio, the middle cut out: [3, size, size]."""
    from PIL import Image

    size, seen = section.size, section.pictures
    side = math.floor(size / seen.crop_ratio)
    width, height = picture.size
    scale = side / min(width, height)
    resized = picture.convert("RGB").resize(
        (max(side, int(width * scale)), max(side, int(height * scale))),
        Image.Resampling[seen.interpolation.upper()],
    )
    left, top = ((length - size) // 2 for length in resized.size)
    cut = resized.crop((left, top, left + size, top + size))
    return np.asarray(cut, np.uint8).transpose(2, 0, 1)
