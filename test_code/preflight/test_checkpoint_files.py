"""Checkpoints with missing or broken files are reported before NeMo is imported; whole ones of all kinds pass."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_modelopt_cli import parser
from nemo_modelopt_dropin.preflight import checkpoint_files, model_sizes
from test_code.support import command_lines, jobs_checkpoints, jobs_compress, tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(ranks_factory, tmp_path_factory) -> Path:
    """A real checkpoint, with texts next to it."""
    folder = tmp_path_factory.mktemp("whole")
    ranks_factory(1).run(jobs_compress.make_teacher, str(folder), timeout=240)
    return folder


@pytest.fixture
def checkpoint(made, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))


def cut(name: str, by: int = 100):
    def breaks(folder: Path) -> None:
        file = next(folder.glob(name))
        file.write_bytes(file.read_bytes()[:-by])

    return breaks


def put(name: str, content: str):
    return lambda folder: next(folder.glob(name)).write_text(content)


def remove(name: str):
    def breaks(folder: Path) -> None:
        for path in list(folder.glob(name)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return breaks


BROKEN = {
    "shard cut": (cut("weights/__0_1.distcp"), "weights/__0_1.distcp is cut off: it has "),
    "shard gone": (remove("weights/__0_0.distcp"), "__0_0.distcp missing, named by weights"),
    "shards gone": (remove("weights/*.distcp"), "__0_0.distcp, __0_1.distcp missing, named by weights"),
    "metadata cut": (cut("weights/.metadata"), "weights/.metadata is broken: "),
    "metadata gone": (remove("weights/.metadata"), "weights/.metadata is missing"),
    "json broken": (put("weights/metadata.json", "{"), "weights/metadata.json is not valid JSON"),
    "json gone": (remove("weights/metadata.json"), "weights/metadata.json is missing"),
    "json of another kind": (put("weights/metadata.json", "[]"), "weights/metadata.json holds no JSON object"),
    "common gone": (remove("weights/common.pt"), "weights/common.pt is missing"),
    "weights gone": (remove("weights"), "the folder weights is missing"),
    "weights empty": (remove("weights/*"), "the folder weights is empty"),
    "model.yaml cut": (put("context/model.yaml", "config: {a: ["), "context/model.yaml cannot be read: while parsing"),
    "model.yaml empty": (put("context/model.yaml", ""), "context/model.yaml does not describe a model"),
    "io.json empty": (put("context/io.json", ""), "context/io.json is not valid JSON"),
    "io.json gone": (remove("context/io.json"), "context/io.json is missing"),
    "tokenizer gone": (remove("context/*tokenizer*"), "is missing"),
    "tokenizer emptied": (
        remove("context/*tokenizer*/*"),
        "holds no tokenizer: none of tokenizer.json, tokenizer.model",
    ),
    "tokenizer cut": (cut("context/*tokenizer*/tokenizer.json"), "tokenizer.json is not valid JSON"),
}


def test_a_whole_checkpoint_passes(made):
    assert checkpoint_files.problems(made / "checkpoint") == []
    assert parser.no_checkpoints({"--teacher": str(made / "checkpoint")}) == []


@pytest.mark.parametrize(("breaks", "problem"), BROKEN.values(), ids=BROKEN)
def test_what_is_broken_is_named(checkpoint, breaks, problem):
    if problem.startswith("the folder weights is empty"):
        (checkpoint / "weights" / ".metadata").unlink()
    breaks(checkpoint)
    found = parser.no_checkpoints({"--teacher": str(checkpoint)})
    assert len(found) == 1 or "empty" in problem
    assert f"--teacher {checkpoint}: " in found[0] and problem in found[0]
    # What reads the configuration for other checks does not fail on it.
    assert model_sizes.layers(checkpoint) in (None, 4)
    model_sizes.known(checkpoint)


@pytest.mark.parametrize("layout", ["TP=2", "PP=2"])
def test_checkpoints_of_every_layout_pass(ranks, tmp_path, layout):
    path = str(tmp_path / "own")
    path = ranks(2).run(jobs_checkpoints.write, "plain", path, layout, "in fit", timeout=240)[0][0]
    assert checkpoint_files.problems(path) == []
    shards = sorted(Path(path, "weights").glob("*.distcp"))
    assert len(shards) > 2
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1])
    assert "is cut off" in checkpoint_files.problems(path)[0]


def test_other_kinds_pass(checkpoint):
    weights, context = checkpoint / "weights", checkpoint / "context"
    # LoRA adapters, quantized models
    (weights / "adapter_metadata.json").write_text('{"model_ckpt_path": "base"}')
    (weights / "modelopt_state").mkdir()
    (context / "model.yaml").unlink()  # only people read it
    assert checkpoint_files.problems(checkpoint) == []
    # a tokenizer on a hub, as newer and older versions of NeMo store it
    shutil.rmtree(next(context.glob("*tokenizer*")))
    described = json.loads((context / "io.json").read_text())
    leaf = next(o for name, o in described["objects"].items() if name.startswith("auto_tokenizer"))["items"][0][1]
    for value in ({"type": "ref", "key": "file_artifact_1"}, {**leaf, "value": "owner/name"}):
        leaf.clear()
        leaf.update(value)
        (context / "io.json").write_text(json.dumps(described))
        assert checkpoint_files.problems(checkpoint) == []
    # weights and context in one folder
    for place in (weights, context):
        for file in place.iterdir():
            file.rename(checkpoint / file.name)
        place.rmdir()
    assert checkpoint_files.problems(checkpoint) == []
    # zarr
    for file in [*checkpoint.glob("*.distcp"), checkpoint / ".metadata"]:
        file.unlink()
    (checkpoint / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    assert checkpoint_files.problems(checkpoint) == []


class Evil:
    def __reduce__(self):
        return (exec, ("open('run', 'w').close()",))


def test_nothing_of_the_metadata_is_executed(checkpoint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (checkpoint / "weights" / ".metadata").write_bytes(pickle.dumps({"a": Evil()}))
    assert checkpoint_files.problems(checkpoint) == []  # not a form that we know
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("ptq", "-nc {0} -calib_ds {1} --cpu -algo int8 -out q"),
        ("prune", "--restore_path {0} --save_path p --text {1} --seq_length 8 --target_num_layers 2 --cpu"),
        (
            "distill",
            "--name n --log_dir l --model_path {0} --text {1} --seq_length 8 --max_steps 2 --gbs 2 --mbs 1 --cpu",
        ),
        ("compress", "--teacher {0} --train-text {1} --heldout-text {2} --target-num-layers 2 --cpu"),
    ],
)
def test_a_dry_run_reports_it(made, checkpoint, tmp_path, script, command):
    texts = [str(made / "train.jsonl"), str(made / "heldout.jsonl")]
    cut("weights/__0_1.distcp")(checkpoint)
    for path, code in ((made / "checkpoint", 0), (checkpoint, 2)):
        words = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *command.format(path, *texts).split()]
        found = subprocess.run([*words, "--dry-run"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert found.returncode == code, found.stderr
        assert ("weights/__0_1.distcp is cut off" in found.stderr) is bool(code)
        assert "Traceback" not in found.stderr


# --- Hugging Face -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hugging_face(tmp_path) -> Path:
    folder = tmp_path / "hf"
    shutil.copytree(tiny.tokenizer_folder(), folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    for number in (1, 2):
        save_file({f"w{number}": torch.ones(16, 16)}, folder / f"model-0000{number}-of-00002.safetensors")
    names = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


HF = {
    "whole": (lambda folder: None, None),
    "shard gone": (
        remove("model-00002*"),
        "model-00002-of-00002.safetensors missing, named by model.safetensors.index",
    ),
    "shard cut": (cut("model-00001*", 4), "model-00001-of-00002.safetensors is cut off: it has "),
    "header cut": (cut("model-00001*", 1060), "model-00001-of-00002.safetensors is broken: its header"),
    "no safetensors": (put("model-00001*", "version https://git-lfs"), "is broken: its header does not fit"),
    "index broken": (put("*.index.json", "{"), "model.safetensors.index.json is not valid JSON"),
    "config broken": (put("config.json", "{"), "config.json is not valid JSON"),
    "tokenizer broken": (put("tokenizer.json", "{"), "tokenizer.json is not valid JSON"),
    "no weights": (remove("*model*"), "there are no weights, neither *.safetensors nor *.bin"),
}


@pytest.mark.parametrize(("breaks", "problem"), HF.values(), ids=HF)
def test_folders_of_hugging_face(hugging_face, breaks, problem):
    breaks(hugging_face)
    found = checkpoint_files.problems(hugging_face)
    if problem is None:
        assert found == []
    else:
        assert len(found) == 1 and problem in found[0]


def test_headers_that_lie(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for header in (b"[]", b'{"a": {}}', b'{"a": {"data_offsets": "x"}}', b"\xff"):
        (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        assert "its header cannot be read" in checkpoint_files.problems(tmp_path)[0]


def test_a_tokenizers_folder(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no tokenizer" in checkpoint_files.tokenizer_problems(str(tmp_path / "empty"))[0]
    assert "there is no such folder" in checkpoint_files.tokenizer_problems("/no/such/tokenizer")[0]
    for name in (tiny.tokenizer_folder(), "owner/name", "gpt2", None):
        assert checkpoint_files.tokenizer_problems(name) == []


def test_a_shell_of_the_tests_passes(tmp_path):
    assert checkpoint_files.problems(command_lines.checkpoint(tmp_path / "model")) == []
