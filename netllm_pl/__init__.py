"""Adapts one frozen large language model to many networking tasks."""

import logging

__version__ = "0.1.0"

# With the extra `quantize`, importing transformers brings these, which log what this machine has no kernels for.
for _library in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)
