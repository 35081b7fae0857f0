"""NeMo's functional tests of pruning, distillation and PTQ through our scripts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from test_code.support import (
    command_lines,
    devices,
    jobs_checkpoints,
    jobs_hf,
    jobs_prune,
    jobs_quant,
    tiny,
    tolerances,
)

PRUNED = {"hidden_size": 64, "ffn_hidden_size": 128, "num_attention_heads": 4, "num_query_groups": 4, "num_layers": 2}


SETTINGS = """
logit_layers: [output_layer, output_layer]
intermediate_layer_pairs:
  - [decoder.final_layernorm, decoder.final_layernorm]
skip_lm_loss: false
kd_loss_scale: 10.0
"""

SEQ_LENGTH = 64


def prepare(folder: str) -> None:
    """Write Megatron's tokenized files, texts, and a trained Llama of 4 layers, hidden 128, ffn 256, 8 heads."""
    import os

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    here = Path(folder)
    if os.environ["RANK"] == "0":
        builder = IndexedDatasetBuilder(str(here / "corpus.bin"), dtype=np.uint16)
        tokenizer = tiny.tokenizer()
        for text in tiny.texts(300):
            ids = [*tokenizer.text_to_ids(text), tokenizer.eos_id]
            builder.add_document(np.asarray(ids, dtype=np.uint16), [len(ids)])
        builder.finalize(str(here / "corpus.idx"))
        jobs_quant.corpus(here / "texts.jsonl", rows=40)
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 8}
    for name, more in (("teacher", {}), ("student", {"ffn_hidden_size": 128})):
        jobs_quant.make_checkpoint(here / name, llama=True, vocab_size=tiny.VOCABULARY, **{**sizes, **more})
        jobs_checkpoints.ranks.reset()


def run_script(name: str, layout: str, *arguments: str) -> int:
    """Run a script as a rank that torchrun started; return its exit code."""
    with jobs_checkpoints.world_of(layout):
        return command_lines.script_of(name).main([*devices.flags(), *arguments])


def quantized_logits(hf: str, nemo: str):
    """Return the logits of a quantized Hugging Face checkpoint and of the NeMo checkpoint, on one rank."""
    with jobs_checkpoints.world_of("1 rank"):
        return jobs_quant.hf_logits(hf, nemo)


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """A teacher, a student with half its MLP, Megatron's tokenized files, and texts."""
    found = tmp_path_factory.mktemp("functional")
    ranks_factory(2).run(prepare, str(found))
    (found / "pair.yaml").write_text(SETTINGS)
    return found


@pytest.fixture
def data(folder):
    paths = ["--data_paths", "1.0", str(folder / "corpus"), "--index_mapping_dir", str(folder / "index")]
    return [*paths, "--seq_length", str(SEQ_LENGTH)]


def test_pruning_at_pp2(ranks, folder, data):
    """Width and depth at once, measured on 32 samples; two stages cut what one does."""
    loaded = []
    for layout, stages in (("PP=2", 2), ("1 rank", 1)):
        target = folder / f"pruned{stages}"
        arguments = ["--restore_path", str(folder / "teacher"), "--legacy_ckpt", "--tp_size", "1"]
        arguments += ["--pp_size", str(stages), "--devices", str(stages), "--mbs", "2", "--num_train_samples", "32"]
        arguments += [word for name, size in PRUNED.items() for word in (f"--target_{name}", str(size))]
        run = ranks(stages).run(run_script, "prune", layout, *arguments, *data, "--save_path", str(target))
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
        run = ranks(stages).run(run_script, "distill", layout, *arguments, *data)
        assert run == [0] * stages
        (checkpoint,) = (logs / "kd").rglob("*-last")
        assert 4 < float(re.search(r"val_loss=([\d.]+)", checkpoint.name)[1].rstrip(".")) < 6, "of the saved weights"
        loaded.append(ranks(2).run(jobs_checkpoints.read, str(checkpoint), "TP=2")[0])
        # The same command ends at once, and with more steps it continues from there.
        for steps, samples in (("5", "20.0"), ("7", "28.0")):
            again = [
                steps if before == "--max_steps" else word
                for before, word in zip(["", *arguments], arguments, strict=False)
            ]
            assert ranks(stages).run(run_script, "distill", layout, *again, *data) == [0] * stages
            assert {path.name.split("consumed_samples=")[1] for path in (logs / "kd").rglob("*-last")} == {
                f"{samples}-last"
            }
    (name, weights, loss), (_, alone, loss_alone) = loaded
    assert name == "LlamaModel" and 4 < loss < 6
    # Sums in another order, five optimizer steps on.
    assert loss == pytest.approx(loss_alone, rel=tolerances.of_scripts("loss"))
    for key, value in weights.items():
        assert (value - alone[key]).abs().max() < tolerances.of_scripts("weight"), key


def test_ptq_at_tp2_to_nemo_and_hf(ranks, folder):
    for form in ("nemo", "hf"):
        arguments = ["-nc", str(folder / "teacher"), "-algo", "fp8", "-calib_ds", str(folder / "texts.jsonl")]
        arguments += ["-calib_size", "8", "-bs", "2", "-sl", str(SEQ_LENGTH), "-ctp", "2"]
        arguments += ["--export_format", form, "-out", str(folder / form), "--legacy_ckpt"]
        assert ranks(2).run(run_script, "ptq", "TP=2", *arguments) == [0, 0]
    theirs, ours = ranks(2).run(quantized_logits, str(folder / "hf"), str(folder / "nemo"))[0]
    jobs_hf.assert_same_logits(theirs, ours)
