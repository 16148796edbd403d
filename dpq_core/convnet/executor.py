"""A classifier as it is deployed: its file, run by onnxruntime.

    "integers"     onnxruntime's kernels: it turns "dequantize → layer → quantize" into one
                   operation on integers, with sums in int32
    "as written"   without any rewriting: products in floating point, and roundings between them

Both are the same network but for the order of roundings. A release counts the held-out images for
which they give different classes: many tell of kernels whose sums saturate. On x86 processors that
multiply bytes without VNNI, pairs of products u8 · s8 are added in 16 bits, which 255 · 127 · 2
exceeds; weights of 7 bits (`reduce_range`) stay within.
"""

import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Literal

import onnx
import onnxruntime
import torch
from torch import Tensor

from dpq_core.convnet.artifact import ArtifactError, read_manifest
from dpq_core.convnet.files import MODEL
from dpq_core.convnet.onnx_file import INPUT
from dpq_core.errors import one_line

How = Literal["integers", "as written"]

_INTEGER = ("QLinearConv", "QGemm", "MatMulInteger", "MatMulIntegerToFloat", "QLinearMatMul")
_FLOATING = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
# It quantizes, per layer, weights that a file holds in floating point between roundings.
_NOT_OF_ITSELF = ["WeightBiasQuantization"]
_WARM_UP = 3  # runs before those that are timed
_OTHER_ANSWERS = 0.02  # of the pictures, at least one: nearly ties, which rounding turns


class Classifier:
    """An artifact, on as many threads as torch has.

    Raises:
        ArtifactError: no artifact, or onnxruntime does not take it.
    """

    def __init__(self, folder: Path, how: How = "integers") -> None:
        read_manifest(folder)
        self._session = _session(folder / MODEL, how)

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 [n, channels, height, width] → logits fp32 [n, classes]."""
        (logits,) = self._session.run(None, {INPUT: x.contiguous().numpy()})
        return torch.from_numpy(logits)


def other_answers(logits: Tensor, others: Tensor) -> int:
    """Pictures that two runs of a classifier, [n, classes] each, do not give the same class."""
    return int((logits.argmax(1) != others.argmax(1)).sum())


def too_many(other: int, pictures: int) -> bool:
    """Whether so many other answers are more than rounding in another order explains."""
    return other > max(_OTHER_ANSWERS * pictures, 1)


def kernel_counts(folder: Path) -> Mapping[str, int]:
    """How many convolutions and linear layers onnxruntime runs in integers, and how many in
    floating point: counted in what it makes of the file."""
    with tempfile.TemporaryDirectory() as made:
        lowered = Path(made) / MODEL
        _session(folder / MODEL, "integers", lowered)
        kinds = Counter(node.op_type for node in onnx.load(lowered).graph.node)
    return {
        "integer": sum(kinds[kind] for kind in _INTEGER),
        "float": sum(kinds[kind] for kind in _FLOATING),
    }


def saturates() -> bool:
    """Whether this processor's products of bytes may saturate: x86 without VNNI."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    here: Mapping[str, Any] = torch.cpu.get_capabilities()
    return not (here.get("avx512_vnni") or here.get("avx_vnni"))


def latencies(
    models: Mapping[str, Callable[[Tensor], Tensor]], x: Tensor, runs: int
) -> dict[str, float]:
    """Median milliseconds of each model on `x`, the models timed in turn so that a busy machine is
    busy for all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for run in range(runs + _WARM_UP):
            for name, model in models.items():
                start = time.perf_counter()
                model(x)
                if run >= _WARM_UP:
                    times[name].append(1e3 * (time.perf_counter() - start))
    return {name: median(values) for name, values in times.items()}


def _session(path: Path, how: How, lowered: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if how == "as written":
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    if lowered is not None:
        options.optimized_model_filepath = str(lowered)
    try:
        return onnxruntime.InferenceSession(
            path,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_NOT_OF_ITSELF,
        )
    except Exception as error:  # of onnxruntime's own kinds
        raise ArtifactError(f"{path}: unreadable: {one_line(error, 300)}") from error
