"""Jobs of the tests of hybrid models: real Megatron hybrids of attention and MLP layers, which need no mamba-ssm."""

from __future__ import annotations

import contextlib
from unittest.mock import patch

import torch

from test_code.support import jobs_prune, tiny


def stack_spec():
    """Return a hybrid stack of Megatron's local attention and MLP layers, with norms of their own."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_block import MambaStack, MambaStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    attention = TransformerLayerSubmodules(
        input_layernorm=WrappedTorchNorm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
    )
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=WrappedTorchNorm,
        mlp=ModuleSpec(module=MLP, submodules=linear),
        mlp_bda=get_bias_dropout_add,
    )
    return ModuleSpec(
        module=MambaStack,
        submodules=MambaStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )


@contextlib.contextmanager
def hybrids_allowed(known: bool = True, rules: bool = True):
    """Let Megatron build hybrids without Transformer Engine, and modelopt prune them without mamba_ssm.

    Args:
        known: whether modelopt takes mamba_ssm for there.
        rules: whether its configuration has a rule for hybrids too, as it has where mamba_ssm is.
    """
    from megatron.core.models.mamba import MambaModel
    from megatron.core.ssm import mamba_block
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from modelopt.torch.nas.plugins import megatron as plugin
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.opt.config import get_kwargs_for_create_model_with_rules
    from modelopt.torch.opt.dynamic import DynamicModule
    from modelopt.torch.prune.plugins import mcore_minitron
    from pydantic import create_model

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(mamba_block, "TENorm", WrappedTorchNorm))
        if known:
            name = "megatron.core.models.mamba.MambaModel"
            stack.enter_context(patch.object(plugin, "HAS_MAMBA", True))
            stack.enter_context(patch.dict(plugin.SUPPORTED_MODELS, {MambaModel: name}))
            dynamic = next(
                value
                for value in vars(plugin).values()
                if isinstance(value, type)
                and issubclass(value, DynamicModule)
                and "MCoreLanguageModel" in value.__name__
            )
            DMRegistry.register({MambaModel: name})(dynamic)
            stack.callback(DMRegistry.unregister, MambaModel)
            if rules:
                divisors = ("hidden_size_divisor", "ffn_hidden_size_divisor", "num_layers_divisor")
                rules = {model: dict.fromkeys(divisors, 1) for model in plugin.SUPPORTED_MODELS.values()}
                kwargs = get_kwargs_for_create_model_with_rules(registry=DMRegistry, default_rules=rules, doc="")
                config = create_model("MCoreMinitronConfig", **kwargs)
                stack.enter_context(patch.object(mcore_minitron, "MCoreMinitronConfig", config))
        yield


def build(pattern: str | None, layers: int, **overrides):
    """Train a hybrid model for a step and give it weights that depend on their names."""
    from megatron.core.transformer.enums import AttnBackend

    from nemo.collections import llm

    llama = vars(tiny.config())
    names = ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "seq_length", "bf16")
    names += ("params_dtype", "pipeline_dtype", "gated_linear_unit", "activation_func", "make_vocab_size_divisible_by")
    settings = {name: llama[name] for name in names}
    config = llm.SSMConfig(
        **settings,
        num_layers=layers,
        hybrid_override_pattern=pattern,
        mamba_stack_spec=stack_spec,
        position_embedding_type="none",
        attention_backend=AttnBackend.auto,
        bias_dropout_fusion=False,
        cross_entropy_loss_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        **overrides,
    )
    model = llm.MambaModel(config, optim=tiny.optim(), tokenizer=tiny.tokenizer())
    run, module = tiny.trainer(max_steps=1, limit_val_batches=4), tiny.data()
    run.fit(model, module)
    jobs_prune.fill(model)
    return model, module, run


def _patterns(model) -> dict:
    core = tiny.core(model)
    holders = {"model": core, "stack": core.decoder, "configuration": core.config}
    return {name: getattr(holder, "hybrid_override_pattern", None) for name, holder in holders.items()}


def spelled(layers: int, attention: float, mlp: float) -> str:
    """Return the pattern that Megatron makes of shares of layers."""
    from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

    return "".join(allocate_layers(layers, attention, mlp))


def prune(
    request: dict,
    pattern: str | None,
    layers: int,
    known: bool = True,
    rules: bool = True,
    fails: bool = False,
    **overrides,
) -> dict:
    """Prune a hybrid model; return its patterns, weights and the error, where there is one."""
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.prune import describe_pruning

    with hybrids_allowed(known, rules), contextlib.ExitStack() as stack:
        model, module, run = build(pattern, layers, **overrides)
        found = {"before": jobs_prune.weights(model), "refused": ""}
        if fails:
            stack.enter_context(patch.object(llm, "validate", side_effect=OSError("the disk is gone")))
        try:
            jobs_prune.run_prune(model, request, module, run)
            found["report"] = describe_pruning(model)
        except (ValueError, RuntimeError, OSError) as error:
            found["refused"] = str(error)
        return found | {"after": jobs_prune.weights(model), "patterns": _patterns(model)}


def prune_and_load(folder: str, request: dict, pattern: str | None, layers: int, **overrides) -> dict:
    """Prune a hybrid model, save it, and return what its checkpoint says and holds when a new model loads it."""
    from pathlib import Path

    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir

    from nemo import lightning as nl
    from nemo.collections.llm.modelopt.prune import save_pruned_model

    with hybrids_allowed():
        model, module, run = build(pattern, layers, **overrides)
        jobs_prune.run_prune(model, request, module, run)
        pruned = jobs_prune.weights(model)
        save_pruned_model(run, folder)
        jobs_prune.reset_layout()
        again = nl.io.load_context(ckpt_to_context_subdir(Path(folder)), subpath="model")
        names = ("num_layers", "hybrid_override_pattern", "hybrid_attention_ratio", "hybrid_mlp_ratio")
        saved = {name: getattr(again.config, name) for name in names}
        run = tiny.trainer(limit_val_batches=4)
        run.strategy.restore_config = nl.RestoreConfig(path=folder, load_optim_state=False)
        run.validate(again, tiny.data())
        loaded = jobs_prune.weights(again)
    same = loaded.keys() == pruned.keys() and all(torch.equal(loaded[name], pruned[name]) for name in pruned)
    return {"saved": saved, "same": same}
