"""Windows of images and texts, for the calibration of models that read both.

Each row of a data set, an image and a text, becomes a document as the model's chat template writes
it: a user's turn with the image before the text. The image token is repeated once for each feature
that the vision tower gives, as Qwen2-VL's processor does. Documents fill windows of at most
`sequence_length` tokens; an image is never cut. Rows are taken in an order that is spread over the
whole data set wherever it stops, so that a set sorted by class shows all classes.

The image processor is the checkpoint's own (`preprocessor_config.json`), on Pillow, whose results
do not depend on what else is installed. transformers' combined processor is not used: it wants
torchvision, for videos.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, PreTrainedTokenizerBase

from dpq_core.data.texts import DataError, label_of, open_rows
from dpq_core.model.inputs import ModelInputs
from dpq_core.model.reader import CheckpointError, read_config
from dpq_core.recipe import CalibrationSection

_GOLDEN = (5**0.5 - 1) / 2


def image_windows(
    section: CalibrationSection, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> list[ModelInputs]:
    """At most `section.samples` windows and `section.unseen` more, each the inputs of one call of
    the model.

    Args:
        section: with an `image_column`. folder: of the checkpoint.

    Raises:
        DataError: rows without an image or a text, or an image that fills more than a window.
        CheckpointError: no usable image processor, or no image token.
    """
    dataset, column = section.dataset, section.image_column
    assert column is not None
    documents = _Documents(folder, tokenizer, section.sequence_length)
    windows: list[_Window] = []
    with open_rows(dataset, dataset.text_column, column) as rows:
        for number in _spread(len(rows)):
            where = f"{label_of(dataset)}: row {number}"
            try:
                row = rows[number]
            except (OSError, ValueError) as error:  # Pillow's
                raise DataError(f"{where}: no image that can be read: {error}") from error
            image, text = row[column], _text(rows, dataset.text_column, row)
            if not hasattr(image, "convert") or text is None:
                kinds = [type(row[name]).__name__ for name in (column, dataset.text_column)]
                raise DataError(f"{where}: {' and '.join(kinds)}, not an image and a text")
            ids, pixels, grid = documents.of(image.convert("RGB"), text, where)
            if not windows or windows[-1].length + len(ids) > section.sequence_length:
                if len(windows) == section.samples + section.unseen:
                    break
                windows.append(_Window())
            windows[-1].add(ids, pixels, grid)
    if not windows:
        raise DataError(f"{label_of(dataset)}: no rows")
    return [window.inputs(documents.image_token) for window in windows]


class _Window:
    """Documents one after another."""

    def __init__(self) -> None:
        self.length = 0
        self._parts: list[tuple[list[int], torch.Tensor, torch.Tensor]] = []

    def add(self, ids: list[int], pixels: torch.Tensor, grid: torch.Tensor) -> None:
        self.length += len(ids)
        self._parts.append((ids, pixels, grid))

    def inputs(self, image_token: int) -> ModelInputs:
        ids = torch.tensor([[token for part, _, _ in self._parts for token in part]])
        return {
            "input_ids": ids,
            "mm_token_type_ids": (ids == image_token).int(),
            "pixel_values": torch.cat([pixels for _, pixels, _ in self._parts]),
            "image_grid_thw": torch.cat([grid for _, _, grid in self._parts]),
        }


class _Documents:
    """Makes documents of rows, with a checkpoint's tokenizer and image processor."""

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, sequence_length: int
    ) -> None:
        self._tokenizer, self._longest = tokenizer, sequence_length
        try:
            self._processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, ImportError) as error:
            said = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise CheckpointError(f"{folder}: no usable image processor: {said}") from error
        config = read_config(folder)
        names = ("vision_start_token_id", "image_token_id", "vision_end_token_id")
        if missing := [name for name in names if not isinstance(config.get(name), int)]:
            raise CheckpointError(f"{folder / 'config.json'}: {missing[0]} is missing")
        self.image_token: int = config["image_token_id"]
        self._image = "".join(tokenizer.convert_ids_to_tokens([config[name] for name in names]))

    def of(self, image: Any, text: str, where: str) -> tuple[list[int], torch.Tensor, torch.Tensor]:
        """Token ids, patches [patches, …] fp32 and their grid [1, 3], cut to the longest length.

        Raises:
            DataError: the image alone is longer.
        """
        found = self._processor(images=[image], return_tensors="pt")
        grid: torch.Tensor = found["image_grid_thw"]
        features = int(grid.prod()) // self._processor.merge_size**2
        ids: list[int] = []
        for token in self._tokenizer(self._written(text), verbose=False).input_ids:
            ids += [token] * (features if token == self.image_token else 1)
        cut = ids[: self._longest]
        if cut.count(self.image_token) != features:
            raise DataError(
                f"{where}: its image takes {features} tokens, too many (or not once) in a window "
                f"of calibration.sequence_length {self._longest}: raise it, or lower the largest "
                "image size in the checkpoint's preprocessor_config.json"
            )
        return cut, found["pixel_values"], grid

    def _written(self, text: str) -> str:
        if getattr(self._tokenizer, "chat_template", None) is None:
            return f"{self._image}{text}"
        content = [{"type": "image"}, {"type": "text", "text": text}]
        messages = [{"role": "user", "content": content}]
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False))


def _spread(count: int) -> Iterator[int]:
    """All of 0 … count − 1, every beginning of it spread evenly (multiples of the golden ratio)."""
    return iter(sorted(range(count), key=lambda number: number * _GOLDEN % 1))


def _text(rows: Any, column: str, row: Any) -> str | None:
    """A row's text; of a class label, its name."""
    value, feature = row[column], rows.features[column]
    if hasattr(feature, "int2str") and isinstance(value, int):
        return str(feature.int2str(value))
    return value if isinstance(value, str) else None
