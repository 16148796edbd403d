"""Name a picture's class with a released classifier: needs onnxruntime, Pillow, numpy, no dpq.

python examples/classify.py model.onnx picture.jpg
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

file, picture = sys.argv[1:]
session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
told = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
seen, size = told["pictures"], told["pictures"]["size"]
image = Image.open(picture).convert({1: "L", 3: "RGB"}[seen["channels"]])
scale = int(size / seen["crop_ratio"]) / min(image.size)
image = image.resize(
    [max(size, int(side * scale)) for side in image.size],
    Image.Resampling[seen["interpolation"].upper()],
)
left, top = ((side - size) // 2 for side in image.size)
pixels = np.asarray(image.crop((left, top, left + size, top + size)), np.float32) / 255
x = (pixels.reshape(size, size, -1) - np.float32(seen["mean"])) / np.float32(seen["std"])
(logits,) = session.run(None, {"pixels": x.transpose(2, 0, 1)[None]})
best = int(logits[0].argmax())
print(told["names"][best] if told.get("names") else best)
