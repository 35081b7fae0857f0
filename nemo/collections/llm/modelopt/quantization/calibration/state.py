"""Keep the calibrated state of a model on disk, so that a second export or run does not calibrate again.

A folder holds one file for each tensor-, pipeline- and expert-parallel rank: the modes of Model Optimizer that were
applied, the settings and tensors of every quantizer, the weights that calibration changed (AWQ and SmoothQuant scale
them), the report, and a fingerprint of everything that the result depends on. Reading it runs no code (`tensor_file`).
"""

from __future__ import annotations

import abc
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
from nemo.collections.llm.modelopt import tensor_file
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization.calibration import fingerprint
from nemo.collections.llm.modelopt.quantization.calibration import steps as flow
from nemo.collections.llm.modelopt.quantization.export import support
from nemo.collections.llm.modelopt.quantization.insert import gated_amax, kv_cache
from nemo_modelopt_dropin import files, locks

KIND = files.CALIBRATION_STATE
_SHOWN = 3
# What Model Optimizer may be asked to apply: its other modes have no place in a calibrated state.
_MODES = "modelopt.torch.quantization."


class StateKeeper(abc.ABC):
    """What a ``Quantizer`` can do with its calibrated state."""

    quantization_config: Any
    report: dict[str, Any]
    _stamp: dict[str, Any] | None = None
    _modes_before: int = 0
    _quantized: Any = None
    _pending: Path | None = None

    def save_state(self, path: str | Path, model=None) -> None:
        """Write the calibrated state of a quantized model into a folder, whole or not at all.

        Args:
            path: The folder, one that all ranks see. An older state in it is replaced; a folder that holds anything
                else raises an error.
            model: What `quantize` returned; by default the last model it did return.

        Raises:
            ModelOptConfigError: If this quantizer has not quantized the model, or the folder holds something else.
            ExportError: On the ranks that succeeded, when another rank failed.
        """
        last = self._quantized() if self._quantized is not None else None
        core = last if model is None else flow.tools().unwrap_for_modelopt_operations(model)
        if self._stamp is None or core is None or core is not last:
            raise ModelOptConfigError(
                "Quantizer.save_state keeps what this Quantizer has calibrated: call quantize(model) first, and give "
                "the model that it returned (an llm.GPTModel; stand-ins have no state)."
            )
        content = {"fingerprint": self._stamp, "report": self.report, **capture(core, self._stamp, self._modes_before)}
        check_folder(path, "save_state")
        with support.staged(Path(path), KIND) as folder:
            folder.mkdir(parents=True, exist_ok=True)
            if _is_writer():
                tensor_file.save(folder / _file_name(), content)
        if is_global_rank_zero():
            logging.info(f"The calibrated state is kept in {path}.")

    def load_state(self, path: str | Path, model=None):
        """Quantize from a stored state in place of calibrating.

        The data behind a forward loop of your own, or in an iterator, cannot be compared with what it was.

        Args:
            path: The folder that `save_state` wrote.
            model: The original model, which is quantized at once; without it the next `quantize` uses the state.

        Returns:
            The quantized model, None without one.

        Raises:
            ModelOptConfigError: If there is no state, or it belongs to another model, algorithm, data or layout.
        """
        if not Path(path).is_dir():
            raise ModelOptConfigError(f"load_state: there is no folder {path}; save_state writes one.")
        self._pending = Path(path)
        return None if model is None else self.quantize(model)

    @abc.abstractmethod
    def quantize(self, model, forward_loop=None):
        """See ``Quantizer.quantize``."""

    def _begin(self, core: torch.nn.Module, settings: dict[str, Any]) -> bool:
        """Take a state that was asked for, before anything is calibrated; return whether there was one.

        Raises:
            ModelOptConfigError: If the folder to keep a state in holds something else, or a state that was passed to
                `load_state` is not of this run.
        """
        kept = self.quantization_config.calibration_state
        if kept is not None:
            check_folder(kept, "calibration_state")
        self._stamp = {**settings, **fingerprint.layout(), "model": fingerprint.describe_model(core)}
        self._modes_before = _mode_count(core)
        self._quantized = weakref.ref(core)
        asked, self._pending = self._pending, None
        if asked is None and (kept is None or not any_rank_sees(Path(kept))):
            return False
        path = Path(asked or kept)
        try:
            content = read(path, self._stamp)
        except ModelOptConfigError as error:
            self._unless_automatic(asked, error)
            return False
        restore(core, content)
        self.report = dict(content["report"])
        logging.info(f"The calibrated state was taken from {path}: nothing was calibrated.")
        return True

    @staticmethod
    def _unless_automatic(asked: Path | None, error: ModelOptConfigError) -> None:
        if asked is not None:
            raise ModelOptConfigError(f"{error} Without load_state, quantize calibrates.")
        logging.warning(f"Calibrating anew: {error}")

    def _keep(self) -> None:
        """Write the state to the configured folder; if that fails, the run continues with a warning."""
        path = self.quantization_config.calibration_state
        if path is None:
            return
        try:
            self.save_state(path)
        except (OSError, RuntimeError, TypeError, SafetensorError, support.ExportError) as error:
            # safetensors raises its own error if the disk is full, and settings of a user's own quantizers may be
            # objects that only a pickle can hold.
            logging.warning(f"calibration_state: the calibrated state could not be kept in {path}: {error}")

    def _forget(self) -> None:
        """Remove the state that was kept for a second try."""
        path = self.quantization_config.calibration_state
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
    """Raise an error on all ranks if a folder holds anything but a calibrated state of ours.

    Args:
        path: The folder, which need not exist.
        setting: What names it, for the message.

    Raises:
        ModelOptConfigError: With what is there and what to do.
    """
    problems = [text for text in _gathered(files.problem(Path(path), KIND)) if text]
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
    """Return whether there is a folder, on any rank."""
    return any(_gathered(path.is_dir()))


def _gathered(value: Any) -> list[Any]:
    if not torch.distributed.is_initialized():
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _mode_count(core: torch.nn.Module) -> int:
    converted = mto.ModeloptStateManager.is_converted(core)
    return len(mto.ModeloptStateManager(core).state_dict()) if converted else 0


def _quantizers(core: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in core.named_modules():
        if isinstance(module, (TensorQuantizer, SequentialQuantizer)):
            yield name, module


def capture(core: torch.nn.Module, stamp: dict[str, Any], modes_before: int) -> dict[str, Any]:
    """Return what makes the original model the calibrated one, on the host.

    Args:
        core: The calibrated Megatron-Core model.
        stamp: The fingerprint taken before calibration.
        modes_before: Modes of Model Optimizer that the original had.
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
        ModelOptConfigError: On all ranks, if one's file cannot be read or is of another run.
    """
    content, problem = _read_file(path / _file_name(), stamp)
    problems = [text for text in _gathered(problem) if text]
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
    found = fingerprint.differences(saved, stamp)
    if not found:
        return content, None
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    return {}, f"it belongs to another run: {'; '.join(found[:_SHOWN])}{more}."


def restore(core: torch.nn.Module, content: dict[str, Any]) -> None:
    """Make the calibrated model of the original one, in place.

    Model Optimizer inserts the quantizers without calibrating; its own restoring would then run the weights through
    scales that are not there yet, so the settings and tensors are put in here.
    """
    manager = mto.ModeloptStateManager(core, init_state=not mto.ModeloptStateManager.is_converted(core))
    manager.update_last_state_before_new_mode(core)
    with kv_cache.attention_support(content["kv_cache"]):
        for name, config in content["modes"]:
            mode = _ModeRegistryCls.get_from_any(name)
            if not type(mode).__module__.startswith(_MODES):
                raise ModelOptConfigError(f"The calibrated state names {name!r}, which is not a mode of quantization.")
            typed = manager.get_config_class(name, config)
            mode.restore(core, typed, {})
            manager.add_mode(mode, typed, {})
    _shape_sequences(core, content["quantizers"])
    device = next(core.parameters()).device
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
    """Give each quantizer as many steps as the stored one has: a search chooses that layer by layer."""
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
