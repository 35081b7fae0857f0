"""Python imports this module when a process starts, if the folder is in ``PYTHONPATH``; see `test_code.te_on_cpu`."""

import os

# Without this, the package looks for CUDA's libraries when it is imported.
os.environ["NVTE_PROJECT_BUILDING"] = "1"
# TE has attention in PyTorch as well; it is used if the others are switched off.
os.environ.update(NVTE_FLASH_ATTN="0", NVTE_FUSED_ATTN="0", NVTE_MASKED_SOFTMAX_FUSION="0")

from test_code.te_on_cpu import importing  # noqa: E402

importing.install()
