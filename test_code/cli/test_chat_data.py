"""Conversations to distill on: which tokens count, how samples are packed, and runs of the command on them."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_modelopt_dropin.preflight import chat_rows
from test_code.support import chats, command_lines, devices, jobs_packed


@pytest.fixture
def here(tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replies_of(row, template):
    """Return the ids of a conversation, and the text of the tokens that count, joined."""
    tokenizer = chats.tokenizer(template)
    ids, counted = chat_rows.encode_answers(chat_rows.chat(row["messages"]), tokenizer)
    assert ids == chat_rows.encode(chat_rows.chat(row["messages"]), tokenizer), "the tokens are those of the template"
    assert len(counted) == len(ids)
    return ids, tokenizer.tokenizer.decode([token for token, one in zip(ids, counted, strict=True) if one])


@pytest.mark.parametrize("template", [chats.MARKED, chats.PLAIN])
def test_only_the_replies_of_the_assistant_count(cpu_backend, template):
    for row in chats.rows(6):
        replies = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        _, text = replies_of(row, template)
        assert text == "".join(f"{reply}</s>" for reply in replies)


def test_a_conversation_may_begin_with_the_assistant(cpu_backend):
    row = {"messages": [{"role": "assistant", "content": "all numbers"}, {"role": "user", "content": "some text"}]}
    assert replies_of(row, chats.MARKED)[1] == "all numbers</s>"
    # Without marks, the first reply begins where the text does.
    assert replies_of(row, chats.PLAIN)[1] == "<s>assistant.all numbers</s>"


def test_replies_that_cannot_be_found_raise_an_error(cpu_backend, monkeypatch):
    row = chat_rows.chat(chats.rows(1)[0]["messages"])
    with pytest.raises(chat_rows.ChatError, match="changes earlier turns, so the reply in turn 2 .*endgeneration"):
        chat_rows.encode_answers(row, chats.tokenizer(chats.FORGETFUL))
    with pytest.raises(chat_rows.ChatError, match="no chat template. Use the tokenizer of an instruction-tuned model"):
        chat_rows.encode_answers(row, chats.tokenizer(None))

    class Slow:
        chat_template, is_fast = chats.MARKED, False

    class Wrapped:
        tokenizer = Slow()

    with pytest.raises(chat_rows.ChatError, match="Use a fast tokenizer of Hugging Face with a chat template, or"):
        chat_rows.encode_answers(row, Wrapped())


def text_module(folder, kind="TextDataModule", **more):
    from nemo_modelopt_cli import packed, tokens

    sizes = {"micro_batch_size": 1, "global_batch_size": 1, "train_samples": 4, "seq_length": 16}
    module = {"TextDataModule": tokens.TextDataModule, "Packed": packed.PackedTextDataModule}[kind]
    return module(folder / "text.jsonl", "no checkpoint", tokenizer=chats.tokenizer(), **{**sizes, **more})


@pytest.mark.parametrize("answers", [False, True])
def test_windows_count_the_predicted_tokens_of_replies(cpu_backend, tmp_path, answers):
    path = chats.write(tmp_path / "text.jsonl", 5)
    with path.open("a") as file:
        file.write(json.dumps({"text": "every rank learns"}) + "\n")
    dataset = text_module(tmp_path, answer_only_loss=answers).val_dataloader().dataset
    windows = [dataset[i] for i in range(len(dataset))]
    inner = chats.tokenizer().tokenizer
    counted = torch.cat([window["labels"][window["loss_mask"] > 0] for window in windows])
    if not answers:
        assert all(window["loss_mask"].all() for window in windows)
        return
    replies = "".join(
        f"{turn['content']}</s>" for row in chats.rows(5) for turn in row["messages"] if turn["role"] == "assistant"
    )
    # A row of plain text counts whole; the last window may leave tokens out.
    assert (replies + "every rank learns</s>").startswith(inner.decode(counted)) and len(counted) > 40


@settings(max_examples=60, deadline=None)  # the first example imports torch
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(40, 90))
def test_bins_hold_each_row_once_and_nothing_is_too_long(lengths, size):
    from nemo_modelopt_cli.packed import bins

    found = bins(lengths, size)
    assert sorted(place for one in found for place in one) == list(range(len(lengths)))
    filled = [sum(lengths[place] for place in one) for one in found]
    assert all(0 < one <= size for one in filled)
    # Best fit leaves at most one bin half empty.
    assert sum(2 * one <= size for one in filled) <= 1


def test_a_packed_sequence_keeps_its_parts_apart(cpu_backend):
    from nemo_modelopt_cli.packed import PackedRows

    rows = [([5, 6, 7, 8], [True, False, True, True]), ([9, 10], [True, True]), ([11, 12, 13], [False, True, False])]
    dataset = PackedRows(rows, 8, padding=1)
    (found,) = [dataset[i] for i in range(len(dataset))]
    assert found["tokens"].tolist() == [5, 6, 7, 11, 12, 9, 1, 1]
    assert found["labels"].tolist() == [6, 7, 8, 12, 13, 10, 1, 1]
    assert found["loss_mask"].tolist() == [0, 1, 1, 1, 0, 1, 0, 0]
    assert found["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert found["cu_seqlens"].tolist() == [0, 3, 5, 6, 8, -1]
    assert (found["cu_seqlens_argmin"].item(), found["max_seqlen"].item()) == (5, 3)


def test_each_pass_over_packed_sequences_has_another_order(cpu_backend):
    from nemo_modelopt_cli.packed import PackedRows

    rows = [([token, token], [True, True]) for token in range(3, 15)]
    dataset = PackedRows(rows, 2, padding=1, samples=1000)
    size = len(dataset.bins)
    passes = [[tuple(dataset[turn * size + i]["tokens"].tolist()) for i in range(size)] for turn in range(3)]
    assert len({tuple(sorted(one)) for one in passes}) == 1 and len(set(map(tuple, passes))) == 3
    again = PackedRows(rows, 2, padding=1, samples=20)
    assert tuple(again[7]["tokens"].tolist()) == passes[7 // size][7 % size], "a sample depends on its number alone"


def test_long_rows_are_cut_and_rows_without_a_counted_token_are_left_out(cpu_backend, tmp_path, caplog):
    chats.write(tmp_path / "text.jsonl", 6)
    module = text_module(tmp_path, "Packed", packed_sequence_size=64, seq_length=24, answer_only_loss=True)
    dataset = module.train_dataloader().dataset
    assert max(len(ids) for ids, _ in dataset.rows) == 25
    assert all(any(counted[1:]) for _, counted in dataset.rows)
    assert "rows have more than 24 tokens and are cut" in caplog.text
    with pytest.raises(ValueError, match="no token of its 6 rows counts in the loss within --seq_length 2"):
        text_module(tmp_path, "Packed", packed_sequence_size=64, seq_length=2, answer_only_loss=True).train_dataloader()


_CHATS = "--data_paths chats --use-chat-data --tokenizer tokenizer"


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ("--text text.jsonl --packed_sequence_size 16 --mbs 2", "needs --mbs 1, got 2.*--packed_sequence_size 32 with"),
        ("--text text.jsonl --packed_sequence_size 4 --mbs 1", "must be at least --seq_length 8"),
        ("--text text.jsonl --packed_sequence_size 0 --mbs 1", "--packed_sequence_size must be at least 1, got 0"),
        ("--text text.jsonl --packed_sequence_size 16 --mbs 1 --cp 2 --devices 4", "needs --cp 1, got 2"),
        (f"{_CHATS} --packed_sequence_size 16 --mbs 1", "needs? --text; .* pass their files as --text"),
        ("--use_mock_data --answer_only_loss", "--answer_only_loss needs? --text"),
        (_CHATS, "--use-chat-data: the tokenizer in tokenizer has no chat template; set --chat-template-path"),
        ("--text chats/training.jsonl --tokenizer tokenizer", "the tokenizer in tokenizer has no chat template"),
        ("--text text.jsonl --chat-template-path text.jsonl", "--chat-template-path replaces the template of --tokeni"),
    ],
)
def test_what_cannot_work_is_reported_before_nemo_is_imported(here, capsys, flags, problem):
    (here / "tokenizer").mkdir()
    (here / "tokenizer" / "tokenizer_config.json").write_text("{}")
    for name in ("training", "validation"):
        chats.write(here / "chats" / f"{name}.jsonl", 2)
    command = command_lines.RUNS["distill"].replace("--text text.jsonl", flags).replace("--tp 2", "")
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve(command.split())
    assert re.search(problem, capsys.readouterr().err)


@pytest.fixture(scope="module")
def models(ranks_factory, tmp_path_factory):
    """Return a folder with a teacher, a student, conversations and a tokenizer with a template."""
    folder = tmp_path_factory.mktemp("chats")
    ranks_factory(1).run(jobs_packed.checkpoints, str(folder))
    for name, count in (("training", 12), ("validation", 8)):
        chats.write(folder / "chats" / f"{name}.jsonl", count)
    return folder


@pytest.mark.parametrize(
    ("size", "data"),
    [
        (2, "--data_paths {0}/chats --use-chat-data --index_mapping_dir {1}/index --mbs 2 --tp_size 2"),
        (1, "--text {0}/chats/training.jsonl --heldout_text {0}/chats/validation.jsonl --answer_only_loss "
         "--packed_sequence_size 128 --mbs 1"),
    ],
)  # fmt: skip
def test_the_command_distills_on_conversations(ranks, models, tmp_path, size, data):
    line = (
        f"{' '.join(devices.flags())} --name kd --log_dir {tmp_path} "
        f"--model_path {models}/student --teacher_path {models}/teacher "
        f"--tokenizer {models}/tokenizer --seq_length 64 --gbs 2 --max_steps 2 --warmup_steps 0 --log_interval 1 "
        f"--val_check_interval 2 --limit_val_batches 1 {data.format(models, tmp_path)}"
    )
    found = ranks(size).run(jobs_packed.run_distill, line, timeout=300)[0]
    assert {"distillation loss", "validation loss", "checkpoint"} <= found.keys()
    assert float(found["distillation loss"].split()[0]) > 0
    assert {path.name for path in (models / "chats").iterdir()} == {"training.jsonl", "validation.jsonl"}
