"""Names of an artifact's files. Who needs no more than these needs no onnx, which is an extra."""

MODEL, MANIFEST = "model.onnx", "manifest.json"
