"""Turn a GPT model into one with draft heads for speculative decoding."""

import copy
from typing import Any

import torch.nn as nn
from nemo.utils import logging
from nemo.utils.import_utils import safe_import
from nemo.utils.model_utils import unwrap_model

import modelopt.torch.opt as mto
import modelopt.torch.speculative as mtsp
from nemo.collections.llm import GPTModel

from .. import _real
from ..errors import ModelOptConfigError, one_of

_, HAVE_TE = safe_import("transformer_engine")

# Name -> modelopt's mode and its configuration; None if this modelopt has none.
ALGORITHMS: dict[str, dict[str, Any] | None] = {
    "eagle3": getattr(mtsp, "EAGLE3_DEFAULT_CFG", None),  # arXiv 2503.01840
    "medusa": {"algorithm": "medusa", "config": {"medusa_num_heads": 2, "medusa_num_layers": 1}},  # arXiv 2401.10774
}


def apply_speculative_decoding(model: nn.Module, algorithm: str = "eagle3") -> nn.Module:
    """Add the draft heads of a speculative decoding method to a GPT model, in place.

    A model that has them already is returned as it is. modelopt's defaults are copied, so that the draft of one model
    does not set the sizes of the next one's.

    Args:
        model: an ``llm.GPTModel`` with weights.
        algorithm: a name in `ALGORITHMS`.

    Returns:
        The model that was given.

    Raises:
        ModelOptConfigError: for an unknown or unavailable algorithm, another kind of model, a model without weights,
            one with virtual pipeline stages, or one that has draft heads of another method.
    """
    try:
        one_of("algorithm", algorithm, ALGORITHMS)
    except ModelOptConfigError as error:
        raise ModelOptConfigError(f"Invalid algorithm: {algorithm}. {error}") from None
    preset = ALGORITHMS[algorithm]
    if preset is None:
        raise ModelOptConfigError(
            f"algorithm={algorithm!r} is not in the installed modelopt; available: "
            f"{[name for name, known in ALGORITHMS.items() if known is not None]}. Upgrade nvidia-modelopt to use it."
        )
    if not isinstance(model, GPTModel):
        raise ModelOptConfigError(
            "Speculative Decoding currently only supported for GPT models. Pass an llm.GPTModel, not a "
            f"{type(model).__name__}."
        )
    core: Any = unwrap_model(model)
    mode, settings = preset["algorithm"], copy.deepcopy(preset["config"])
    if _has_same_speculative_decoding_state(core, mode):
        logging.info("Model has already been transformed with Speculative Decoding. Skipping transformation.")
        return model
    _check(core, mode)
    if "eagle_architecture_config" in settings:
        settings["eagle_architecture_config"].update(_draft_sizes(core))
    logging.info(f"Converting to Speculative Decoding model with mode: {mode!r} and config:\n{settings}")
    mtsp.convert(core, [(mode, settings)])
    return model


def _check(core: Any, mode: str) -> None:
    """Raise an error for a model that modelopt cannot convert, before it is touched."""
    if not hasattr(core, "config"):
        raise ModelOptConfigError("Model must have a config attached. Pass an llm.GPTModel that has its weights.")
    if core.config.virtual_pipeline_model_parallel_size is not None:
        raise ModelOptConfigError(
            "Speculative decoding is incompatible with virtual pipeline parallelism. Set "
            f"virtual_pipeline_model_parallel_size={core.config.virtual_pipeline_model_parallel_size} to None."
        )
    # A stand-in has no class that a registry could know.
    is_real = _real.is_core(core) or _real.is_nemo_model(core)
    if is_real and not _is_convertible(core, mode):
        raise ModelOptConfigError(
            f"The installed modelopt cannot add {mode!r} draft heads to {type(core).__name__}: it needs a model with "
            "its weights in place and, for EAGLE, Transformer Engine (its draft layers are built of it)."
        )


def _is_convertible(core: nn.Module, mode: str) -> bool:
    """Return whether modelopt converts this model's class or a parent of it, and has what the method's layers need."""
    from modelopt.torch.speculative.eagle.conversion import EagleDMRegistry
    from modelopt.torch.speculative.medusa.conversion import MedusaDMRegistry

    if mode == "eagle" and not HAVE_TE:
        return False
    registry = {"eagle": EagleDMRegistry, "medusa": MedusaDMRegistry}.get(mode)
    return registry is None or any(issubclass(type(core), known) for known in registry._registry)


def _draft_sizes(core: Any) -> dict[str, int]:
    """Return the sizes that an EAGLE draft must share with its base model, or had better share to stay small."""
    config = core.config
    return {
        "hidden_size": config.hidden_size,
        "vocab_size": core.vocab_size,
        "draft_vocab_size": core.vocab_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
    }


def _has_same_speculative_decoding_state(model: nn.Module, mode: str) -> bool:
    """Return whether the model has the draft heads of this mode.

    Raises:
        ModelOptConfigError: if it has those of another mode.
    """
    from modelopt.torch.opt.mode import _ModeRegistryCls

    speculative = _ModeRegistryCls.get_registry_by_name("speculative")
    applied = [name for name, _ in mto.modelopt_state(model)["modelopt_state_dict"] if name in speculative]
    if applied and applied[0] != mode:
        raise ModelOptConfigError(
            "Model has already been transformed with Speculative Decoding, but with a different mode: "
            f"{applied[0]!r}, now {mode!r}. Use the same mode, or restore the base model."
        )
    return bool(applied)
