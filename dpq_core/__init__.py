"""Quantization and its measurement; knows no pipeline."""

import logging

# transformers imports torchao, which warns of kernels for hardware that is not here, and torch of
# how torchao registers its types.
for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
