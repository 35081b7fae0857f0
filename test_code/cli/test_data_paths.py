"""Megatron's tokenized files and folders of chats are checked before NeMo is imported."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemo_modelopt_cli.checks import data_paths
from test_code.support import command_lines


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with checkpoints and two data sets as Megatron's own builder writes them."""
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, dtype in (("one", np.uint16), ("two", np.int32)):
        builder = IndexedDatasetBuilder(f"{name}.bin", dtype=dtype)
        for length in (5, 7, 3):
            builder.add_document(torch.arange(length), [length])
        builder.finalize(f"{name}.idx")
    (tmp_path / "chats").mkdir()
    return tmp_path


def cut(name: str):
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:-1])


def folder_of_one():
    for suffix in (".bin", ".idx"):
        Path("data").mkdir(exist_ok=True)
        shutil.copy(f"one{suffix}", f"data/one{suffix}")


CASES = [
    ("one", None, None),
    ("one two", None, None),
    ("0.3 one 7 two", None, None),
    ("1.0 one", None, None),
    ("s3://bucket/one", None, None),
    ("0.3 one 0.7", None, "a blend alternates weights and paths (0.3 first 0.7 second); there are 2 weights and 1"),
    ("one 0.3 two", None, "there are 1 weights and 2 paths"),
    ("0.3 0.7 one two", None, "there are 2 weights and 2 paths"),
    ("0.3", None, "there are 1 weights and 0 paths"),
    ("nan one 0 two", None, "the weights of a blend must be positive, got nan, 0"),
    ("none", None, "none: there is no none.bin and no none.idx"),
    ("on", None, "on: there is no on.bin and no on.idx; did you mean one?"),
    ("0.5 one 0.5 none", None, "--data_paths none: there is no"),
    ("one", lambda: Path("one.bin").unlink(), "there is no one.bin"),
    ("one", lambda: Path("one.idx").unlink(), "there is no one.idx"),
    ("one.bin", None, "one.bin: leave .bin out; the name stands for a .bin and an .idx file"),
    ("data", folder_of_one, "data is a folder; pass the common beginning of a .bin and an .idx file; did you mean "),
    ("one", cut("one.bin"), "one.bin is cut off: it has 29 of 30 bytes"),
    ("two", cut("two.bin"), "two.bin is cut off: it has 59 of 60 bytes"),
    ("one", cut("one.idx"), "one.idx is cut off: it has "),
    ("one", lambda: Path("one.idx").write_text("x" * 100), "one.idx is not an index of Megatron's tokenized files"),
    ("one", lambda: Path("one.idx").write_text("x"), "one.idx is not an index of Megatron's tokenized files"),
]  # fmt: skip


@pytest.mark.parametrize("script", ["prune", "distill"])
@pytest.mark.parametrize(("paths", "breaks", "problem"), CASES)
def test_data_paths(here, capsys, script, paths, breaks, problem):
    if breaks:
        breaks()
    command = command_lines.RUNS[script].replace("--text text.jsonl", f"--data_paths {paths}").split()
    if problem is None:
        command_lines.script_of(script).resolve([*command, "--dry-run"])
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve([*command, "--dry-run"])
    found = capsys.readouterr().err
    assert problem in found and len(found.splitlines()) == 2


@pytest.mark.parametrize(
    ("split", "legal"),
    [("99,1,0", True), ("1", True), ("8 1 1", True), ("99,1,0,0", False), ("0,0", False), ("a,1", False),
     ("-1,2", False), ("nan,1,1", False), ("", False)],
)  # fmt: skip
def test_splits(here, split, legal):
    given = command_lines.script_of("prune").parser().read([*command_lines.RUNS["prune"].split(), f"--split={split}"])
    found = data_paths.problems(given)
    assert found == [] if legal else "must be up to three numbers of at least 0" in found[0]


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        ({}, "training.jsonl is missing"),
        ({"training.jsonl": '{"messages": [{"role": "user", "content": "a"}]}'}, "validation.jsonl is missing"),
        ({"training.jsonl": "{", "validation.jsonl": '{"text": "a"}'}, "training.jsonl cannot be read: line 1 is not"),
        ({"training.jsonl": '{"text": "a"}', "validation.jsonl": '{"text": "a"}'}, None),
        (None, "there is no such folder"),
    ],
)
def test_folders_of_chats(here, capsys, files, problem):
    folder = "none" if files is None else "chats"
    for name, content in (files or {}).items():
        (here / "chats" / name).write_text(content)
    chats = f"--data_paths {folder} --use-chat-data --tokenizer owner/name"
    command = command_lines.RUNS["distill"].replace("--text text.jsonl", chats).split()
    if problem is None:
        command_lines.script_of("distill").resolve(command)
        return
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve(command)
    assert problem in capsys.readouterr().err
