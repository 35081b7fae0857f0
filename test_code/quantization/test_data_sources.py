"""Sources of calibration rows: each yields the same rows, lazily, and reports what is wrong with it."""

from __future__ import annotations

import gzip
import itertools
import json
import tracemalloc
from unittest.mock import patch

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch

from test_code.support import tiny

TEXTS = [f"text number {i}" for i in range(700)]
IDS = [[i + 3, 5, 7] for i in range(20)]


@pytest.fixture(scope="module")
def sources():
    from nemo.collections.llm.modelopt.quantization.calibration import sources as data_sources

    return data_sources


def read(sources, data, column=None, seed=None, count=10_000):
    return list(itertools.islice(sources.rows(data, column, seed, pytest.fail), count))


def lines(rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with the same rows in every kind of file."""
    path = tmp_path_factory.mktemp("sources")
    rows = [{"text": text, "other": i} for i, text in enumerate(TEXTS)]
    (path / "a.jsonl").write_text(lines(rows))
    (path / "a.json").write_text(json.dumps(rows, indent=1))
    (path / "one_line.json").write_text(json.dumps(rows))
    (path / "plain.jsonl").write_text(lines(TEXTS))
    (path / "a.txt").write_text("\n\n".join(TEXTS))
    with gzip.open(path / "a.jsonl.gz", "wt") as file:
        file.write(lines(rows))
    table = pyarrow.table({"text": TEXTS, "body": [text.upper() for text in TEXTS]})
    pyarrow.parquet.write_table(table, path / "a.parquet", row_group_size=100)
    parts = path / "parts" / "deep"
    parts.mkdir(parents=True)
    (path / "parts" / "1.jsonl").write_text(lines(rows[:300]))
    (parts / "2.jsonl").write_text(lines(rows[300:]))
    (path / "parts" / "README.md").write_text("not data")
    return path


@pytest.mark.parametrize(
    "name",
    "a.jsonl a.json one_line.json plain.jsonl a.txt a.jsonl.gz a.parquet parts parts/**/*.jsonl".split(),  # noqa: SIM905
)
def test_files_folders_and_globs(sources, folder, name):
    found = read(sources, str(folder / name))
    assert [row.strip() for row in found] == TEXTS
    assert read(sources, folder / "a.parquet", "body") == [text.upper() for text in TEXTS]


@pytest.mark.parametrize("content", [lines({"ids": row} for row in IDS), json.dumps([{"ids": row} for row in IDS])])
def test_token_ids_in_a_column(sources, tmp_path, content):
    (tmp_path / "ids.json").write_text(content)
    assert read(sources, str(tmp_path / "ids.json"), "ids") == IDS


def test_token_ids_on_lines(sources, tmp_path):
    (tmp_path / "ids.jsonl").write_text(lines(IDS))
    assert read(sources, str(tmp_path / "ids.jsonl")) == IDS


def objects():
    table = datasets.Dataset.from_dict({"text": TEXTS})
    yield "dataset", table
    yield "splits", datasets.DatasetDict(train=table, test=table.select([0]))
    yield "stream", table.to_iterable_dataset()
    yield "list", TEXTS
    yield "generator", (text for text in TEXTS)
    yield "dictionaries", ({"text": text} for text in TEXTS)


@pytest.mark.parametrize(("kind", "data"), list(objects()), ids=[kind for kind, _ in objects()])
def test_python_objects(sources, kind, data):
    sources.check(data, None)
    assert read(sources, data) == TEXTS


@pytest.mark.parametrize("form", [list, tuple, torch.tensor])
def test_iterables_of_token_ids(sources, form):
    assert read(sources, [form(row) for row in IDS]) == IDS


def test_a_data_module_gives_its_training_tokens(sources):
    module = tiny.data(samples=6)
    rows = read(sources, module)
    expected = [batch["tokens"][0].tolist() for batch in module.train_dataloader()]
    assert len(rows) == 6 and [row[:20] for row in rows] == [row[:20] for row in expected]

    class Padded:
        def train_dataloader(self):
            return [{"tokens": torch.tensor([[4, 5, 6, 0, 0, 0], [7, 8, 9, 9, 1, 2]]), "loss_mask": None}]

    # Repeated ids at the end are padding; one of them is kept as the end of the text.
    assert read(sources, Padded()) == [[4, 5, 6, 0], [7, 8, 9, 9, 1, 2]]


def test_empty_rows_do_not_count(sources):
    rows = ["a", "", " ", None, "b", [], "c"]
    assert list(sources.batches(iter(read(sources, rows)), 2, 3, 10)) == [["a", "b"], ["c"]]


@pytest.mark.parametrize("kind", ["a.jsonl", "list", "dataset"])
def test_shuffling_is_a_permutation_by_seed(sources, folder, kind):
    data = {"list": TEXTS, "dataset": datasets.Dataset.from_dict({"text": TEXTS})}.get(kind, str(folder / kind))
    first, again, other = (read(sources, data, seed=seed) for seed in (1, 1, 2))
    assert first == again != other != TEXTS
    assert sorted(first) == sorted(other) == sorted(TEXTS)


def test_a_window_shuffles_an_endless_stream(sources, monkeypatch):
    monkeypatch.setattr(sources, "SHUFFLE_WINDOW", 50)
    found = read(sources, (f"row {i}" for i in itertools.count()), seed=3, count=200)
    numbers = [int(row.split()[1]) for row in found]
    assert len(set(numbers)) == 200 and numbers != sorted(numbers) and max(numbers) < 260


@pytest.mark.parametrize("name", ["big.jsonl", "big.json"])
def test_a_large_file_costs_no_memory(sources, tmp_path, name):
    row = json.dumps({"text": "x" * 1000})
    with open(tmp_path / name, "w") as file:
        rows = itertools.repeat(row, 20_000)
        file.write("\n".join(rows) if name == "big.jsonl" else "[" + ",".join(rows) + "]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in sources.rows(str(tmp_path / name), None, None, pytest.fail)) == 20_000
        # 20 MB of text; of an array in one line only the first million characters are checked.
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


# --- bad data ---------------------------------------------------------------------------------------------------------


class Unready:
    def train_dataloader(self):
        raise RuntimeError("no trainer attached")


class Odd:
    def train_dataloader(self):
        return [{"pixels": 1}]


BAD_FILES = [
    ("no.jsonl", None, None, "there is no such file.*cnn_dailymail"),
    ("*.nothing", None, None, "the pattern matches no file"),
    ("empty", "folder", None, "the folder is empty"),
    ("odd", "odd file", None, "none of its 1 files ends in"),
    ("broken.jsonl", '{"text": "a"}\n{"text": ', "late", "line 2 is not valid JSON"),
    ("broken.json", '[{"text": "a"}, {"text"', "late", "item 2 of the array is not valid JSON"),
    ("binary.jsonl", b"\xff\xfe\x00\x01", None, "cannot be read"),
    ("broken.parquet", b"not parquet", None, "cannot be read"),
    ("broken.jsonl.gz", b"not gzip", None, "cannot be read"),
    ("column.jsonl", '{"body": "a"}', None, r"has no column \"text\"; its columns are \['body'\]"),
    ("value.jsonl", '{"text": {"a": 1}}', None, "contains a value of type dict instead of a text, a list of token ids"),
    ("text.txt", "some text", "body", "is a text file and has no column 'body'"),
]


@pytest.mark.parametrize(("name", "content", "column", "message"), BAD_FILES, ids=[bad[0] for bad in BAD_FILES])
def test_bad_files_are_refused(sources, tmp_path, name, content, column, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    path = tmp_path / name
    if content in ("folder", "odd file"):
        path.mkdir()
        if content == "odd file":
            (path / "data.xls").write_text("")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    # Errors further down are found when the data is read.
    use = read if column == "late" else sources.check
    arguments = (sources, str(path)) if column == "late" else (str(path), column)
    with pytest.raises(ModelOptConfigError, match=message):
        use(*arguments)


@pytest.mark.parametrize(
    ("data", "column", "message"),
    [
        (7, None, "calibration_dataset is a int; use one of"),
        ([], None, "is an empty list"),
        (["a"], "body", "calibration_column='body' needs rows with columns, .*type str"),
        ([{"body": "a"}], None, 'has no column "text"'),
        ([3.5], None, "holds a value of type float"),
        ([[0.5, 1.5]], None, "holds a value of type list.*0.5"),
        (datasets.Dataset.from_dict({"body": ["a"]}), None, r'no column "text"; its columns are \[\'body\'\]'),
        (datasets.DatasetDict(a=datasets.Dataset.from_dict({"text": ["a"]}), b=datasets.Dataset.from_dict({})), None,
         r"has the splits \['a', 'b'\]"),
    ],
)  # fmt: skip
def test_bad_objects_are_refused_before_they_are_used(sources, data, column, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match=message):
        sources.check(data, column)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Unready(), "Unready has no training data.*no trainer attached"),
        (Odd(), "batches of Odd must be dictionaries"),
    ],
)
def test_bad_data_modules(sources, module, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    with pytest.raises(ModelOptConfigError, match=message):
        read(sources, module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration_dataset": "no/such/file.jsonl"}, "there is no such file"),
        ({"calibration_dataset": []}, "is an empty list"),
        ({"calibration_column": ""}, "calibration_column='' must be the name of a column"),
        ({"calibration_column": 3}, "calibration_column=3 must be the name of a column"),
        ({"calibration_shuffle_seed": -1}, "calibration_shuffle_seed=-1 must be an integer, at least 0"),
        ({"calibration_shuffle_seed": 1.5}, "calibration_shuffle_seed=1.5 must be an integer"),
    ],
)
def test_bad_settings_are_refused_before_a_model_is_loaded(settings, message):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q

    with patch("torch.cuda.is_available", return_value=True), pytest.raises(ModelOptConfigError, match=message):
        q.Quantizer(q.QuantizationConfig(**settings), None)._check_inputs()


def test_ptq_looks_at_its_data_before_it_loads_a_model():
    from nemo.collections import llm
    from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError

    # NeMo itself would report that the model does not exist.
    message = "calibration_dataset='dummy' cannot be read: there is no such file"
    with patch("torch.cuda.is_available", return_value=True), pytest.raises(ModelOptConfigError, match=message):
        llm.ptq(
            "no model", ExportConfig(path="out"), quantization_config=QuantizationConfig(calibration_dataset="dummy")
        )


def test_a_real_model_is_not_touched_before_the_data_is_looked_at(cpu_backend):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization import quantizer as q
    from test_code.support import tiny

    model = tiny.model()
    quantizer = q.Quantizer(q.QuantizationConfig(calibration_dataset="dummy"), None)
    with (
        patch.object(model, "freeze") as freeze,
        pytest.raises(ModelOptConfigError, match="calibration_dataset='dummy'"),
    ):
        quantizer.quantize(model)
    freeze.assert_not_called()


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("specials", [False, True])
def test_batched_tokenization_gives_what_single_texts_do(specials):
    from nemo.collections.common.tokenizers import AutoTokenizer

    from nemo.collections.llm.modelopt.quantization.calibration import batching

    tokenizer = AutoTokenizer(tiny.tokenizer_folder(), include_special_tokens=specials)
    texts = tiny.texts(12)
    single = [tokenizer.text_to_ids(text)[:9] for text in texts]
    before = tokenizer.tokenizer.backend_tokenizer.to_str()
    with patch.object(AutoTokenizer, "text_to_ids", AutoTokenizer.text_to_ids) as method:
        assert batching.tokenize(texts, tokenizer, 9) == single
        assert method is AutoTokenizer.text_to_ids
    # Calibration does not change the tokenizer, which an export saves.
    assert tokenizer.tokenizer.backend_tokenizer.to_str() == before


def test_the_tokenizer_is_called_once_for_all_texts():
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    tokenizer = tiny.tokenizer()
    with patch.object(type(tokenizer.tokenizer), "__call__", autospec=True, side_effect=lambda *a, **k: {
        "input_ids": [[1, 2]] * len(a[1])
    }) as call:  # fmt: skip
        assert batching.tokenize(["a", [5, 6, 7], "b"], tokenizer, 2) == [[1, 2], [5, 6], [1, 2]]
    assert call.call_count == 1


@pytest.mark.parametrize(("ids", "named"), [([3, 256], 256), ([-100, 4], -100)])
def test_token_ids_outside_of_the_vocabulary(ids, named):
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.quantization.calibration import batching

    with pytest.raises(ModelOptConfigError, match=f"token id {named}; the model's vocabulary has 256"):
        batching.tokenize([ids], tiny.tokenizer(), 8)


def test_a_hub_out_of_reach_is_said_with_what_to_do(cpu_backend):
    from nemo.collections.llm.modelopt.quantization.calibration import sources as data_sources

    def load(*_, **__):
        raise ConnectionError("Couldn't reach 'wikitext' on the Hub")

    with pytest.raises(ValueError, match=r"'wikitext' cannot be fetched from the hub: .*path of a local file"):
        next(data_sources.rows("wikitext", None, None, load))
