"""What depends on the versions that the tests run on: `scripts/test_compat.py` puts others first on the path."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from nemo_modelopt_dropin import versions

# The folder of nemo-toolkit; elsewhere than the rest where another version was put first on the path.
NEMO = Path(str(metadata.distribution("nemo-toolkit").locate_file("")))
# modelopt 0.37 loses KV-cache quantizers of Megatron's own attention: there the option raises an error.
KV_CACHE = Version(metadata.version("nvidia-modelopt")) >= Version("0.43")
since_0_43 = pytest.mark.skipif(not KV_CACHE, reason="modelopt 0.37 lacks what this test compares with or needs")
# It also prunes no model with learned positions.
LEARNED_POSITIONS_PRUNE = KV_CACHE
# Nor experts, and no hidden size of a model with experts.
EXPERTS_PRUNE = KV_CACHE
# Its search for mixed precision has no parallel ranks: algorithm="auto" raises an error.
AUTO = KV_CACHE
# From 0.46, its writer of Hugging Face checkpoints names a class of Megatron's hybrid models even where it is absent.
OWN_WRITER_RUNS = (
    Version(metadata.version("nvidia-modelopt")) < Version("0.46")
    or Path(str(metadata.distribution("megatron-core").locate_file("megatron/core/models/hybrid"))).exists()
)
# Megatron has sliding windows and other kinds of softmax in its own attention from 0.15, before in that of TE only.
LOCAL_WINDOWS = Version(metadata.version("megatron-core")) >= Version("0.15")
local_windows = pytest.mark.skipif(
    not LOCAL_WINDOWS, reason="megatron-core 0.14 has windows in Transformer Engine only"
)
_WINDOWED = ("mistral-window", "gemma-2", "gemma-3", "phi-3", "starcoder-2", "gpt-oss")
formats_at_construction = pytest.mark.skipif(
    Version(metadata.version("nemo-toolkit")) < Version("2.6"),
    reason="NeMo 2.5 takes models of transformers too, whose formats are known only in `quantize`",
)
# modelopt 0.37 takes a model in NeMo's wrapper, which later ones refuse.
WRAPPED_PRUNE = not KV_CACHE
# Its FP8 quantizer divides by an amax of zero: a tensor of zeros becomes NaN in memory, before any export.
fp8_zeros = pytest.mark.xfail(not KV_CACHE, reason="modelopt 0.37 makes NaN of zeros in FP8", strict=True)
# Stock reads modelopt's presets as dictionaries; they are lists from 0.44. It also imports all of the pruning by name.
STOCK_QUANTIZES = Version(metadata.version("nvidia-modelopt")) < Version("0.44")
stock_quantizes = pytest.mark.xfail(
    not STOCK_QUANTIZES, reason="stock cannot quantize with this modelopt, whose presets are lists", strict=True
)
prunes = pytest.mark.skipif(bool(versions.pruning_problem()), reason=versions.pruning_problem() or "")
_DROPS_PROBLEM = versions.pruning_problem(by_importance=False)
drops = pytest.mark.skipif(bool(_DROPS_PROBLEM), reason=_DROPS_PROBLEM or "")
stock_prunes = pytest.mark.xfail(
    bool(versions.pruning_problem()), reason="stock cannot prune with this modelopt", strict=True
)
KV_CACHE_REFUSAL = r"enable_kv_cache=True: modelopt 0\.\d+\.\d+ cannot keep KV-cache quantizers .*modelopt 0\.43"


def need_pruning() -> None:
    """Skip a test whose fixture prunes if the installed modelopt cannot."""
    if problem := versions.pruning_problem():
        pytest.skip(problem)


def has_preset(algorithm: str) -> bool:
    """Return whether the installed modelopt has the preset of an algorithm, if it needs one."""
    import modelopt.torch.quantization as mtq

    from nemo_modelopt_dropin.preflight import algorithms

    preset = algorithms.TABLE[algorithm].preset
    return preset is None or hasattr(mtq, preset)


def need_preset(algorithm: str) -> None:
    """Skip a test whose algorithm needs a preset that the installed modelopt lacks; it raises an error there."""
    if not has_preset(algorithm):
        pytest.skip(f"this modelopt has no preset for {algorithm}")


def need_family(name: str, entries: Iterable[str] = ()) -> None:
    """Skip a test of a family, with these entries of its configuration, that the installed NeMo cannot build here."""
    from nemo.collections import llm
    from test_code.families import models

    missing = [one for one in models.FAMILIES[name].nemo if not hasattr(llm, one)]
    if missing:
        pytest.skip(f"this NeMo has no {missing[0]}")
    if not LOCAL_WINDOWS and (name in _WINDOWED or "sliding_window" in entries):
        pytest.skip("megatron-core 0.14 has sliding windows in Transformer Engine only")


def is_stock(path: str | Path) -> bool:
    """Return whether a file or folder belongs to nemo-toolkit."""
    return Path(path).is_relative_to(NEMO / "nemo")
