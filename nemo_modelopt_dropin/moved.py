"""Find functions of NeMo that are in different modules in the supported versions."""

from __future__ import annotations

import importlib
from typing import Any

# Name -> modules, that of the default version first.
_MODULES = {
    "average_losses_across_data_parallel_group": (
        "nemo.utils.megatron_utils",
        "nemo.collections.nlp.modules.common.megatron.utils",  # 2.5
    ),
    "get_tokenizer": (
        "nemo.collections.common.tokenizers.tokenizer_utils",
        "nemo.collections.nlp.modules.common.tokenizer_utils",  # 2.5
    ),
}


def find(name: str) -> Any:
    """Return a function of NeMo from the module that contains it in the installed version.

    Raises:
        ImportError: If none of the known modules contains it.
    """
    for module in _MODULES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            # An existing module that lacks one of its own dependencies must raise its own error.
            if error.name is None or not module.startswith(error.name):
                raise
    raise ImportError(f"This version of nemo-toolkit has {name} in none of {', '.join(_MODULES[name])}.")
