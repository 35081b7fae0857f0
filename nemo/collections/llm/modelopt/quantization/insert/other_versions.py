"""Restore checkpoints that another version of modelopt wrote.

Three things in a NeMo checkpoint depend on modelopt's version, and modelopt itself reads only its own:

- the settings of its modes in ``weights/modelopt_state``: the fields of its configurations, which must be those of the
  installed version, and the form of a quant_cfg, a dictionary before 0.44 and a list from then on;
- the state of each layer's quantizers among the weights: a plain pickle before 0.44, and what ``torch.save`` writes
  from then on;
- the keys of gated and of experts' weights: from 0.43 their halves and each expert have keys of their own.

A setting that the installed version lacks and that changes numbers raises an error with both versions.
"""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from nemo.utils import logging
from packaging.version import Version
from torch import nn

import modelopt.torch.opt as opt
from modelopt.torch.opt.mode import _ModeRegistryCls
from modelopt.torch.quantization import config as definitions
from modelopt.torch.quantization.nn import QuantModuleRegistry
from nemo_modelopt_dropin import versions

from ... import _functions, _saved_keys
from ...errors import ModelOptConfigError
from .. import quant_cfg_entries

_RESTORE = "restore_from_modelopt_state"
_SET_STATE = "set_extra_state"
# The first version that writes separate keys for the halves of gated weights, and reads both.
_FIRST_WITH_SEPARATE_KEYS = "0.43"
# What a plain pickle of a layer's quantizers may name besides the data types of torch.
_PICKLED = {
    ("collections", "OrderedDict"),
    ("builtins", "slice"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch._utils", "_rebuild_tensor_v2"),
}
# Attributes that no quantizer reads: they are for the search for mixed precision.
_WITHOUT_EFFECT = {"effective_bits"}


def installed() -> str:
    """Return the version of the installed modelopt."""
    return str(versions.installed_version("nvidia-modelopt"))


@contextlib.contextmanager
def restored(weights: Path) -> Iterator[None]:
    """Let modelopt restore what another version of it wrote, inside the context.

    Args:
        weights: The checkpoint's folder of weights.
    """
    original = getattr(opt, _RESTORE)  # perhaps replaced by another context

    def restore(model: nn.Module, modelopt_state: Any = None, *args: Any, **kwargs: Any) -> nn.Module:
        writer = modelopt_state.get("modelopt_version") if isinstance(modelopt_state, Mapping) else None
        if writer is None or _same(writer):
            return original(model, modelopt_state, *args, **kwargs)
        logging.info(f"The checkpoint was written with modelopt {writer}; {installed()} is installed.")
        model = original(model, translated(modelopt_state, weights), *args, **kwargs)
        _read_states(model)
        _saved_keys.ask_as_saved(model, _saved_keys.keys_in(weights))
        return model

    with _functions.replaced(opt, _RESTORE, restore):
        yield


def _same(writer: str) -> bool:
    """Return whether a version's checkpoints are those of the installed one: releases of one minor version."""
    return Version(writer).release[:2] == Version(installed()).release[:2]


def _cannot(weights: Path, writer: str, what: str) -> ModelOptConfigError:
    return ModelOptConfigError(
        f"The checkpoint {weights} was written with modelopt {writer}, and modelopt {installed()} cannot restore it: "
        f"{what}. Install nvidia-modelopt {Version(writer).major}.{Version(writer).minor}."
    )


# --- settings of the modes -------------------------------------------------------------------------------------------


def translated(state: Mapping[str, Any], weights: Path) -> dict[str, Any]:
    """Return a copy of a checkpoint's modelopt state whose settings the installed version takes.

    Args:
        state: What ``weights/modelopt_state`` holds: ``modelopt_version`` and ``modelopt_state_dict``, a list of modes
            with their settings.
        weights: The checkpoint's folder of weights, for messages.

    Raises:
        ModelOptConfigError: If the installed version lacks a mode, or a setting that changes numbers.
    """
    writer = state["modelopt_version"]
    if Version(installed()) < Version(_FIRST_WITH_SEPARATE_KEYS) <= Version(writer):
        raise _cannot(weights, writer, "its weights have keys that later versions introduced")
    modes = []
    for name, mode in state["modelopt_state_dict"]:
        if not _ModeRegistryCls.contained_in_any(name):
            raise _cannot(weights, writer, f"it lacks the mode {name!r}")
        try:
            config = _settings(name, copy.deepcopy(dict(mode["config"])))
        except ValueError as error:  # of ours, and of pydantic
            raise _cannot(weights, writer, str(error).rstrip(".")) from error
        modes.append((name, {**mode, "config": config}))
    return {**state, "modelopt_state_dict": modes, "modelopt_version": installed()}


def _settings(mode: str, config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a mode for the installed version.

    Besides the quant_cfg they record how the model was calibrated, which restoring does not repeat: what the installed
    version lacks or has another type for is left out.

    Raises:
        ValueError: If the quant_cfg has something that the installed version lacks.
    """
    known = _ModeRegistryCls.get_from_any(mode).config_class
    config = {name: value for name, value in config.items() if name in known.model_fields}
    if config.get("quant_cfg"):
        config["quant_cfg"] = _quant_cfg({"quant_cfg": config["quant_cfg"]})
    for name in list(config):
        if name != "quant_cfg" and not _fits(known, {name: config[name]}):
            del config[name]
    known(**config)
    return config


def _fits(known: Any, config: dict[str, Any]) -> bool:
    try:
        known(**config)
    except ValueError as error:
        problems: list[Any] = getattr(error, "errors", list)()
        return not any(set(config) & set(problem["loc"][:1]) for problem in problems)
    return True


def _is_quantized(module_class: str) -> bool:
    """Return whether the installed version quantizes layers of a class, by the name that a quant_cfg has for it."""
    try:
        return QuantModuleRegistry[module_class] is not None
    except KeyError:
        return False


def _quant_cfg(quant_cfg: dict[str, Any]) -> Any:
    def has_effect(entry: quant_cfg_entries.Entry) -> bool:
        return not (entry.disables and entry.module_class and not _is_quantized(entry.module_class))

    listed = quant_cfg_entries.listed(quant_cfg, has_effect)
    found = quant_cfg_entries.native(listed, "its quant_cfg")
    fields = definitions.QuantizerAttributeConfig.model_fields
    for entry in quant_cfg_entries.entries(found):
        for attributes in entry.steps:
            for name in set(attributes) - set(fields):
                if attributes.pop(name) and name not in _WITHOUT_EFFECT:
                    raise ValueError(f"its quant_cfg sets {name!r} for {str(entry)!r}, which that version lacks")
    if quant_cfg_entries.TAKES_LISTS:
        quant_cfg_entries.leave_as_before(found)
    return found["quant_cfg"]


# --- states of the quantizers ----------------------------------------------------------------------------------------


def _read_states(model: nn.Module) -> None:
    """Let each converted layer read the state that another version wrote, which happens twice in a load."""
    for module in model.modules():
        if _SET_STATE in vars(module) and hasattr(module, "modelopt_set_extra_state_callbacks"):
            # A bound method, so that a copy of the module has one of its own.
            setattr(module, _SET_STATE, types.MethodType(_set_state, module))


def _set_state(module: nn.Module, state: Any) -> None:
    """Set the state of a layer's quantizers, from bytes of any version."""
    from modelopt.torch.opt.plugins import megatron

    if isinstance(state, torch.Tensor) and state.numel():
        state = recoded(state)
    megatron._modelopt_set_extra_state(module, state)


def recoded(state: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a layer's state in the form that the installed version reads.

    Args:
        state: Bytes `[n]`, of a plain pickle or of what ``torch.save`` writes.

    Raises:
        ModelOptConfigError: If they name anything but plain data: nothing in them is run.
    """
    content = state.detach().cpu().numpy().tobytes()
    is_pickle = not content.startswith(b"PK")
    if is_pickle is not quant_cfg_entries.TAKES_LISTS:
        return state  # both changed with 0.44
    if is_pickle:
        data, stream = _Data(io.BytesIO(content)).load(), io.BytesIO()
        torch.save(data, stream)
        recoded_bytes = stream.getvalue()
    else:
        recoded_bytes = pickle.dumps(torch.load(io.BytesIO(content), weights_only=True))
    return torch.frombuffer(bytearray(recoded_bytes), dtype=torch.uint8)


def _numbers(content: bytes) -> Any:
    """Return the numbers of a tensor inside a pickle; torch's own function of this purpose would run code in them."""
    return torch.load(io.BytesIO(content), weights_only=True)


class _Data(pickle.Unpickler):
    """Reads pickles of plain data; a name of anything that could run is an error."""

    def find_class(self, module: str, name: str) -> Any:
        found = getattr(torch, name, None) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _numbers
        if (module, name) not in _PICKLED:
            raise ModelOptConfigError(f"The state of a quantizer names {module}.{name}, which is not plain data.")
        return super().find_class(module, name)
