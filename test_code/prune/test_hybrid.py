"""Pruning of hybrid models: their layer pattern stays what the layers are, from modelopt's cut to the saved checkpoint.

The hybrids are Megatron's own, of attention and MLP layers: these need no mamba-ssm. Mixers of Mamba are not run.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from test_code.support import installed, jobs_prune, tiny


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
    """Train a hybrid model for a step and set weights that depend on their names."""
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
    """Prune a hybrid model; return its patterns, weights and the error, if any."""
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


class TestPatterns:
    @settings(deadline=None)
    @given(kept=st.sets(st.integers(1, 8), min_size=1))
    def test_letters_of_the_layers_are_kept_in_order(self, cpu_backend, kept):
        from nemo.collections.llm.modelopt.prune._hybrid import keep_pattern

        pattern = "M*M-M*ME"
        assert keep_pattern(pattern, kept) == "".join(c for i, c in enumerate(pattern, 1) if i in kept)

    @settings(deadline=None)
    @given(
        layers=st.integers(2, 12),
        attention=st.sampled_from([0.0, 0.25, 0.5]),
        mlp=st.sampled_from([0.0, 0.25, 0.5]),
        data=st.data(),
    )
    def test_megatron_builds_the_layers_that_are_left(self, cpu_backend, layers, attention, mlp, data):
        from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

        from nemo.collections.llm.modelopt.prune._hybrid import cut_pattern

        kept = sorted(data.draw(st.sets(st.integers(1, layers), min_size=1, max_size=layers)))
        letters = allocate_layers(layers, attention, mlp)
        shares = {"hybrid_attention_ratio": attention, "hybrid_mlp_ratio": mlp}
        core, config = (SimpleNamespace(hybrid_override_pattern="".join(letters), **shares) for _ in range(2))
        core.config = config
        cut_pattern(core, kept)
        for found in (core, config):
            pattern = found.hybrid_override_pattern
            built = allocate_layers(len(kept), found.hybrid_attention_ratio, found.hybrid_mlp_ratio, pattern)
            assert built == [letters[number - 1] for number in kept]

    def test_shares_that_stay_are_refused_by_megatron(self, cpu_backend):
        """The reason why shares are given up: this is what loading such a checkpoint would meet."""
        from megatron.core.ssm.mamba_hybrid_layer_allocation import allocate_layers

        with pytest.raises(ValueError, match="number of each type of layer"):
            allocate_layers(2, 0.5, 0.5, "**")

    def test_a_model_that_lost_no_layer_keeps_shares_and_pattern(self, cpu_backend):
        from nemo.collections.llm.modelopt.prune._hybrid import cut_pattern

        core = SimpleNamespace(config=SimpleNamespace(hybrid_override_pattern="M*", hybrid_attention_ratio=0.5))
        cut_pattern(core, [1, 2])
        assert vars(core.config) == {"hybrid_override_pattern": "M*", "hybrid_attention_ratio": 0.5}


@installed.prunes
@installed.since_0_43
class TestHybrids:
    def test_dropped_layers_leave_the_pattern(self, ranks):
        out = ranks(1).run(prune, {"drop_layers": [2, 3]}, "*--*", 4)[0]
        assert set(out["patterns"].values()) == {"**"}
        assert out["report"]["kept_layers"] == [1, 4]
        for name, value in out["after"].items():
            assert torch.equal(value, out["before"][name.replace("layers.1.", "layers.3.")]), name

    @pytest.mark.parametrize("pattern", ["*-*-", None])
    def test_importance_cuts_the_pattern(self, ranks, pattern):
        request = {"target_num_layers": 3, "target_ffn_hidden_size": 64}
        shares = {} if pattern else {"hybrid_attention_ratio": 0.5, "hybrid_mlp_ratio": 0.5}
        out = ranks(1).run(prune, request, pattern, 4, **shares)[0]
        kept, scores = out["report"]["kept_layers"], out["report"]["layer_scores"]
        assert kept == sorted(sorted(scores, key=scores.get, reverse=True)[:3])
        letters = pattern or spelled(4, 0.5, 0.5)
        assert set(out["patterns"].values()) == {"".join(letters[number - 1] for number in kept)}
        before, after = ({n.split("layers.")[-1][2:]: v for n, v in out[when].items()} for when in ("before", "after"))
        assert after["self_attention.linear_qkv.weight"].shape == before["self_attention.linear_qkv.weight"].shape
        assert after["mlp.linear_fc2.weight"].shape == (64, 64)
        # The cache is that of attention layers alone: keys and values of 2 groups of 16 channels in fp32.
        assert out["report"]["cost"]["before"]["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 16 * 4)

    @pytest.mark.parametrize("request_", [{"drop_layers": [2]}, {"target_num_layers": 2}])
    def test_a_model_given_by_shares_is_saved_and_loads(self, ranks, tmp_path, request_):
        shares = {"hybrid_attention_ratio": 0.5, "hybrid_mlp_ratio": 0.5}
        out = ranks(1).run(prune_and_load, str(tmp_path / "pruned"), request_, None, 4, **shares)[0]
        assert out["same"]
        assert out["saved"]["num_layers"] == len(out["saved"]["hybrid_override_pattern"])
        assert (out["saved"]["hybrid_attention_ratio"], out["saved"]["hybrid_mlp_ratio"]) == (0.0, 0.0)

    def test_a_failed_run_takes_the_spelled_pattern_back(self, ranks):
        out = ranks(1).run(prune, {"target_num_layers": 3}, None, 4, fails=True, hybrid_attention_ratio=1.0)[0]
        assert out["refused"] == "the disk is gone"
        assert set(out["patterns"].values()) == {None}
        assert all(torch.equal(out["before"][name], value) for name, value in out["after"].items())

    @pytest.mark.parametrize("request_", [{"drop_layers": [1]}, {"target_num_layers": 2}])
    def test_without_mamba_ssm_they_are_refused(self, ranks, request_):
        out = ranks(1).run(prune, request_, "*-*-", 4, known=False)[0]
        assert "only if the package mamba_ssm can be imported" in out["refused"]
        assert "install mamba_ssm and causal_conv1d" in out["refused"]
        assert set(out["patterns"].values()) == {"*-*-"}

    def test_layers_that_modelopt_leaves_are_noticed(self, ranks):
        """Without a rule for the model, modelopt cuts no layer and says nothing, while the configuration claims it."""
        out = ranks(1).run(prune, {"target_num_layers": 3}, "*-*-", 4, rules=False)[0]
        assert "left 4 layers although 3 were requested: the model is no longer usable" in out["refused"]
