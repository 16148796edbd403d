"""Checkpoints on disk: ours (`native`, `writing`), read (`importers`) and exported (`exports`)."""

from dpq_core.checkpoint.native import (
    QuantizedCheckpoint,
    check_checkpoint,
    load_quantized,
    read_manifest,
)
from dpq_core.checkpoint.writing import write_checkpoint

__all__ = [
    "QuantizedCheckpoint",
    "check_checkpoint",
    "load_quantized",
    "read_manifest",
    "write_checkpoint",
]
