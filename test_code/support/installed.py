"""What depends on the versions that the tests run on: `scripts/test_compat.py` puts others first on the path."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from packaging.version import Version

# The folder of nemo-toolkit; elsewhere than the rest where another version was put first on the path.
NEMO = Path(str(metadata.distribution("nemo-toolkit").locate_file("")))
# modelopt 0.37 loses KV-cache quantizers of Megatron's own attention: there the option raises an error.
KV_CACHE = Version(metadata.version("nvidia-modelopt")) >= Version("0.43")
# It also prunes no model with learned positions.
LEARNED_POSITIONS_PRUNE = KV_CACHE
# Nor experts, and no hidden size of a model with experts.
EXPERTS_PRUNE = KV_CACHE
# Its search for mixed precision has no parallel ranks: algorithm="auto" raises an error.
AUTO = KV_CACHE
# It takes a model in NeMo's wrapper, which later ones refuse.
WRAPPED_PRUNE = not KV_CACHE
KV_CACHE_REFUSAL = r"enable_kv_cache=True: modelopt 0\.\d+\.\d+ cannot keep KV-cache quantizers .*modelopt 0\.43"


def is_stock(path: str | Path) -> bool:
    """Return whether a file or folder belongs to nemo-toolkit."""
    return Path(path).is_relative_to(NEMO / "nemo")
