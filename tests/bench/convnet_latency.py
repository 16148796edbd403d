"""Files in integers beside float ones at the sizes that are served: pictures of 224 × 224.

    python tests/bench/convnet_latency.py [--runs 30]

Networks of transformers with weights drawn at random (time does not ask what they are), quantized
as `dpq convnet` does it: 8/8 bits, a scale per channel. One thread; float and integer in turn.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from dpq_core.convnet.artifact import save_classifier
from dpq_core.convnet.executor import Classifier, latencies
from dpq_core.convnet.images import Images
from dpq_core.convnet.networks import build_network
from dpq_core.convnet.quantize import post_training
from dpq_core.convnet.recipe import CalibrationSection, ConvScheme, NetworkSection
from dpq_core.convnet.train import seeded

SHAPE = (3, 224, 224)
CLASSES = 1000
BATCHES = (1, 32)
NETWORKS = {
    "ResNet-18": {
        "model_type": "resnet",
        "layer_type": "basic",
        "hidden_sizes": [64, 128, 256, 512],
        "depths": [2, 2, 2, 2],
    },
    "ResNet-50": {"model_type": "resnet"},
    "MobileNet-V1": {"model_type": "mobilenet_v1"},
    "MobileNet-V2": {"model_type": "mobilenet_v2"},
}


def measure(config: dict[str, object], runs: int) -> list[dict[str, float]]:
    """A row a batch size."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (max(BATCHES), *SHAPE), generator=generator).to(torch.uint8)
    pictures = Images(pixels, torch.zeros(len(pixels), dtype=torch.long))
    calibration = CalibrationSection(batches=2, batch_size=8)
    with seeded(0), tempfile.TemporaryDirectory() as folder:
        network = build_network(NetworkSection(kind="transformers", config=config), SHAPE, CLASSES)
        models = {}
        for name, scheme in (
            ("float", ConvScheme(weights=None, activations=None)),
            ("int8", ConvScheme()),
        ):
            (made := Path(folder) / name).mkdir()
            graph = post_training(network, pictures, scheme, calibration)
            save_classifier(made, graph, pictures.inputs(slice(2)), {})
            models[name] = Classifier(made)
        return [
            {"batch": batch, **latencies(models, pictures.inputs(slice(batch)), runs)}
            for batch in BATCHES
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| network | images | float ms | INT8 ms | speed-up |")
    print("|---|---|---|---|---|")
    for name, config in NETWORKS.items():
        for row in measure(config, arguments.runs):
            faster = row["float"] / row["int8"]
            print(
                f"| {name} | {row['batch']} | {row['float']:.1f} | {row['int8']:.1f}"
                f" | {faster:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
