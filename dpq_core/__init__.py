"""Quantization and its measurement; knows no pipeline."""

import logging

# transformers imports torchao, which warns of kernels for hardware that is not here, and torch of
# how torchao registers its types; torch sets its loggers' levels itself.
logging.getLogger("torchao").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").addFilter(lambda record: record.levelno >= logging.ERROR)
