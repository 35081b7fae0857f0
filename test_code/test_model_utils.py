"""Restoring models for Model Optimizer: layer specs, devices, and its state in checkpoints."""

from __future__ import annotations

import contextlib
from unittest.mock import MagicMock, patch

import pytest
import torch

from test_code.drop_in.restore import (  # noqa: F401
    TestLayerSpec,
    TestModelUtilsNames,
    TestRestoreState,
    TestSaveState,
    TestTrainerSetup,
)
from test_code.support import installed
from test_code.support import jobs_quant as jobs
from test_code.support.ranks import RankError

MODULE = "nemo.collections.llm.modelopt.model_utils"


@pytest.fixture
def model_utils():
    from nemo.collections.llm.modelopt import model_utils

    return model_utils


def config_with(spec):
    from test_code.support import tiny

    return tiny.config(transformer_layer_spec=spec)


@pytest.mark.parametrize(
    ("name", "chosen"),
    [
        ("default_layer_spec", "default_layer_spec"),
        ("local_layer_spec", "local_layer_spec"),
        ("transformer_engine_layer_spec", "local_layer_spec"),
        ("transformer_engine_full_layer_spec", "local_layer_spec"),
        ("custom_spec", "custom_spec"),
    ],
)
def test_spec_without_transformer_engine(ranks, name, chosen):
    assert ranks(1).run(jobs.spec_after, name) == [chosen]


@pytest.mark.parametrize(
    ("name", "replaced"),
    [("default_layer_spec", True), ("transformer_engine_layer_spec", True), ("local_layer_spec", False)],
)
def test_spec_with_transformer_engine(cpu_backend, model_utils, name, replaced):
    from nemo.collections.llm.gpt.model import base

    def modelopt_spec(config, **kwargs):
        raise AssertionError("only chosen here, not built")

    config = config_with(getattr(base, name))
    with patch(f"{MODULE}.get_gpt_modelopt_spec", modelopt_spec):
        model_utils._set_gpt_mamba_modelopt_spec(config)
    if replaced:
        assert config.transformer_layer_spec.func is modelopt_spec
        assert config.transformer_layer_spec.keywords == {"remap_te_layernorm": True, "local_core_attention": False}
    else:
        assert config.transformer_layer_spec is base.local_layer_spec


def test_a_users_spec_of_a_known_name_is_kept(cpu_backend, model_utils):
    def default_layer_spec(config):
        return None

    config = config_with(default_layer_spec)
    with patch(f"{MODULE}.get_gpt_modelopt_spec", MagicMock()):
        model_utils._set_gpt_mamba_modelopt_spec(config)
    assert config.transformer_layer_spec is default_layer_spec


def test_other_configurations_are_refused(model_utils):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match="No modelopt layer spec supported for config type.*dict"):
        model_utils._set_gpt_mamba_modelopt_spec({})


def test_mamba_says_what_is_missing(cpu_backend, model_utils):
    from nemo.collections import llm
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with (
        patch(f"{MODULE}.get_mamba_stack_modelopt_spec", None),
        pytest.raises(ModelOptConfigError, match="mamba_ssm and causal_conv1d"),
    ):
        model_utils._set_gpt_mamba_modelopt_spec(object.__new__(llm.SSMConfig))


@pytest.mark.parametrize("prefix", ["", "nemo://"])
@pytest.mark.parametrize(("has_state", "configured"), [(True, False), (False, False), (True, True)])
def test_spec_is_set_only_for_converted_checkpoints(cpu_backend, model_utils, tmp_path, prefix, has_state, configured):
    from test_code.support import tiny

    weights = tmp_path / "ckpt" / "weights"
    (weights / "modelopt_state" if has_state else weights).mkdir(parents=True)
    model = tiny.model()
    model.config.gradient_accumulation_fusion = "before"
    if configured:
        model.module = torch.nn.Identity()
    model_utils.set_modelopt_spec_if_exists_in_ckpt(model, f"{prefix}{tmp_path / 'ckpt'}")
    changed = has_state and not configured
    assert model.config.gradient_accumulation_fusion == (False if changed else "before")


@pytest.mark.parametrize(
    ("gpu", "backend", "expected"),
    [(True, False, ("gpu", "bf16-mixed")), (False, True, ("cpu", "32")), (False, False, ("gpu", "bf16-mixed"))],
)
def test_device_is_chosen_by_what_there_is(model_utils, gpu, backend, expected):
    with (
        patch("torch.cuda.is_available", return_value=gpu),
        patch("nemo_modelopt_dropin.cpu_backend.is_enabled", return_value=backend),
    ):
        assert model_utils._default_device() == expected


def test_unknown_precision_is_refused(model_utils):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match="precision='fp4' is not supported"):
        model_utils.setup_trainer_and_restore_model_with_modelopt_spec("nowhere", precision="fp4")


@pytest.mark.parametrize("inference_only", [True, False])
def test_settings_of_strategy_and_trainer(model_utils, inference_only):
    with (
        patch(f"{MODULE}.nl") as nl,
        patch(f"{MODULE}._setup_trainer_and_restore_model") as restore,
        patch(f"{MODULE}._set_gpt_mamba_modelopt_spec") as set_spec,
        patch("torch.cuda.is_available", return_value=True),
    ):
        model, trainer = model_utils.setup_trainer_and_restore_model_with_modelopt_spec(
            "ckpt",
            tensor_model_parallel_size=2,
            num_layers_in_last_pipeline_stage=3,
            inference_only=inference_only,
            legacy_ckpt=True,
            strategy_kwargs={"sequence_parallel": True},
            trainer_kwargs={"max_steps": 5, "accelerator": "tpu"},
            model_config_overrides={"seq_length": 7},
        )
    strategy = nl.MegatronStrategy.call_args.kwargs
    assert strategy["tensor_model_parallel_size"] == 2 and strategy["sequence_parallel"] is True
    assert strategy["num_layers_in_last_pipeline_stage"] == 3 and "num_layers_in_first_pipeline_stage" not in strategy
    assert strategy["pipeline_dtype"] == torch.bfloat16
    assert (strategy.get("ddp") == "pytorch") is inference_only
    assert (strategy.get("setup_optimizers") is False) is inference_only
    keywords = nl.Trainer.call_args.kwargs
    # What the caller asks for wins.
    assert (keywords["max_steps"], keywords["accelerator"]) == (5, "tpu")
    assert model.config.seq_length == 7 and model.config.num_layers_in_last_pipeline_stage == 3
    assert trainer.strategy.restore_config is None
    set_spec.assert_called_once_with(model.config)
    restore.assert_called_once_with("ckpt", trainer, model, None)


# --- modelopt state ---------------------------------------------------------------------------------------------------


def test_nothing_to_restore_without_a_path(model_utils):
    with patch(f"{MODULE}.mto") as mto:
        assert model_utils.restore_modelopt_state(MagicMock()) is None
        trainer = MagicMock(ckpt_path=None)
        trainer.strategy.restore_config = None
        assert model_utils.restore_modelopt_state(MagicMock(), trainer=trainer) is None
    mto.plugins.restore_sharded_modelopt_state.assert_not_called()


def test_a_converted_model_is_not_restored_again(model_utils):
    with patch(f"{MODULE}.mto") as mto, patch(f"{MODULE}.unwrap_model"):
        mto.ModeloptStateManager.is_converted.return_value = True
        assert model_utils.restore_modelopt_state(MagicMock(), "ckpt") is None
    mto.plugins.restore_sharded_modelopt_state.assert_not_called()


def test_teacher_is_hidden_while_state_is_restored_and_losses_can_be(model_utils, tmp_path):
    core = MagicMock()
    with patch(f"{MODULE}.mto") as mto, patch(f"{MODULE}.unwrap_model", return_value=core):
        mto.ModeloptStateManager.is_converted.return_value = False
        answer = model_utils.restore_modelopt_state(MagicMock(), str(tmp_path))
    core.hide_teacher_model.return_value.__enter__.assert_called_once_with()
    assert mto.plugins.restore_sharded_modelopt_state.call_args.args[0] == [core]
    assert mto.plugins.restore_sharded_modelopt_state.call_args.kwargs == {"prefix": "module."}
    assert answer is core.hide_loss_modules


@pytest.mark.parametrize("converted", [True, False])
def test_state_is_saved_for_converted_models(model_utils, tmp_path, converted):
    core, writer = MagicMock(spec=["config"]), MagicMock(async_save=True)
    with patch(f"{MODULE}.mto") as mto, patch(f"{MODULE}.unwrap_model", return_value=core):
        mto.ModeloptStateManager.is_converted.return_value = converted
        model_utils.save_modelopt_state(MagicMock(), str(tmp_path), writer)
    assert mto.plugins.save_sharded_modelopt_state.called is converted
    assert writer.maybe_finalize_save_checkpoint.called is converted
    if converted:
        arguments = mto.plugins.save_sharded_modelopt_state.call_args
        assert arguments.args == ([core], tmp_path / "weights")
        assert arguments.kwargs == {"sharded_strategy": writer.save_sharded_strategy}


@pytest.fixture(scope="module")
def quantized(ranks_factory, tmp_path_factory):
    """Return a folder with a plain and two quantized checkpoints: with KV-cache quantizers and without."""
    folder = tmp_path_factory.mktemp("model_utils")
    ranks_factory(1).run(jobs.make_checkpoint, str(folder / "plain"))
    data = {"calibration_dataset": jobs.corpus(folder / "text.jsonl"), "calibration_dataset_size": 8}
    for name, kv in (("kv", True), ("no-kv", False)):
        refused = kv and not installed.KV_CACHE
        with pytest.raises(RankError, match=installed.KV_CACHE_REFUSAL) if refused else contextlib.nullcontext():
            ranks_factory(1).run(
                jobs.ptq, str(folder / "plain"), str(folder / name), "int8", quant={**data, "enable_kv_cache": kv}
            )
    return folder


def test_kv_cache_quantizers_are_found_in_a_checkpoint(quantized):
    from nemo.collections.llm.modelopt.quantization.insert import kv_cache

    found = {n: kv_cache.checkpoint_has_quantizers(quantized / n / "weights") for n in ("plain", "kv", "no-kv")}
    assert found == {"plain": False, "kv": installed.KV_CACHE, "no-kv": False}


def test_kv_cache_quantizers_that_would_be_lost_are_refused(quantized):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.insert import kv_cache

    with patch.object(kv_cache, "_modelopt", return_value="0.37.0"), kv_cache.support_for(quantized / "no-kv/weights"):
        pass
    # Only modelopt 0.43 makes a checkpoint with such quantizers.
    with (
        patch.object(kv_cache, "_modelopt", return_value="0.37.0"),
        patch.object(kv_cache, "checkpoint_has_quantizers", return_value=True),
        pytest.raises(
            ModelOptConfigError, match=r"holds KV-cache quantizers, which modelopt 0\.37\.0 would lose: .*0\.43"
        ),
    ):
        kv_cache.support_for(quantized / "kv/weights")


@pytest.mark.parametrize(("name", "count"), [("plain", 0), ("kv", 40), ("no-kv", 32)])
@pytest.mark.parametrize("layout", [(2, 1), (1, 2)], ids=["tp2", "pp2"])
def test_checkpoints_restore_with_their_quantizers(ranks, quantized, name, count, layout):
    if name == "kv" and not installed.KV_CACHE:
        assert not (quantized / name).exists()  # refused when it was to be made
        return
    found = {}
    for amax in ranks(2).run(jobs.restored_amax, str(quantized / name), *layout):
        found.update(amax)
    assert len(found) == count


def test_a_quantized_checkpoint_trains_on(ranks, quantized):
    losses = ranks(1).run(jobs.train_quantized, str(quantized / "no-kv"))[0]
    # Batches differ in difficulty: compare means over a few of them.
    assert sum(losses[-5:]) < sum(losses[:5])


@installed.stock_quantizes
def test_stock_reads_what_we_write_and_we_read_what_stock_writes(ranks, stock_ranks, quantized, tmp_path):
    stock = stock_ranks(1)
    assert installed.is_stock(stock.run(jobs.which_package)[0])
    assert not installed.is_stock(ranks(1).run(jobs.which_package)[0])
    by_stock = stock.run(jobs.load_with_restore, str(quantized / "no-kv"))[0]
    by_us = ranks(1).run(jobs.load_with_restore, str(quantized / "no-kv"))[0]
    assert set(by_stock[0]) == set(by_us[0]) and len(by_us[0]) == 32
    assert all(torch.equal(by_stock[0][name], amax) for name, amax in by_us[0].items())
    assert by_stock[1] == by_us[1]

    written = stock.run(jobs.quantize_and_save, str(quantized / "plain"), str(tmp_path / "from-stock"))[0]
    read = ranks(1).run(jobs.load_with_restore, str(tmp_path / "from-stock"))[0][0]
    assert set(read) == set(written) and len(written) == 32
    assert all(torch.equal(read[name], amax) for name, amax in written.items())


def restoring_peak(path: str) -> tuple[int, int]:
    """Save a model of 8 MB and restore it; return the bytes of its weights, and the most bytes allocated at a time."""
    from nemo.collections.llm.modelopt import setup_trainer_and_restore_model_with_modelopt_spec as restore
    from test_code.support import ranks, tiny

    tiny.fit(tiny.model(num_layers=12, hidden_size=128, ffn_hidden_size=384), save_to=path, max_steps=1)
    ranks.reset()
    found: list = []
    peak = tiny.peak_bytes(lambda: found.append(restore(path, precision="32")))
    return sum(p.numel() * p.element_size() for p in found[0][0].parameters()), peak


def test_restoring_takes_little_more_than_the_weights(ranks, tmp_path):
    weights, peak = ranks(1).run(restoring_peak, str(tmp_path / "model"))[0]
    assert weights > 8_000_000
    # In addition to the model, one tensor at a time is read. Gated MLPs are half of the model.
    assert weights < peak < 1.1 * weights
