"""NeMo's functional tests of pruning, distillation and PTQ through our scripts."""

from __future__ import annotations

import re

import pytest
import torch

from test_code.support import jobs_checkpoints, jobs_functional, jobs_hf, jobs_prune

PRUNED = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "num_layers": 2}


SETTINGS = """
logit_layers: [output_layer, output_layer]
intermediate_layer_pairs:
  - [decoder.final_layernorm, decoder.final_layernorm]
skip_lm_loss: false
kd_loss_scale: 10.0
"""


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """A teacher, a student with half its MLP, Megatron's tokenized files, and texts."""
    found = tmp_path_factory.mktemp("functional")
    ranks_factory(2).run(jobs_functional.prepare, str(found))
    (found / "pair.yaml").write_text(SETTINGS)
    return found


@pytest.fixture
def data(folder):
    paths = ["--data_paths", "1.0", str(folder / "corpus"), "--index_mapping_dir", str(folder / "index")]
    return [*paths, "--seq_length", str(jobs_functional.SEQ_LENGTH)]


def test_pruning_at_pp2(ranks, folder, data):
    """Width and depth at once, measured on 32 samples; two stages cut what one does."""
    loaded = []
    for layout, stages in (("PP=2", 2), ("1 rank", 1)):
        target = folder / f"pruned{stages}"
        arguments = ["--restore_path", str(folder / "teacher"), "--legacy_ckpt", "--tp_size", "1"]
        arguments += ["--pp_size", str(stages), "--devices", str(stages), "--mbs", "2", "--num_train_samples", "32"]
        arguments += [word for name, size in PRUNED.items() for word in (f"--target_{name}", str(size))]
        run = ranks(stages).run(
            jobs_functional.run_script, "prune", layout, *arguments, *data, "--save_path", str(target)
        )
        assert run == [0] * stages
        config = ranks(2).run(jobs_prune.checkpoint_config, str(target))[0]
        assert {name: config[name] for name in PRUNED} == PRUNED and config["kv_channels"] == 16
        loaded.append(ranks(2).run(jobs_checkpoints.read, str(target), "TP=2")[0])
    (name, weights, loss), (_, alone, _) = loaded
    assert name == "LlamaModel" and 5 < loss < 7
    assert weights.keys() == alone.keys()
    assert all(torch.equal(value, alone[key]) for key, value in weights.items())


def test_distillation_at_pp2_from_a_yaml(ranks, folder, data):
    """Five steps with a pair of hidden states; two stages learn what one does."""
    loaded = []
    for layout, stages in (("PP=2", 2), ("1 rank", 1)):
        logs = folder / f"logs{stages}"
        arguments = ["--name", "kd", "--teacher_path", str(folder / "teacher"), "--model_path", str(folder / "student")]
        arguments += ["--distillation_config", str(folder / "pair.yaml"), "--tp_size", "1", "--cp_size", "1"]
        arguments += ["--pp_size", str(stages), "--devices", str(stages), "--log_dir", str(logs), "--max_steps", "5"]
        arguments += ["--gbs", "4", "--mbs", "1", "--warmup_steps", "1", "--val_check_interval", "5"]
        arguments += ["--log_interval", "5", "--limit_val_batches", "2", "--legacy_ckpt"]
        run = ranks(stages).run(jobs_functional.run_script, "distill", layout, *arguments, *data)
        assert run == [0] * stages
        (checkpoint,) = (logs / "kd").rglob("*-last")
        assert 4 < float(re.search(r"val_loss=([\d.]+)", checkpoint.name)[1].rstrip(".")) < 6, "of the saved weights"
        loaded.append(ranks(2).run(jobs_checkpoints.read, str(checkpoint), "TP=2")[0])
        # The same command ends at once, and with more steps it goes on from there.
        for steps, samples in (("5", "20.0"), ("7", "28.0")):
            again = [
                steps if before == "--max_steps" else word
                for before, word in zip(["", *arguments], arguments, strict=False)
            ]
            assert ranks(stages).run(jobs_functional.run_script, "distill", layout, *again, *data) == [0] * stages
            assert {path.name.split("consumed_samples=")[1] for path in (logs / "kd").rglob("*-last")} == {
                f"{samples}-last"
            }
    (name, weights, loss), (_, alone, loss_alone) = loaded
    assert name == "LlamaModel" and 4 < loss < 6
    # fp32 sums in another order, five optimizer steps on.
    assert loss == pytest.approx(loss_alone, rel=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=1e-5)


def test_ptq_at_tp2_to_nemo_and_hf(ranks, folder):
    for form in ("nemo", "hf"):
        arguments = ["-nc", str(folder / "teacher"), "-algo", "fp8", "-calib_ds", str(folder / "texts.jsonl")]
        arguments += ["-calib_size", "8", "-bs", "2", "-sl", str(jobs_functional.SEQ_LENGTH), "-ctp", "2"]
        arguments += ["--export_format", form, "-out", str(folder / form), "--legacy_ckpt"]
        assert ranks(2).run(jobs_functional.run_script, "ptq", "TP=2", *arguments) == [0, 0]
    theirs, ours = ranks(2).run(jobs_functional.quantized_logits, str(folder / "hf"), str(folder / "nemo"))[0]
    jobs_hf.assert_same_logits(theirs, ours)
