"""Pruning: stand-ins, the right weights are kept, nothing else changes, checkpoints of the result."""

from __future__ import annotations

import json
from unittest.mock import MagicMock, patch

import pytest
import torch

from test_code.drop_in.prune import TestDropLayers, TestPrune, TestPruningConfig, TestSave  # noqa: F401
from test_code.support import devices, installed, tiny, tolerances
from test_code.support import jobs_prune as jobs
from test_code.support.other_sums import assert_equal_but_for_sums

PRUNER = "nemo.collections.llm.modelopt.prune.pruner"


@pytest.fixture
def pruner(cpu_backend):
    import nemo.collections.llm.modelopt.prune.pruner as module

    return module


class TestStandIns:
    """Collaborators are looked up in the module, and a mock model is taken as stock takes it."""

    def test_drop_layers_asks_modelopt_to_drop_and_measures_nothing(self, pruner):
        model = MagicMock()
        with patch(f"{PRUNER}.mtp") as mtp:
            assert pruner.prune_language_model(model, pruner.PruningConfig(drop_layers=[1, 2, 3])) is model
        mtp.plugins.drop_mcore_language_model_layers.assert_called_once_with(model, layers_to_drop=[1, 2, 3])
        mtp.prune.assert_not_called()

    @pytest.mark.parametrize(
        "targets",
        [
            {"ffn_hidden_size": 2048},
            {"hidden_size": 512, "num_layers": 8},
            {"num_attention_heads": 8, "num_query_groups": 4},
            {"mamba_num_heads": 8, "mamba_head_dim": 16},
        ],
    )
    def test_targets_go_to_modelopt_as_export_config(self, pruner, targets):
        model = MagicMock()
        config = pruner.PruningConfig(**{f"target_{name}": size for name, size in targets.items()})
        with patch(f"{PRUNER}.mtp") as mtp, patch(f"{PRUNER}.llm"):
            assert pruner.prune_language_model(model, config, MagicMock(), MagicMock()) is model
        mtp.prune.assert_called_once()
        (given,), keywords = mtp.prune.call_args
        assert given is model
        assert keywords["mode"] == "mcore_minitron"
        assert keywords["constraints"] == {"export_config": targets}
        assert keywords["dummy_input"] is None
        assert callable(keywords["config"]["forward_loop"])
        mtp.plugins.drop_mcore_language_model_layers.assert_not_called()

    def test_empty_drop_layers_fall_back_to_targets(self, pruner):
        config = pruner.PruningConfig(drop_layers=[], target_num_layers=8)
        with patch(f"{PRUNER}.mtp") as mtp:
            pruner.prune_language_model(MagicMock(), config, MagicMock(), MagicMock())
        mtp.prune.assert_called_once()

    def test_a_stand_in_for_the_configuration_is_completed(self, pruner):
        config = pruner._complete(MagicMock(target_hidden_size=8, drop_layers=None))
        assert config == pruner.PruningConfig(target_hidden_size=8)
        own = pruner.PruningConfig(drop_layers=[1])
        assert pruner._complete(own) is own

    def test_a_stand_in_for_the_configuration_is_checked(self, pruner):
        with pytest.raises(ValueError, match="target_num_query_groups=2 needs target_num_attention_heads"):
            pruner._complete(MagicMock(target_num_query_groups=2))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({}, "data_module is required to prune the model."),
            ({"data_module": MagicMock()}, "trainer is required to prune the model."),
        ],
    )
    def test_what_is_missing_is_said_first(self, pruner, given, message):
        with patch(f"{PRUNER}.mtp") as mtp, pytest.raises(AssertionError, match=message):
            pruner.prune_language_model(MagicMock(), pruner.PruningConfig(target_num_layers=2), **given)
        mtp.prune.assert_not_called()

    def test_a_model_without_weights_is_refused(self, pruner):
        from nemo.collections import llm

        model = llm.GPTModel(llm.GPTConfig(num_layers=2, hidden_size=32, num_attention_heads=2), tokenizer=MagicMock())
        with pytest.raises(ValueError, match="holds no Megatron GPT or Mamba model"):
            pruner.prune_language_model(model, pruner.PruningConfig(drop_layers=[1]))


class TestClosedForm:
    @pytest.mark.parametrize("layers", [[2, 3], [1], [4], [1, 3, 4]])
    def test_drop_keeps_the_other_layers_as_they_were(self, ranks, layers):
        out = ranks(1).run(jobs.prune, {"drop_layers": layers})[0]
        kept = [n for n in range(1, 5) if n not in layers]
        assert out["report"]["kept_layers"] == kept
        assert out["sizes"]["num_layers"] == len(kept)
        for name, value in out["after"].items():
            source = name
            if "layers." in name:
                number = int(name.split("layers.")[1].split(".")[0])
                source = name.replace(f"layers.{number}.", f"layers.{kept[number] - 1}.")
            assert torch.equal(value, out["before"][source]), name

    def test_ffn_keeps_the_channels_of_largest_activation(self, ranks):
        before, after, (ffn, _, _) = ranks(1).run(jobs.prune_and_measure, {"target_ffn_hidden_size": 48})[0]
        for number, sums in ffn.items():
            kept = sums.argsort(descending=True)[:48]
            mlp = f"decoder.layers.{number - 1}.mlp."
            assert torch.equal(after[mlp + "linear_fc2.weight"], before[mlp + "linear_fc2.weight"][:, kept])
            gate, up = before[mlp + "linear_fc1.weight"].chunk(2)
            assert torch.equal(after[mlp + "linear_fc1.weight"], torch.cat([gate[kept], up[kept]]))

    def test_depth_drops_the_layers_that_change_least(self, ranks):
        _, _, (_, _, layers) = ranks(1).run(jobs.prune_and_measure, {"target_num_layers": 2})[0]
        report = ranks(1).run(jobs.prune, {"target_num_layers": 2})[0]["report"]
        assert report["kept_layers"] == sorted(sorted(layers, key=layers.get, reverse=True)[:2])

    @pytest.mark.parametrize(
        ("request_", "settings"),
        [
            ({"target_ffn_hidden_size": 64}, {}),
            ({"target_ffn_hidden_size": 40}, {"gated_linear_unit": False, "add_bias_linear": True}),
            ({"target_num_attention_heads": 2}, {}),
            ({"target_num_attention_heads": 2, "target_num_query_groups": 1}, {}),
            ({"target_num_attention_heads": 1, "target_num_query_groups": 1}, {"add_qkv_bias": True}),
            ({"target_num_attention_heads": 3, "target_num_query_groups": 3}, {"num_query_groups": 4}),
            ({"target_num_attention_heads": 2}, {"num_query_groups": 1}),
            ({"target_num_layers": 2}, {}),
            ({"target_num_layers": 3}, {"normalization": "LayerNorm"}),
            ({"drop_layers": [2, 3]}, {"share_embeddings_and_output_weights": True}),
            (
                {"target_ffn_hidden_size": 64, "target_num_attention_heads": 2, "target_num_query_groups": 1},
                {
                    "share_embeddings_and_output_weights": True,
                    "position_embedding_type": "learned_absolute" if installed.LEARNED_POSITIONS_PRUNE else "none",
                },
            ),
        ],
    )
    def test_pruned_forward_is_the_original_with_the_rest_masked(self, ranks, request_, settings):
        expected, found, sizes = ranks(1).run(jobs.masked_and_pruned, request_, **settings)[0]
        assert_equal_but_for_sums(found, expected)
        for name, size in request_.items():
            if name.startswith("target_"):
                assert sizes[name.removeprefix("target_")] == size

    def test_learned_positions_are_refused_where_modelopt_prunes_none(self, ranks):
        said = ranks(1).run(jobs.refusal, {"target_num_layers": 2}, position_embedding_type="learned_absolute")[0]
        if installed.LEARNED_POSITIONS_PRUNE:
            assert said == ""
        else:
            assert "position_embedding_type='learned_absolute'" in said and "modelopt 0.43" in said

    def test_hidden_size_slices_every_weight_by_the_same_channels(self, ranks):
        out = ranks(1).run(jobs.prune, {"target_hidden_size": 40})[0]
        before, after = out["before"], out["after"]
        full = before["decoder.final_layernorm.weight"]
        kept = [int((full == value).nonzero()[0]) for value in after["decoder.final_layernorm.weight"]]
        assert len(set(kept)) == 40
        for name, dim in [
            ("embedding.word_embeddings.weight", 1),
            ("output_layer.weight", 1),
            ("decoder.layers.1.input_layernorm.weight", 0),
            ("decoder.layers.1.self_attention.linear_qkv.weight", 1),
            ("decoder.layers.1.self_attention.linear_proj.weight", 0),
            ("decoder.layers.2.mlp.linear_fc1.weight", 1),
            ("decoder.layers.2.mlp.linear_fc2.weight", 0),
        ]:
            assert torch.equal(after[name], before[name].index_select(dim, torch.tensor(kept))), name
        assert out["sizes"]["kv_channels"] == 16

    def test_a_layer_that_changes_nothing_goes_first(self, ranks):
        assert ranks(1).run(jobs.identity_layer)[0] == [1, 3, 4]

    def test_ratios_are_sizes(self, ranks):
        out = ranks(1).run(
            jobs.prune, {"target_ffn_hidden_size": 0.5, "target_num_layers": 0.75, "target_num_attention_heads": 0.4}
        )[0]
        assert (out["sizes"]["ffn_hidden_size"], out["sizes"]["num_layers"]) == (64, 3)
        assert out["sizes"]["num_attention_heads"] == 2
        assert out["report"]["after"]["parameters"] < out["report"]["before"]["parameters"]


class TestOracle:
    """modelopt as stock drives it; stock's own width and depth run no further than modelopt 0.40 on a CPU."""

    @pytest.mark.parametrize(
        "export_config",
        [
            {"ffn_hidden_size": 64, "hidden_size": 32},
            {"num_layers": 2},
            {"num_attention_heads": 2, "num_layers": 3, "ffn_hidden_size": 96},
        ],
    )
    def test_same_weights_as_modelopt_alone(self, ranks, export_config):
        # Without a loss mask: modelopt counts masked tokens too.
        data = {"masked": False}
        request = {f"target_{name}": size for name, size in export_config.items()}
        ours = ranks(1).run(jobs.prune, request, data=data)[0]["after"]
        theirs = ranks(1).run(jobs.plain_modelopt, export_config, data=data)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    @installed.stock_prunes
    def test_same_weights_as_stock_after_dropping_layers(self, ranks, stock_ranks):
        where, theirs = stock_ranks(1).run(jobs.stock_drop, [2, 4])[0]
        assert installed.is_stock(where)
        ours = ranks(1).run(jobs.stock_drop, [2, 4])[0][1]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def _losses(report: dict) -> list[float]:
    """Take what was measured on floats out of a report and return it."""
    found = [report.pop("original_heldout_loss", 0.0), *report.pop("layer_scores", {}).values()]
    return found + [candidate.pop(name) for candidate in report.get("candidates", []) for name in ("loss", "kl")]


class TestLayouts:
    @pytest.mark.parametrize(
        "request_",
        [
            {"target_num_layers": 3, "target_ffn_hidden_size": 64, "target_hidden_size": 40},
            {"target_num_attention_heads": 2, "target_num_query_groups": 1},
            {"drop_layers": [1, 4]},
        ],
    )
    def test_two_pipeline_stages_prune_as_one_rank(self, ranks, request_):
        one = ranks(1).run(jobs.prune, request_)[0]
        two = ranks(2).run(jobs.prune, request_, pp=2)
        joined = {**two[0]["after"], **two[1]["after"]}
        assert joined.keys() == one["after"].keys()
        assert all(torch.equal(joined[name], one["after"][name]) for name in joined)
        assert two[0]["report"] == two[1]["report"] == one["report"]

    @pytest.mark.parametrize(
        ("request_", "first", "last"),
        [
            ({"target_num_layers": 3, "target_ffn_hidden_size": 64, "target_hidden_size": 40}, 3, None),
            ({"target_num_attention_heads": 2, "target_num_query_groups": 1}, None, 3),
            ({"target_params": "70%", "max_candidates": 2, "heldout_batches": 1}, 1, 3),
            ({"drop_layers": [1, 4]}, 3, None),
        ],
    )
    def test_unequal_pipeline_stages_prune_as_one_rank(self, ranks, request_, first, last):
        stages = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
        one = ranks(1).run(jobs.prune, request_)[0]
        two = ranks(2).run(jobs.prune, request_, pp=2, stages=stages)
        held = [{name.split("layers.")[1][0] for name in rank["before"] if "layers." in name} for rank in two]
        assert held == ([{"0", "1", "2"}, {"3"}] if first == 3 else [{"0"}, {"1", "2", "3"}])
        joined = {**two[0]["after"], **two[1]["after"]}
        assert joined.keys() == one["after"].keys()
        assert all(torch.equal(joined[name], one["after"][name]) for name in joined)
        # fp32 losses of the same numbers: the stages sum them up in another order.
        losses = [_losses(rank["report"]) for rank in (*two, one)]
        assert losses[0] == losses[1] == pytest.approx(losses[2], rel=tolerances.of("loss"))
        assert two[0]["report"] == two[1]["report"] == one["report"]

    def test_two_data_parallel_ranks_prune_as_one(self, ranks):
        request_ = {"target_ffn_hidden_size": 64, "target_hidden_size": 32, "target_num_layers": 3}
        # Twice the batches: a batch of the loader is one rank's.
        one = ranks(1).run(jobs.prune, request_, batches=8)[0]["after"]
        two = ranks(2).run(jobs.prune, request_, batches=4)
        for rank in two:
            assert all(torch.equal(rank["after"][name], one[name]) for name in one)

    def test_tensor_parallel_drop(self, ranks):
        one = ranks(1).run(jobs.prune, {"drop_layers": [2]})[0]
        two = ranks(2).run(jobs.prune, {"drop_layers": [2]}, tp=2)
        assert two[0]["report"] == one["report"]
        assert two[0]["sizes"]["num_layers"] == 3

    def test_batch_sizes_do_not_matter(self, ranks):
        request_ = {"target_ffn_hidden_size": 64, "target_num_attention_heads": 2}
        equal = {"data": {"global_batch_size": 4, "micro_batch_size": 4}, "batches": 4}
        split = {"data": {"global_batch_size": 4, "micro_batch_size": 1}, "batches": 16}
        one, other = (ranks(1).run(jobs.prune, request_, **settings)[0]["after"] for settings in (equal, split))
        assert all(torch.equal(one[name], other[name]) for name in one)


class TestNothingElseChanges:
    def test_callbacks_that_a_validation_adds_go_again(self, ranks):
        assert ranks(1).run(jobs.callbacks_that_validation_adds) == [True]

    @pytest.mark.parametrize(
        "request_", [{"target_ffn_hidden_size": 64}, {"target_num_layers": 2}, {"drop_layers": [1]}]
    )
    def test_after_success(self, ranks, request_):
        changed, error, same, _ = ranks(1).run(jobs.what_changes, request_)[0]
        assert (changed, error) == ([], "")
        assert not same

    def test_after_a_failure_the_model_is_as_it_was_and_can_be_pruned(self, ranks):
        changed, error, same, again = ranks(1).run(jobs.what_changes, {"target_ffn_hidden_size": 64}, fail=True)[0]
        assert error == "OSError: the disk is gone"
        assert changed == []
        assert same
        assert again["ffn_hidden_size"] == 64

    def test_parameters_keep_megatrons_marks(self, ranks):
        before, after = ranks(1).run(jobs.marks)[0]
        assert before == after

    def test_a_model_is_pruned_twice_and_trains(self, ranks):
        sizes, losses = ranks(1).run(
            jobs.twice, {"drop_layers": [1]}, {"target_ffn_hidden_size": 64, "target_num_layers": 2}
        )[0]
        assert (sizes["num_layers"], sizes["ffn_hidden_size"]) == (2, 64)
        assert min(losses[1:]) < losses[0]


class TestScores:
    def test_a_second_target_measures_nothing(self, ranks, tmp_path):
        requests = [{"target_ffn_hidden_size": 96}, {"target_ffn_hidden_size": 64, "target_num_layers": 2}]
        (_, first), (reused, second) = ranks(1).run(jobs.reuse_scores, str(tmp_path / "scores"), requests)[0]
        assert first > 0
        assert second == 0
        fresh = ranks(1).run(jobs.prune, requests[1])[0]["after"]
        assert all(torch.equal(reused[name], fresh[name]) for name in fresh)

    def test_with_two_stages_and_query_groups(self, ranks, tmp_path):
        requests = [{"target_hidden_size": 32}, {"target_num_attention_heads": 2, "target_num_query_groups": 1}]
        out = ranks(2).run(jobs.reuse_scores, str(tmp_path / "scores"), requests, pp=2)
        fresh = ranks(2).run(jobs.prune, requests[1], pp=2)
        for rank, other in zip(out, fresh, strict=True):
            assert rank[1][1] == 0
            assert all(torch.equal(rank[1][0][name], value) for name, value in other["after"].items())

    def test_scores_are_stored_without_pickles_and_planted_ones_run_no_code(self, ranks, tmp_path):
        ranks(1).run(jobs.reuse_scores, str(tmp_path / "scores"), [{"target_ffn_hidden_size": 96}])
        assert sorted(p.name for p in (tmp_path / "scores").iterdir()) == [
            ".nemo-modelopt.json",
            "fingerprint.json",
            "scores-rank0.safetensors",
        ]
        new, old = ranks(1).run(jobs.planted_scores, str(tmp_path / "scores"), str(tmp_path / "ran"))[0]
        assert not (tmp_path / "ran").exists()
        assert "scores-rank0.safetensors is a pickle" in new and "so it is not read" in new
        assert "holds ['scores0.pth'], which torch.save wrote: reading them can run any code" in old

    def test_a_folder_of_the_users_is_refused(self, ranks, tmp_path):
        (tmp_path / "scores1.txt").write_text("mine")
        message = ranks(1).run(jobs.refused, {"target_ffn_hidden_size": 64, "scores_path": str(tmp_path)})[0]
        assert "scores_path" in message and "holds scores1.txt, which this package did not write" in message
        assert [p.name for p in tmp_path.iterdir()] == ["scores1.txt"]

    def test_scores_of_other_data_are_refused(self, ranks, tmp_path):
        message = ranks(1).run(jobs.scores_of_other_data, str(tmp_path / "scores"))[0]
        assert "holds scores of another run (data seed: 1 there, 5 now); use the same model, data" in message

    def test_scores_of_another_model_are_refused(self, ranks, tmp_path):
        message = ranks(1).run(jobs.scores_of_other_model, str(tmp_path / "scores"))[0]
        assert "holds scores of another run (weights" in message


CHECKPOINT_REQUEST = {
    "target_ffn_hidden_size": 64,
    "target_hidden_size": 32,
    "target_num_layers": 2,
    "target_num_attention_heads": 2,
    "target_num_query_groups": 2,
}


@pytest.fixture(scope="module")
def checkpoints(ranks_factory, tmp_path_factory):
    """Return a folder with a checkpoint, and one that llm.prune has made of it."""
    folder = tmp_path_factory.mktemp("prune")
    ranks_factory(1).run(jobs.save_checkpoint, str(folder / "original"))
    ranks_factory(1).run(jobs.prune_checkpoint, str(folder / "original"), str(folder / "pruned"), CHECKPOINT_REQUEST)
    return folder


class TestCheckpoints:
    def test_the_context_tells_the_new_sizes(self, ranks, checkpoints):
        assert not list(checkpoints.glob("*.partial")) + list(checkpoints.glob(".*.partial"))
        assert ranks(1).run(jobs.checkpoint_config, str(checkpoints / "pruned"))[0] == {
            "num_layers": 2,
            "hidden_size": 32,
            "ffn_hidden_size": 64,
            "num_attention_heads": 2,
            "num_query_groups": 2,
            "kv_channels": 16,
        }

    def test_it_trains(self, ranks, checkpoints):
        losses = ranks(1).run(jobs.train_checkpoint, str(checkpoints / "pruned"))[0]
        assert all(torch.isfinite(torch.tensor(losses)))
        assert min(losses[1:]) < losses[0]

    def test_it_loads_at_other_layouts(self, ranks, checkpoints):
        path = str(checkpoints / "pruned")
        _, one = ranks(1).run(jobs.loaded_weights, path)[0]
        _, tensor = ranks(2).run(jobs.loaded_weights, path, tp=2)[0]
        _, pipeline = ranks(2).run(jobs.loaded_weights, path, pp=2)[0]
        # The same sums in another order.
        assert tensor == pytest.approx(one, rel=tolerances.of("loss"))
        assert pipeline == pytest.approx(one, rel=tolerances.of("loss"))

    def test_two_stages_write_the_same_checkpoint(self, ranks, checkpoints):
        source, target = str(checkpoints / "original"), str(checkpoints / "pruned-pp2")
        ranks(2).run(jobs.prune_checkpoint, source, target, CHECKPOINT_REQUEST, pp_size=2)
        one, _ = ranks(1).run(jobs.loaded_weights, str(checkpoints / "pruned"))[0]
        two, _ = ranks(1).run(jobs.loaded_weights, target)[0]
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_uneven_drop_over_stages_is_saved_and_loads(self, ranks, checkpoints):
        source, target = str(checkpoints / "original"), str(checkpoints / "dropped")
        ranks(2).run(jobs.prune_checkpoint, source, target, {"drop_layers": [3]}, data=False, pp_size=2)
        found, _ = ranks(1).run(jobs.loaded_weights, target)[0]
        original, _ = ranks(1).run(jobs.loaded_weights, source)[0]
        assert torch.equal(
            found["decoder.layers.2.mlp.linear_fc1.weight"], original["decoder.layers.3.mlp.linear_fc1.weight"]
        )

    def test_importance_of_a_tensor_parallel_checkpoint(self, ranks, tmp_path):
        """prune.py --tp 2 restores it as two pipeline stages, of 1 + 2 layers, and the result loads at TP=2 again."""
        text = tmp_path / "text.jsonl"
        text.write_text("".join(json.dumps({"text": row}) + "\n" for row in tiny.texts(60)))
        source, there, alone = (str(tmp_path / name) for name in ("source", "there", "alone"))
        # The embedding is padded to a multiple of 96 x TP: 384 rows in the checkpoint, 288 where it is pruned.
        ranks(2).run(jobs.save_checkpoint, source, tp=2, sp=True, num_layers=3, make_vocab_size_divisible_by=96)
        command = ["--restore_path", source, *devices.flags(), "--text", str(text), "--seq_length", "32", "--mbs", "2"]
        command += ["--num_train_samples", "8", "--target_ffn_hidden_size", "64", "--target_num_layers", "2"]
        said = ranks(2).run(jobs.prune_by_script, [*command, "--no_report", "--save_path", there, "--tp", "2"])[0]
        assert [text for text in said if "restored at TP=1 with 2 pipeline stages (1 layers in the first, 2" in text]
        ranks(1).run(jobs.prune_by_script, [*command, "--no_report", "--save_path", alone])
        (found, losses), (expected, _) = (ranks(1).run(jobs.loaded_weights, path)[0] for path in (there, alone))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert found["embedding.word_embeddings.weight"].shape == (288, 64)
        _, split = ranks(2).run(jobs.loaded_weights, there, tp=2)[0]
        # 96 more empty rows take part in the softmax.
        assert split == pytest.approx(losses, abs=0.5)

    def test_stages_of_a_checkpoint_are_as_asked_for(self, ranks, checkpoints):
        source, target = str(checkpoints / "original"), str(checkpoints / "unequal")
        stages = {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 1}
        assert ranks(2).run(jobs.layers_held, source, **stages) == [3, 1]
        ranks(2).run(jobs.prune_checkpoint, source, target, CHECKPOINT_REQUEST, pp_size=2, **stages)
        one, _ = ranks(1).run(jobs.loaded_weights, str(checkpoints / "pruned"))[0]
        two, _ = ranks(1).run(jobs.loaded_weights, target)[0]
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_it_generates(self, ranks, checkpoints):
        (text,) = ranks(1).run(jobs.generate, str(checkpoints / "pruned"))[0]
        assert isinstance(text, str)
