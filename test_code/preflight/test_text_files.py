"""Every script reads the files of texts that its checks accept; errors name the file and the line."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from nemo_modelopt_cli import parser
from nemo_modelopt_dropin.preflight import chat_rows, data_files
from test_code.support import command_lines, tiny

TEXTS = [f"text number {i}: naïve café" for i in range(300)]
OPENAI = [
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": text},
                  {"role": "assistant", "content": "yes"}]}
    for text in TEXTS
]  # fmt: skip
SHAREGPT = [
    {"conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "yes"}], "system": "be brief"}
    for text in TEXTS
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('bad role') }}"
    "{% endif %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
)
FORMATS = ("jsonl", "JSONL.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "json", "parquet", "bom.jsonl", "plain.jsonl")


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(folder: Path, ending: str, rows: list[dict]) -> Path:
    """Write the rows in one of `FORMATS` (or as .txt) and return the file."""
    path = folder / f"texts.{ending}"
    content = lines(rows).encode()
    if ending == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
        return path
    if ending.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(content)
        return path
    if ending == "txt":
        content = "\n".join(row["text"] for row in rows).encode()
    elif ending == "json":
        content = json.dumps(rows, indent=1).encode()
    elif ending.startswith("plain"):
        content = lines([row.get("text") or row.get("messages") or row.get("conversations") for row in rows]).encode()
    elif ending.startswith("bom"):
        content = b"\xef\xbb\xbf" + content
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.get(ending.rpartition(".")[2])
    path.write_bytes(pack(content) if pack else content)
    return path


@pytest.fixture
def tokenizer():
    found = tiny.tokenizer()
    found.tokenizer.chat_template = TEMPLATE
    return found


@pytest.mark.parametrize("ending", [*FORMATS, "txt"])
def test_checks_and_training_read_the_same_formats(tmp_path, tokenizer, ending):
    from nemo_modelopt_cli import tokens

    path = write(tmp_path, ending, [{"text": text} for text in TEXTS])
    assert parser.text_problems({"--text": str(path)}) == []
    assert [row.strip() for row in tokens.read_documents(path)] == TEXTS
    newline = "\n" if ending == "txt" else ""  # but for the last line
    expected = [id for t in TEXTS for id in [*tokenizer.text_to_ids(t + newline * (t != TEXTS[-1])), tokenizer.eos_id]]
    assert tokens.encode(path, tokenizer).tolist() == expected


@pytest.mark.parametrize(
    ("ending", "rows"),
    # A bare list of turns has no system prompt next to it.
    [(end, rows) for end in FORMATS for rows in (OPENAI, SHAREGPT) if not (end[:5] == "plain" and rows is SHAREGPT)],
)
def test_chats_go_through_the_chat_template(tmp_path, tokenizer, ending, rows):
    from nemo.collections.llm.modelopt.quantization.calibration import batching, sources
    from nemo_modelopt_cli import tokens

    path = write(tmp_path, ending, rows)
    assert parser.text_problems({"--text": str(path)}) == []
    laid_out = [f"<s>system be brief</s><s>user {text}</s><s>assistant yes</s>" for text in TEXTS]
    ids = [tokenizer.text_to_ids(text) for text in laid_out]
    assert tokens.encode(path, tokenizer).tolist() == [id for row in ids for id in [*row, tokenizer.eos_id]]
    found = list(sources.rows(str(path), None, None, pytest.fail))
    assert batching.tokenize(found, tokenizer, 9) == [row[:9] for row in ids]
    assert list(sources.rows(rows, None, None, pytest.fail)) == found


def test_chats_need_a_tokenizer_with_a_template(tmp_path, tokenizer):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo_modelopt_cli import tokens

    path = write(tmp_path, "jsonl", OPENAI)
    with pytest.raises(ModelOptConfigError, match=r"texts.jsonl: .*the tokenizer has no chat template. Use the"):
        tokens.encode(path, tiny.tokenizer())
    path.write_text(lines([{"messages": [{"role": "wizard", "content": "a"}]}]))
    with pytest.raises(ModelOptConfigError, match="chat template rejects a conversation with the roles wizard: bad"):
        tokens.encode(path, tokenizer)


def test_turns_in_parts_and_calls_of_tools():
    found = chat_rows.chat(
        [
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
            {"from": "observation", "value": "c"},
        ]
    )
    assert found.messages == (
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": 1}]},
        {"role": "tool", "content": "c"},
    )


def test_a_sentencepiece_template_is_used(tmp_path):
    class SentencePiece:
        chat_template = {"prefix": ""}

        def text_to_ids(self, messages):
            return [len(messages), len(messages[0]["content"])]

    assert chat_rows.encode(chat_rows.chat(OPENAI[0]["messages"]), SentencePiece()) == [3, 8]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"text": "a"}\n\n{"text": "b\\ud800c"}\n', "a.jsonl, line 3: character 2 of the text is '\\ud8"),
        ("a.json", '[{"text": "a"}, {"text": "\\udfff"}]', "a.json, item 2 of the array: character 1"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 1: character 1 of the text"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": 3}]}', "line 1: turn 1 of the conversation has no text"),
        ("a.jsonl", '{"messages": [{"speaker": "x"}]}', "turn 1 of the conversation has the fields ['speaker']; expec"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": "a"}, 3]}', "turn 2 of the conversation is a int; expe"),
        ("a.jsonl", '{"text": "a"}\n{"text": 3}\n', "a.jsonl, line 2: contains a value of type int instead of a text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ', "a.jsonl cannot be read: line 2 is not valid JSON"),
        ("a.jsonl", '{"text": ""}\n{"text": " \\n"}\n', "a.jsonl is empty, or all of its rows are blank"),
        ("a.txt", "\n \n", "a.txt is empty, or all of its rows are blank"),
        ("a.json", '[{"text": "a"}] [{"text": "b"}]', "a.json cannot be read: there is text after the end of"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "a.jsonl cannot be read: 'utf-8' codec can't decode"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("packed", [False, True])
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, name, content, problem, packed):
    path = tmp_path / (f"{name}.gz" if packed else name)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(gzip.compress(content) if packed else content)
    found = data_files.problem(str(path))
    assert found is not None and problem.replace(name, path.name) in found


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "jsonl.bz2", "jsonl.xz", "parquet"])
def test_files_that_were_cut_off(tmp_path, ending):
    path = write(tmp_path, ending, [{"text": f"{text} {i**i}"} for i, text in enumerate(TEXTS)])
    path.write_bytes(path.read_bytes()[:-60])
    found = data_files.problem(str(path))
    assert found is not None and found.startswith(f"{path} cannot be read")
    if ending == "jsonl.gz":
        assert "after line" in found and "ended before the end-of-stream marker" in found


def test_lists_on_lines_are_not_one_array(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(lines(row["messages"] for row in OPENAI))
    assert sum(1 for _ in data_files.rows([path], None, "text")) == len(OPENAI)


@pytest.mark.parametrize("ending", ["jsonl.gz", "jsonl.zst", "json", "parquet", "txt"])
@pytest.mark.parametrize("script", ["prune", "distill", "compress", "ptq"])
def test_every_script_accepts_them(tmp_path, monkeypatch, script, ending):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    name = write(tmp_path, ending, [{"text": text} for text in TEXTS]).name
    command = command_lines.COMPRESS if script == "compress" else command_lines.RUNS[script]
    command_lines.script_of(script).resolve(command.replace("text.jsonl", name).split())


@pytest.mark.parametrize("script", ["prune", "distill", "compress", "ptq"])
def test_every_script_looks_at_all_rows_that_it_will_use(tmp_path, monkeypatch, capsys, script):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n' * 30 + '{"text": "\\ud800"}\n')
    command = command_lines.COMPRESS if script == "compress" else command_lines.RUNS[script]
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(command.split())
    assert "text.jsonl, line 31: character 1 of the text is '\\ud800', half of a surrogate" in capsys.readouterr().err


def test_rows_in_memory_are_checked_alike(cpu_backend):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.calibration import sources

    with pytest.raises(ModelOptConfigError, match=r"row 2: character 1 of the text is '\\ud800'"):
        sources.check(["a", "\ud800"], None, 10)
    with pytest.raises(ModelOptConfigError, match="has no row with text: all rows are blank"):
        sources.check(["", " \n", None], None)


@pytest.mark.parametrize("script", ["prune", "distill", "compress", "ptq"])
def test_a_missing_template_is_reported_before_nemo_is_imported(tmp_path, monkeypatch, capsys, script):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("model", "teacher"):
        shutil.copytree(tiny.tokenizer_folder(), tmp_path / name / "context" / "tokenizer")
    (tmp_path / "text.jsonl").write_text(lines(OPENAI))
    command = (command_lines.COMPRESS if script == "compress" else command_lines.RUNS[script]).split()
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of(script).resolve(command)
    assert "text.jsonl holds conversations, but the tokenizer in" in capsys.readouterr().err
    for name in ("model", "teacher"):
        (tmp_path / name / "context" / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    command_lines.script_of(script).resolve(command)
