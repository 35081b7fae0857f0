"""Names of NeMo that another module holds in another of the versions we support."""

from __future__ import annotations

import importlib
from typing import Any

# Name -> modules, the default version's first.
_HOMES = {
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
    """Return what NeMo calls ``name``, from the module that holds it in the installed version.

    Raises:
        ImportError: If none of the modules that are known to have held it does.
    """
    for module in _HOMES[name]:
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            # If a module exists but one of its own dependencies is missing, that error must be seen.
            if error.name is None or not module.startswith(error.name):
                raise
    raise ImportError(f"This version of nemo-toolkit has {name} in none of {', '.join(_HOMES[name])}.")
