"""Store the calibrated state of a model, so that a second export or run does not calibrate again.

The folder has one file for each tensor-, pipeline- and expert-parallel rank. It holds the modes of Model Optimizer that
were applied, the settings and tensors of every quantizer, the weights that calibration changed (AWQ and SmoothQuant
scale them), the report, and a fingerprint of everything that the result depends on. Reading it executes no code
(`tensor_file`).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from safetensors import SafetensorError

import modelopt.torch.opt as mto
from modelopt.torch.opt.mode import _ModeRegistryCls
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer
from nemo_modelopt_dropin import files, locks

from ... import _parallel, _staging, tensor_file
from ...errors import ModelOptConfigError
from ..insert import gated_amax, kv_cache
from . import fingerprint

KIND = files.CALIBRATION_STATE
_SHOWN = 3
# The modes of Model Optimizer that a calibrated state may contain.
_MODES = "modelopt.torch.quantization."


class StateKeeper:
    """Saves the calibrated state of the model that a ``Quantizer`` quantized last, and uses stored states."""

    def __init__(self) -> None:
        """Start without a model and without a stored state."""
        self._stamp: dict[str, Any] | None = None
        self._modes_before = 0
        self._core: Any = None
        self._requested: Path | None = None

    def request(self, path: str | Path) -> None:
        """Make the next `reuse` use the state in a folder.

        Raises:
            ModelOptConfigError: If there is no such folder.
        """
        if not Path(path).is_dir():
            raise ModelOptConfigError(f"load_state: there is no folder {path}; save_state writes one.")
        self._requested = Path(path)

    def reuse(self, core: torch.nn.Module, settings: dict[str, Any], kept: str | None) -> dict[str, Any] | None:
        """Quantize the model from a stored state, if there is one for it, and return the report stored with it.

        Args:
            core: The original model. A later `save` compares with its weights.
            settings: The settings of this run, see `fingerprint.settings_of`.
            kept: The folder in which the state of an earlier run may have been kept, or None.

        Raises:
            ModelOptConfigError: If ``kept`` holds something else, or the requested state is from another run.
        """
        if kept is not None:
            check_folder(kept, "calibration_state")
        self._stamp = {**settings, **fingerprint.layout(), "model": fingerprint.describe_model(core)}
        self._modes_before = _mode_count(core)
        self._core = weakref.ref(core)
        requested, self._requested = self._requested, None
        if requested is None and (kept is None or not any_rank_sees(Path(kept))):
            return None
        path = Path(requested or str(kept))
        try:
            content = read(path, self._stamp)
        except ModelOptConfigError as error:
            if requested is not None:
                raise ModelOptConfigError(f"{error} Without load_state, quantize calibrates.") from error
            logging.warning(f"Calibrating again: {error}")
            return None
        restore(core, content)
        logging.info(f"The calibrated state is read from {path}: nothing is calibrated.")
        return dict(content["report"])

    def save(self, path: str | Path, core: torch.nn.Module | None, report: dict[str, Any]) -> None:
        """Write the state of the quantized model into a folder, completely or not at all.

        Args:
            path: The folder, see ``Quantizer.save_state``.
            core: The model that was passed to `reuse`, None for the last one.
            report: The report to store with it.

        Raises:
            ModelOptConfigError: If this is not the model, or the folder holds something else.
            ExportError: On the ranks that succeeded, when another rank failed.
        """
        last = self._core() if self._core is not None else None
        core = last if core is None else core
        if self._stamp is None or core is None or core is not last:
            raise ModelOptConfigError(
                "Quantizer.save_state writes what this Quantizer has calibrated: call quantize(model) first, and pass "
                "the model that it returned (an llm.GPTModel; stand-ins have no state)."
            )
        content = {"fingerprint": self._stamp, "report": report, **capture(core, self._stamp, self._modes_before)}
        check_folder(path, "save_state")
        with _staging.staged(Path(path), KIND) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            if _is_writer():
                tensor_file.save(folder / _file_name(), content)
        if is_global_rank_zero():
            logging.info(f"The calibrated state is stored in {path}.")

    def keep(self, path: str | None, report: dict[str, Any]) -> None:
        """Write the state to the configured folder; if that fails, log a warning and continue.

        Args:
            path: The folder, None to keep nothing.
            report: The report to store with it.
        """
        if path is None:
            return
        try:
            self.save(path, None, report)
        except (OSError, RuntimeError, TypeError, SafetensorError, _staging.ExportError) as error:
            # safetensors raises its own error if the disk is full, and the settings of a user's own quantizers may be
            # objects that only a pickle can hold.
            logging.warning(f"calibration_state: the calibrated state could not be kept in {path}: {error}")

    def forget(self, path: str | None) -> None:
        """Delete the state that was kept for a second attempt.

        Args:
            path: The configured folder, or None.
        """
        if path is not None and self._stamp is not None and is_global_rank_zero():
            with locks.lock(Path(path)):
                files.remove(Path(path), KIND)


def _rank(kind: str) -> int:
    if not parallel_state.model_parallel_is_initialized():
        return 0
    return getattr(parallel_state, f"get_{kind}_model_parallel_rank")()


def _file_name() -> str:
    return f"tp{_rank('tensor')}_pp{_rank('pipeline')}_ep{_rank('expert')}{tensor_file.SUFFIX}"


def check_folder(path: str | Path, setting: str) -> None:
    """Raise an error on all ranks if a folder holds anything but a calibrated state that this package wrote.

    Args:
        path: The folder, which need not exist.
        setting: The setting that names the folder, for the message.

    Raises:
        ModelOptConfigError: With the content of the folder and what to do.
    """
    problems = [text for text in _parallel.gather_objects(files.problem(Path(path), KIND)) if text]
    if problems:
        raise ModelOptConfigError(f"{setting}: {problems[0]}.")


def _is_writer() -> bool:
    """Return whether this rank writes for its data-parallel replicas."""
    if not parallel_state.model_parallel_is_initialized():
        return True
    if fingerprint.size("expert") > 1:
        return parallel_state.get_expert_data_parallel_rank() == 0
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


def any_rank_sees(path: Path) -> bool:
    """Return whether the folder exists for any rank."""
    return any(_parallel.gather_objects(path.is_dir()))


def _mode_count(core: torch.nn.Module) -> int:
    converted = mto.ModeloptStateManager.is_converted(core)
    return len(mto.ModeloptStateManager(core).state_dict()) if converted else 0


def _quantizers(core: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in core.named_modules():
        if isinstance(module, (TensorQuantizer, SequentialQuantizer)):
            yield name, module


def capture(core: torch.nn.Module, stamp: dict[str, Any], modes_before: int) -> dict[str, Any]:
    """Return, on the host, the difference between the calibrated and the original model.

    Args:
        core: The calibrated Megatron-Core model.
        stamp: The fingerprint taken before calibration.
        modes_before: The number of Model Optimizer's modes that the original model had.
    """
    modes = mto.modelopt_state(core)["modelopt_state_dict"][modes_before:]
    now = fingerprint.describe_model(core)
    changed = {name for name, text in stamp["model"].items() if now.get(name) != text}
    quantizers = {}
    for name, module in _quantizers(core):
        tensors = {**module._parameters, **module._buffers}
        quantizers[name] = (module.get_modelopt_state(), {k: v.detach().cpu() for k, v in tensors.items()})
    return {
        "modes": [(name, copy.deepcopy(state["config"])) for name, state in modes],
        "quantizers": quantizers,
        "weights": {name: value.detach().cpu() for name, value in core.named_parameters() if name in changed},
        "kv_cache": any("bmm_quantizer" in name for name in quantizers),
    }


def read(path: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """Return this rank's part of a stored state.

    Args:
        path: The folder.
        stamp: The fingerprint of this run.

    Raises:
        ModelOptConfigError: On all ranks, if the file of one rank cannot be read or belongs to another run.
    """
    content, problem = _read_file(path / _file_name(), stamp)
    problems = [text for text in _parallel.gather_objects(problem) if text]
    if problems:
        raise ModelOptConfigError(f"The calibrated state in {path} cannot be used: {problems[0]}")
    return content


def _read_file(file: Path, stamp: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    if not file.is_file():
        others = sorted(other.name for other in file.parent.iterdir() if other.name != files.MARKER)
        if any(name.endswith(".pt") for name in others):
            return {}, f"{others} were written by torch.save: reading them can run any code. Delete them."
        return {}, f"it has no {file.name} but {others}: it was written in another parallel layout."
    try:
        content = tensor_file.load(file)
        saved = dict(content["fingerprint"])
    except ModelOptConfigError as error:
        return {}, str(error)
    except (OSError, TypeError, KeyError, ValueError) as error:
        return {}, f"{file.name} cannot be read ({type(error).__name__}: {error})."
    changed = fingerprint.differences(saved, stamp)
    if not changed:
        return content, None
    more = f" (and {len(changed) - _SHOWN} more)" if len(changed) > _SHOWN else ""
    return {}, f"it belongs to another run: {'; '.join(changed[:_SHOWN])}{more}."


def restore(core: torch.nn.Module, content: dict[str, Any]) -> None:
    """Turn the original model into the calibrated one, in place.

    Model Optimizer inserts the quantizers without calibrating. Its own restoring would then apply scales to the weights
    before the scales are loaded, so the settings and tensors are set here.
    """
    manager = mto.ModeloptStateManager(core, init_state=not mto.ModeloptStateManager.is_converted(core))
    manager.update_last_state_before_new_mode(core)
    with kv_cache.attention_support(content["kv_cache"]):
        for name, config in content["modes"]:
            mode = _ModeRegistryCls.get_from_any(name)
            if not type(mode).__module__.startswith(_MODES):
                raise ModelOptConfigError(f"The calibrated state names {name!r}, which is not a quantization mode.")
            typed = manager.get_config_class(name, config)
            mode.restore(core, typed, {})
            manager.add_mode(mode, typed, {})
    _shape_sequences(core, content["quantizers"])
    device = _parallel.device_of(core)
    present = dict(_quantizers(core))
    if set(present) != set(content["quantizers"]):
        odd = sorted(set(present) ^ set(content["quantizers"]))
        raise ModelOptConfigError(f"The calibrated state has other quantizers than this model: {odd[:_SHOWN]}.")
    for name, (settings, tensors) in content["quantizers"].items():
        if isinstance(present[name], TensorQuantizer):
            _fill(present[name], settings, tensors, device)
    parameters = dict(core.named_parameters())
    with torch.no_grad():
        for name, value in content["weights"].items():
            parameters[name].copy_(value)
    gated_amax.mend(core)


def _shape_sequences(core: torch.nn.Module, stored: dict[str, tuple]) -> None:
    """Make each quantizer have as many steps as the stored one: mixed precision chooses this for each layer."""
    for name, (settings, _) in stored.items():
        parent = core.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if leaf.isdigit():
            continue
        own = getattr(parent, leaf, None)
        steps = settings.get("num_quantizers") if settings.get("is_sequential_quantizer") else None
        if steps and not (isinstance(own, SequentialQuantizer) and len(own) == steps):
            setattr(parent, leaf, SequentialQuantizer(*(TensorQuantizer() for _ in range(steps))))
        elif steps is None and isinstance(own, SequentialQuantizer):
            setattr(parent, leaf, TensorQuantizer())


def _fill(quantizer: Any, settings: dict[str, Any], tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    if settings.get("_is_nvfp4_static_quantizer"):
        from modelopt.torch.quantization.nn import NVFP4StaticQuantizer

        if not isinstance(quantizer, NVFP4StaticQuantizer):
            NVFP4StaticQuantizer.from_tensor_quantizer(quantizer)
    quantizer.set_from_modelopt_state(settings)
    for name, value in tensors.items():
        if name in quantizer._parameters:
            quantizer._parameters[name] = torch.nn.Parameter(value.to(device), requires_grad=False)
        else:
            quantizer.register_buffer(name, value.to(device))
