"""A plugin of pytest (``-p test_code.support.simulated_gpus``) that lets torch report GPUs on a machine without any.

``SIMULATED_GPUS`` is their number. Nothing can run on them: the plugin is for collecting tests and for what is decided
before a rank starts. ``CUDA_VISIBLE_DEVICES=""`` hides them, as it hides real ones.
"""

from __future__ import annotations

import os


def _count() -> int:
    return 0 if os.environ.get("CUDA_VISIBLE_DEVICES") == "" else int(os.environ["SIMULATED_GPUS"])


def install() -> None:
    """Answer the questions that tests and libraries ask before they use a GPU."""
    import torch

    torch.cuda.is_available = lambda: _count() > 0
    torch.cuda.device_count = _count


install()
