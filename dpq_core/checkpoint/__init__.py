"""Checkpoints on disk: ours (`native`), others' read (`importers`) and written (`exports`)."""

from dpq_core.checkpoint.native import (
    QuantizedCheckpoint,
    check_checkpoint,
    load_quantized,
    read_manifest,
    write_checkpoint,
)

__all__ = [
    "QuantizedCheckpoint",
    "check_checkpoint",
    "load_quantized",
    "read_manifest",
    "write_checkpoint",
]
