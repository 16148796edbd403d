"""Quantization and its measurement; knows no pipeline. By floors, imports going down only:

pipeline, footprint, convnet         the whole in plain Python; what it takes; the second source
verdict, repair, benchmark           what is made of scores, of losses, of times
calibration, evaluation, serving     a model's inputs counted, its scores, its linears made fast
data, checkpoint                     texts and images; bytes on disk
model                                a checkpoint as blocks
layer, machine                       one linear layer quantized; devices and memory
kernels                              the operations that take the time
arithmetic, recipe                   numbers of few bits; what a run is asked for
"""

import logging

# transformers imports torchao, which warns of kernels for hardware that is not here, and torch of
# how torchao registers its types and that torchvision is absent; torch sets its loggers' levels
# itself.
logging.getLogger("torchao").setLevel(logging.ERROR)
for _name in ("torch.utils._pytree", "torch.onnx._internal.exporter._registration"):
    logging.getLogger(_name).addFilter(lambda record: record.levelno >= logging.ERROR)
