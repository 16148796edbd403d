"""The data sets of a calibration in words, for the report."""

from collections.abc import Mapping
from typing import Any

from dpq_core.data.texts import label_of
from dpq_core.recipe import CalibrationSection, TextDataset


def data_sets(section: CalibrationSection, manifest: Mapping[str, Any]) -> dict[str, str]:
    """By heading: those of Hessians with their windows where they are several, and that of scales
    where it is another. manifest: of the checkpoint."""
    several = len(section.windows_of) > 1
    named = [_named(*each) if several else _named(each[0]) for each in section.windows_of]
    said = {"data": "; ".join(named)}
    if own := section.activations:
        tokens = manifest["calibration"]["scale_tokens"]
        said["activations' scales from"] = f"{_named(own.dataset)}, {tokens:,} tokens"
    return said


def _named(dataset: TextDataset, windows: int | None = None) -> str:
    said = f"{label_of(dataset)}, split {dataset.split}"
    if dataset.messages_column is not None:
        said += f", {dataset.messages_column!r} by the chat template"
    return said if windows is None else f"{said}, {windows} windows"
