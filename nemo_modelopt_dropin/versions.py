"""Check that the installed versions are supported."""

from __future__ import annotations

import importlib.util
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.version import Version

# distribution -> (first supported, first unsupported, why the upper bound)
SUPPORTED = {
    "nemo-toolkit": ("2.5.3", "2.8", "nemo-toolkit dropped its LLM collection after 2.7.3"),
    "megatron-core": ("0.14", "0.16", "NeMo passes an optimizer the no_weight_decay_cond that 0.16 removed"),
    "nvidia-modelopt": ("0.37", "0.48", "later versions have not been tested"),
}
# From these versions of modelopt, its pruning imports Transformer Engine, in whose fused layers only it measures
# importance, and a module that the first megatron-core after the supported ones has.
_PRUNING_NEEDS_ENGINE = "0.44"
_PRUNING_NEEDS_MEGATRON = "0.46"


class UnsupportedVersionError(ImportError):
    """An installed package is outside the range that was tested with this package."""


def check(installed: dict[str, str | None] | None = None) -> None:
    """Raise an error if nemo-toolkit, megatron-core or nvidia-modelopt is missing or unsupported.

    Args:
        installed: Version of each distribution (None if it is not installed); read from the environment by default.

    Raises:
        UnsupportedVersionError: With every unsupported version, the supported range, the reason and how to use stock.
    """
    from packaging.version import Version

    if installed is None:
        installed = {name: installed_version(name) for name in SUPPORTED}
    problems = []
    for name, (low, high, why) in SUPPORTED.items():
        found = installed.get(name)
        if found is None:
            problems.append(f"{name} is not installed (supported: >={low},<{high})")
        # Containers have release candidates and local builds, which count as the version that they precede.
        elif base(found) < Version(low):
            problems.append(f"{name} {found} is installed (supported: >={low},<{high})")
        elif base(found) >= Version(high):
            problems.append(f"{name} {found} is installed (supported: >={low},<{high}; {why})")
    problems += _conflicts(installed)
    if problems:
        raise UnsupportedVersionError(
            "nemo-modelopt-dropin cannot serve nemo.collections.llm.modelopt: "
            + "; ".join(problems)
            + ". Install a supported version, or set NEMO_MODELOPT=stock to use nemo-toolkit's own subpackage."
        )


def pruning_problem(
    modelopt: str | None = None, has_engine: bool | None = None, by_importance: bool = True
) -> str | None:
    """Return why the installed nvidia-modelopt cannot prune Megatron's models, and which one can; None if it can.

    Args:
        modelopt: Its version; read from the environment by default.
        has_engine: Whether Transformer Engine is installed; looked up by default.
        by_importance: Whether importance is measured; False: given layers are dropped.
    """
    from packaging.version import Version

    found = modelopt or installed_version("nvidia-modelopt")
    if found is None or base(found) < Version(_PRUNING_NEEDS_ENGINE):
        return None
    if has_engine is None:
        has_engine = importlib.util.find_spec("transformer_engine") is not None
    if base(found) >= Version(_PRUNING_NEEDS_MEGATRON):
        reason = "imports a module of Megatron (megatron.core.ssm.gated_delta_net) that megatron-core before 0.16 lacks"
    elif not has_engine:
        reason = "imports Transformer Engine, which is not installed"
    elif by_importance:
        reason = (
            "measures importance in Transformer Engine's fused layers only, and NeMo restores a checkpoint into layers "
            "in which norm and linear are separate"
        )
    else:
        return None
    others = "" if by_importance else ", or 0.44 or 0.45" + ("" if has_engine else " with Transformer Engine")
    return f"the pruning of nvidia-modelopt {found} {reason}. Install nvidia-modelopt 0.43{others}."


def _conflicts(installed: dict[str, str | None]) -> list[str]:
    """Return the combinations of supported versions that do not work together."""
    from packaging.version import Version

    nemo, megatron = installed.get("nemo-toolkit"), installed.get("megatron-core")
    if nemo and megatron and base(nemo) < Version("2.6") and base(megatron) >= Version("0.15"):
        return [
            f"nemo-toolkit {nemo} needs megatron-core <0.15 and {megatron} is installed: it imports a class that 0.15 "
            "removed"
        ]
    return []


def base(version: str) -> Version:
    """Return a version without the part that marks a release candidate or a local build."""
    from packaging.version import Version

    return Version(Version(version).base_version)


def installed_version(name: str) -> str | None:
    """Return the version of a distribution, None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
