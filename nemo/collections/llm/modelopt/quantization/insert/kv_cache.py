"""KV-cache quantizers for Megatron's own attention.

modelopt 0.43 inserts quantizers for keys and values into Transformer Engine's attention only (0.37 into none), so the
option had no effect on ``DotProductAttention``. The class below is registered while a model is converted and removed
afterwards, because a registration changes the keys that every later checkpoint of the process must have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import metadata as distributions
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from nemo.utils import logging
from packaging.version import Version
from transformers import PreTrainedModel

from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from modelopt.torch.utils.distributed import ParallelState

from ... import _parallel
from ...errors import ModelOptConfigError
from .. import quant_cfg_choices as choices

_FIRST_MODELOPT = "0.43"
_NAMES = ("q_bmm_quantizer", "k_bmm_quantizer", "v_bmm_quantizer")


class QuantDotProductAttention(QuantModule):
    """Attention that quantizes queries, keys and values after the rotary embedding, as a quantized KV cache would.

    All three quantizers start disabled; quant_cfg patterns such as ``*[kv]_bmm_quantizer`` enable them.
    """

    def _setup(self):
        try:
            data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        except AssertionError:
            data_group = parallel_state.get_data_parallel_group()
        self.parallel_state = ParallelState(data_group, parallel_state.get_tensor_model_parallel_group())
        for name in _NAMES:
            quantizer = TensorQuantizer()
            quantizer.disable()
            setattr(self, name, quantizer)

    def forward(self, query, key, value, *args, **kwargs):
        """Quantize query `[s, b, h, d]`, key and value `[s, b, g, d]`, then attend."""
        return super().forward(
            self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value), *args, **kwargs
        )

    # torch looks for extra state in the class; modelopt sets its functions on the instance.
    def get_extra_state(self):
        """Return nothing: modelopt's own function, set on the instance, has precedence."""
        return

    def set_extra_state(self, state):
        """Do nothing, see `get_extra_state`."""

    def modelopt_post_restore(self, prefix: str = ""):
        """Move the restored amax to the device of the layer's parameters."""
        if hasattr(self, "device") and hasattr(self, "dtype"):
            self.to(device=self.device, dtype=self.dtype)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Return Megatron's entries and the quantizers'; amax is a scalar and equal on all TP ranks."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {
            name: value
            for name, value in self.state_dict(prefix="", keep_vars=True).items()
            if "_quantizer" in name or name.endswith("_extra_state")
        }
        sharded.update(make_sharded_tensors_for_checkpoint(own, prefix, {}, sharded_offsets))
        return sharded


def _modelopt() -> str:
    return distributions.version("nvidia-modelopt")


def is_supported() -> bool:
    """Return whether this modelopt supports quantizers in Megatron's own attention.

    0.37 creates them too, but does not synchronize their amax over tensor-parallel ranks and does not restore them.
    """
    return Version(_modelopt()) >= Version(_FIRST_MODELOPT)


def support_for(weights: Path):
    """Return the context in which to restore a converted checkpoint, see `attention_support`.

    Args:
        weights: The checkpoint's folder of weights.

    Raises:
        ModelOptConfigError: If it holds KV-cache quantizers and this modelopt would lose them.
    """
    wanted = checkpoint_has_quantizers(weights)
    if wanted and not is_supported():
        raise ModelOptConfigError(
            f"The checkpoint {weights} holds KV-cache quantizers, which modelopt {_modelopt()} would lose: install "
            f"modelopt {_FIRST_MODELOPT}, or quantize the original with enable_kv_cache=False."
        )
    return attention_support(wanted)


@contextlib.contextmanager
def attention_support(wanted: bool = True) -> Iterator[None]:
    """Let modelopt convert ``DotProductAttention`` within the context.

    Args:
        wanted: False makes it an empty context.
    """
    if not wanted or not is_supported() or DotProductAttention in QuantModuleRegistry:
        yield
        return
    try:
        QuantModuleRegistry.register({DotProductAttention: "megatron_DotProductAttention"})(QuantDotProductAttention)
        yield
    finally:
        if DotProductAttention in QuantModuleRegistry:
            QuantModuleRegistry.unregister(DotProductAttention)


def can_quantize(model: torch.nn.Module) -> bool:
    """Return whether any attention of the model can have KV-cache quantizers; call it within `attention_support`.

    All ranks must call it: a pipeline stage may have no attention, of a hybrid model or because its layers were pruned.
    """
    # modelopt converts the attention of transformers models itself.
    found = isinstance(model, PreTrainedModel) or any(
        name.endswith("core_attention") and type(module) in QuantModuleRegistry
        for name, module in model.named_modules()
    )
    return _parallel.any_rank([found])[0]


def settle(model: torch.nn.Module, quant_cfg: dict, enable: bool | None) -> None:
    """Log whether the KV cache will be quantized; if the attention cannot, remove it from ``quant_cfg``.

    Args:
        model: The Megatron-Core model; call this function within `attention_support`.
        quant_cfg: Changed in place if the attention does not support it and ``enable`` is None.
        enable: The user's option; None decides automatically.

    Raises:
        ModelOptConfigError: If ``enable`` is set and the attention does not support it.
    """
    wanted = choices.has_kv_cache(quant_cfg)
    if wanted and not can_quantize(model):
        own = {type(m).__name__ for name, m in model.named_modules() if name.endswith("core_attention")}
        attention = set().union(*_parallel.gather_objects(own))
        message = f"modelopt cannot insert KV-cache quantizers into this model's attention {sorted(attention)}"
        if not is_supported():
            message = (
                f"modelopt {_modelopt()} cannot keep KV-cache quantizers in Megatron's attention, modelopt "
                f"{_FIRST_MODELOPT} can"
            )
        if enable:
            raise ModelOptConfigError(f"enable_kv_cache=True: {message}; set enable_kv_cache=False.")
        logging.warning(f"{message}: the KV cache is not quantized")
        choices.disable_kv_cache(quant_cfg)
        wanted = False
    if wanted and enable is None:
        logging.warning(
            "Enabled KV cache quantization, because enable_kv_cache is None; set enable_kv_cache=False "
            "(--disable_kv_cache) to disable it"
        )
    else:
        logging.info(f"{'Enabled' if wanted else 'Disabled'} KV cache quantization")


def checkpoint_has_quantizers(weights: Path) -> bool:
    """Return whether a converted checkpoint has KV-cache quantizers, by the names of its tensors."""
    if not (Path(weights) / "modelopt_state").exists() or not (Path(weights) / ".metadata").exists():
        return False
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(str(weights)).read_metadata().state_dict_metadata
    return any("core_attention" in name and "_bmm_quantizer" in name for name in names)


def agree(model: torch.nn.Module) -> None:
    """Set the KV-cache quantizers of all tensor-parallel ranks to the largest range of them.

    From 0.44, modelopt does so after its plain calibration only and not after AWQ's search, and a checkpoint holds one
    range for all ranks.
    """
    if not parallel_state.model_parallel_is_initialized():
        return
    group = parallel_state.get_tensor_model_parallel_group()
    for name, module in model.named_modules():
        is_calibrated = isinstance(module, TensorQuantizer) and module.is_enabled and module.amax is not None
        if name.endswith(_NAMES) and is_calibrated:
            torch.distributed.all_reduce(module.amax, op=torch.distributed.ReduceOp.MAX, group=group)
