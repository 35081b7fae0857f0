"""One form for the settings of a quant_cfg, which nvidia-modelopt 0.44 turned from a dictionary into a list.

Before 0.44 ``quant_cfg["quant_cfg"]`` maps wildcards of quantizer names to attributes; "default" comes first wherever
it is, and the name of a module class maps to wildcards of its own. From 0.44 it is an ordered list of entries with
"quantizer_name", "parent_class", "cfg" and "enable". 0.44 to 0.47 convert a dictionary in its own order, so that a
"default" that comes last disables every quantizer. The functions here read both forms, and `native` returns the form
that the installed version takes.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from modelopt.torch.quantization import config as definitions
from modelopt.torch.quantization import nn as quantized_modules

from ..errors import ModelOptConfigError

QuantCfg = dict[str, Any]
DEFAULT = "default"
FIELDS = ("quantizer_name", "parent_class", "cfg", "enable")
# Only versions with lists define the type of an entry.
TAKES_LISTS = hasattr(definitions, "QuantizerCfgEntry")
# From 0.45 a wildcard such as "*weight_quantizer" matches those of embeddings, too; from 0.44 one such as
# "*input_quantizer" those of PyTorch's norms. By class: what a wildcard that means them contains.
_NEWLY_QUANTIZED = {
    name: word
    for name, word, module in (
        ("nn.Embedding", "embed", "quant_embedding"),
        ("nn.LayerNorm", "norm", "quant_layernorm"),
    )
    if importlib.util.find_spec(f"{quantized_modules.__name__}.modules.{module}") is not None
}


@dataclass(frozen=True)
class Entry:
    """One setting: which quantizers it is for, and what it sets.

    Attributes:
        wildcard: Matches names of quantizers; "*" for a dictionary's "default".
        module_class: Name of the class that the quantizer's module must have; None for any.
        steps: Attributes of the quantizer, or of each quantizer of a sequence; empty if only ``enable`` is set. They
            are the objects in the quant_cfg, which change with them.
        enable: Whether the quantizers are enabled; None if it is not set.
    """

    wildcard: str
    module_class: str | None
    steps: tuple[dict[str, Any], ...]
    enable: bool | None

    @property
    def enables(self) -> bool:
        """Return whether a quantizer is enabled, in a sequence at least one."""
        return not self.disables and (not self.steps or any(step.get("enable", True) for step in self.steps))

    @property
    def disables(self) -> bool:
        """Return whether the quantizers are disabled."""
        return self.enable is False

    @property
    def is_default(self) -> bool:
        """Return whether the entry disables every quantizer, as the first entry of most quant_cfgs does."""
        return self.wildcard == "*" and self.module_class is None and self.disables

    def __str__(self) -> str:
        return self.wildcard if self.module_class is None else f"{self.module_class}: {self.wildcard}"


def entries(quant_cfg: Mapping[str, Any]) -> list[Entry]:
    """Return the settings of a quant_cfg in the order in which modelopt applies them; later ones override earlier ones.

    Args:
        quant_cfg: A quant_cfg in either form, already checked (`_quant_cfg_check.check`).
    """
    settings = quant_cfg.get("quant_cfg") or {}
    if isinstance(settings, Mapping):
        return list(_of_dictionary(settings))
    return [_of_entry(entry) for entry in settings]


def _of_dictionary(settings: Mapping[str, Any]) -> Iterator[Entry]:
    if DEFAULT in settings:
        yield _of_setting("*", None, settings[DEFAULT])
    for key, value in settings.items():
        if key == DEFAULT or not isinstance(key, str):
            continue
        if is_by_class(value):
            for wildcard, setting in value.items():
                yield _of_setting("*" if wildcard == DEFAULT else wildcard, key, setting)
        else:
            yield _of_setting(key, None, value)


def _of_setting(wildcard: str, module_class: str | None, setting: Any) -> Entry:
    if isinstance(setting, Mapping):
        only_enable = set(setting) == {"enable"}
        steps: tuple[Any, ...] = () if only_enable else (setting,)
        return Entry(wildcard, module_class, steps, setting.get("enable"))
    return Entry(wildcard, module_class, tuple(setting), None)


def _of_entry(entry: Mapping[str, Any]) -> Entry:
    attributes = entry.get("cfg") or ()
    steps = (attributes,) if isinstance(attributes, Mapping) else tuple(attributes)
    return Entry(entry["quantizer_name"], entry.get("parent_class"), steps, entry.get("enable"))


def is_by_class(setting: Any) -> bool:
    """Return whether a value of a dictionary holds wildcards for one class, such as ``{"nn.Linear": {"*": ...}}``."""
    known = set(definitions.QuantizerAttributeConfig.model_fields)
    return (
        isinstance(setting, Mapping)
        and bool(setting)
        and not known & set(setting)
        and all(isinstance(one, (Mapping, list)) for one in setting.values())
    )


def add(quant_cfg: QuantCfg, wildcard: str, attributes: Mapping[str, Any]) -> None:
    """Set attributes of the quantizers that a wildcard matches, in place.

    In a dictionary, a wildcard that is there keeps its position. In a list, the entry becomes the last.

    Args:
        quant_cfg: The quant_cfg, in either form.
        wildcard: Matches names of quantizers.
        attributes: Attributes of a quantizer, or only ``{"enable": False}``.
    """
    settings = quant_cfg["quant_cfg"]
    if isinstance(settings, dict):
        settings[wildcard] = dict(attributes)
    else:
        settings.append(_as_entry(Entry(wildcard, None, *_split(attributes))))


def _split(attributes: Mapping[str, Any]) -> tuple[tuple[dict[str, Any], ...], bool | None]:
    rest = {name: value for name, value in attributes.items() if name != "enable"}
    return ((rest,) if rest else ()), attributes.get("enable")


def extend(quant_cfg: QuantCfg, other: Mapping[str, Any]) -> None:
    """Add copies of the settings of another quant_cfg of any form, in place.

    In a list, an entry of the other that disables every quantizer is left out: it would come after what is there.
    """
    settings = quant_cfg["quant_cfg"]
    more = entries(copy.deepcopy(dict(other)))
    if not isinstance(settings, dict):
        settings.extend(_as_entry(entry) for entry in more if not entry.is_default)
    elif isinstance(other["quant_cfg"], dict):
        settings.update(copy.deepcopy(other["quant_cfg"]))
    else:
        settings.update(_as_dictionary(more, "quant_cfg"))


def keep(quant_cfg: QuantCfg, wanted: Callable[[str], bool]) -> None:
    """Remove the settings whose wildcards are not wanted, in place."""
    settings = quant_cfg.get("quant_cfg") or {}
    if isinstance(settings, dict):
        for wildcard in [key for key in settings if not wanted(key)]:
            del settings[wildcard]
    else:
        settings[:] = [entry for entry in settings if wanted(entry["quantizer_name"])]


def copy_of(quant_cfg: Mapping[str, Any], wanted: Callable[[str], bool]) -> QuantCfg:
    """Return a copy of a quant_cfg with the settings whose wildcards are wanted."""
    found = copy.deepcopy(dict(quant_cfg))
    keep(found, wanted)
    return found


def disabled(key: str = DEFAULT) -> QuantCfg:
    """Return a new quant_cfg that disables every quantizer, in the form of the installed version.

    Args:
        key: The key in a dictionary. Some functions of modelopt know "*" and no "default".
    """
    return {"quant_cfg": [{"quantizer_name": "*", "enable": False}] if TAKES_LISTS else {key: {"enable": False}}}


def native(quant_cfg: Mapping[str, Any], where: str) -> QuantCfg:
    """Return a copy of a quant_cfg in the form that the installed modelopt takes.

    Args:
        quant_cfg: A quant_cfg in either form, already checked.
        where: Its name in error messages.

    Raises:
        ModelOptConfigError: If it is a list whose meaning no dictionary has, and modelopt is older than 0.44.
    """
    found = copy.deepcopy(dict(quant_cfg))
    is_dictionary = isinstance(found.get("quant_cfg"), dict)
    if "quant_cfg" not in found:  # a preset for the KV cache alone
        return found
    if TAKES_LISTS and is_dictionary:
        found["quant_cfg"] = [_as_entry(entry) for entry in entries(found)]
    elif not TAKES_LISTS and not is_dictionary:
        found["quant_cfg"] = _as_dictionary(entries(found), where)
    return found


def listed(quant_cfg: Mapping[str, Any], wanted: Callable[[Entry], bool]) -> QuantCfg:
    """Return a copy of a quant_cfg of any form as a list of the wanted entries, without fields that are not set."""
    found = entries(copy.deepcopy(dict(quant_cfg)))
    return {**quant_cfg, "quant_cfg": [_as_entry(entry) for entry in found if wanted(entry)]}


def leave_as_before(quant_cfg: QuantCfg) -> None:
    """Keep layers that only later versions of modelopt quantize out of a quant_cfg that does not name them, in place.

    They are embeddings and norms. Readers quantize neither, and a quant_cfg written for earlier versions means neither.

    Args:
        quant_cfg: The quant_cfg, in the form of the installed version.
    """
    known = entries(quant_cfg)
    for module_class, word in _NEWLY_QUANTIZED.items():
        if not any(entry.module_class == module_class or word in entry.wildcard for entry in known):
            quant_cfg["quant_cfg"].append(_as_entry(_off(module_class)))


def left_as_before() -> set[str]:
    """Return the names of the entries that `leave_as_before` may add."""
    return {str(_off(module_class)) for module_class in _NEWLY_QUANTIZED}


def _off(module_class: str) -> Entry:
    return Entry("*", module_class, (), False)


def _as_entry(entry: Entry) -> dict[str, Any]:
    steps = [{name: value for name, value in step.items() if name != "enable"} for step in entry.steps]
    enables = [step["enable"] for step in entry.steps if "enable" in step]
    enable = entry.enable if entry.enable is not None or not enables else all(enables)
    found: dict[str, Any] = {"quantizer_name": entry.wildcard}
    if entry.module_class is not None:
        found["parent_class"] = entry.module_class
    if steps:
        found["cfg"] = steps[0] if len(steps) == 1 else steps
    if enable is not None or not steps:
        found["enable"] = True if enable is None else enable
    return found


def _as_dictionary(listed: Sequence[Entry], where: str) -> dict[str, Any]:
    """Return the dictionary of a list of entries.

    Raises:
        ModelOptConfigError: If a dictionary cannot hold an entry.
    """
    settings: dict[str, Any] = {}
    for number, entry in enumerate(listed):
        if number == 0 and entry.is_default and not entry.steps:
            settings[DEFAULT] = {"enable": False}
            continue
        group = settings
        if entry.module_class is not None:
            if entry.module_class in settings and list(settings)[-1] != entry.module_class:
                raise ModelOptConfigError(
                    f'{where}: entries with "parent_class" {entry.module_class!r} must follow each other with '
                    f"nvidia-modelopt {metadata.version('nvidia-modelopt')}; from 0.44 they need not."
                )
            group = settings.setdefault(entry.module_class, {})
        group.pop(entry.wildcard, None)
        group[entry.wildcard] = _as_setting(entry, [step for one in listed[:number] for step in one.steps], where)
    return settings


def _as_setting(entry: Entry, earlier: Sequence[Mapping[str, Any]], where: str) -> Any:
    """Return the value of a dictionary for an entry.

    An entry of a list replaces all attributes, one of a dictionary those that it names. So it also names what earlier
    entries set, and the axis, which modelopt sets in weight quantizers of linear layers.
    """
    if not entry.steps and entry.enable is not False:
        raise ModelOptConfigError(
            f'{where}: "enable" alone for {str(entry)!r} needs nvidia-modelopt 0.44, and '
            f'{metadata.version("nvidia-modelopt")} is installed; add "cfg" with the attributes of the quantizer.'
        )
    if not entry.steps:
        return {"enable": False}
    fields = definitions.QuantizerAttributeConfig.model_fields
    unset = {name: fields[name].get_default() for step in ({"axis": None}, *earlier) for name in step if name in fields}
    # Attributes in a dictionary do not enable a quantizer that an earlier entry disabled.
    steps = [{**unset, **step, "enable": not entry.disables} for step in entry.steps]
    return steps[0] if len(steps) == 1 else steps
