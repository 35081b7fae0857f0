"""Which ``_extra_state`` of Transformer Engine a checkpoint is asked for, and which one is written."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from nemo.collections.llm.modelopt import _saved_keys


def requested(*names: str) -> dict:
    return {name: SimpleNamespace(key=name, unique_key=name + "/shard_0_1") for name in names}


def test_only_missing_extra_state_leaves_the_request():
    request = requested("module.a", "module.norm._extra_state", "module.mlp._extra_state")
    dropped = _saved_keys.drop_missing_extra_state(request, ["module.a", "module.mlp._extra_state/shard_0_1"])
    assert set(request) == {"module.a", "module.mlp._extra_state"}
    assert dropped == {"module.norm._extra_state": None}


def test_parts_of_an_interleaved_pipeline_are_searched():
    request = {"model_0": requested("a"), "model_1": requested("b", "norm._extra_state")}
    assert _saved_keys.drop_missing_extra_state(request, ["a"]) == {"model_1": {"norm._extra_state": None}}
    assert set(request["model_1"]) == {"b"}


def test_a_missing_weight_stays_in_the_request():
    request = requested("module.a", "module.b")
    assert not _saved_keys.drop_missing_extra_state(request, ["module.a"])
    assert set(request) == {"module.a", "module.b"}


class Reader:
    """A checkpoint IO that returns what it is asked for."""

    def load_checkpoint(self, path, sharded_state_dict=None, strict=None):
        return {"state_dict": {name: value.key for name, value in sharded_state_dict["state_dict"].items()}}


def test_the_next_load_gets_what_the_checkpoint_lacks_as_none(monkeypatch):
    """Only the next load is changed, also if an earlier preparation was followed by none."""
    monkeypatch.setattr(_saved_keys, "saved_keys", lambda path: ["module.a"])
    strategy = SimpleNamespace(checkpoint_io=Reader())
    _saved_keys.adapt_next_load(strategy)
    _saved_keys.adapt_next_load(strategy)
    request = requested("module.a", "module.norm._extra_state")
    loaded = strategy.checkpoint_io.load_checkpoint("path", {"state_dict": dict(request)})
    assert loaded == {"state_dict": {"module.a": "module.a", "module.norm._extra_state": None}}
    again = strategy.checkpoint_io.load_checkpoint("path", {"state_dict": dict(request)})
    assert again["state_dict"]["module.norm._extra_state"] == "module.norm._extra_state"


def sharded(key: str, *offsets: tuple[int, int, int]) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(
        key, torch.ones(4), *offsets, replica_id=(0, 1, 0), prepend_axis_num=len(offsets)
    )


def test_layers_without_extra_state_are_saved_with_an_empty_one():
    """Norms, and projections of multi-latent attention; fused norms and other layers have none of their own."""
    latent = "decoder.layers.0.self_attention.linear_q_down_proj"
    weights = {
        f"{latent}.weight": sharded(f"{latent}.weight"),
        "module.decoder.final_layernorm.weight": sharded("module.decoder.final_layernorm.weight"),
        "module.decoder.layers.1.pre_mlp_layernorm.weight": sharded(
            "module.decoder.layers.pre_mlp_layernorm.weight", (0, 1, 3)
        ),
        "module.decoder.layers.1.input_layernorm.weight": sharded(
            "module.decoder.layers.self_attention.linear_qkv.layer_norm_weight", (0, 1, 3)
        ),
        "module.output_layer.weight": sharded("module.output_layer.weight"),
    }
    assert _saved_keys.complete_extra_state(weights) is weights
    added = {name: value for name, value in weights.items() if name.endswith("_extra_state")}
    assert {name: value.unique_key for name, value in added.items()} == {
        f"{latent}._extra_state": f"{latent}._extra_state/shard_0_1",
        "module.decoder.final_layernorm._extra_state": "module.decoder.final_layernorm._extra_state/shard_0_1",
        "module.decoder.layers.1.pre_mlp_layernorm._extra_state": (
            "module.decoder.layers.pre_mlp_layernorm._extra_state/shard_1_3"
        ),
    }
    assert all(value.data.numel() == 0 and value.replica_id == (0, 1, 0) for value in added.values())


def test_an_extra_state_that_is_there_stays():
    name = "decoder.final_layernorm"
    weights = {f"{name}.weight": sharded(f"{name}.weight"), f"{name}._extra_state": "own"}
    assert _saved_keys.complete_extra_state(weights)[f"{name}._extra_state"] == "own"
