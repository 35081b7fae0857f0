"""The report: page, figures and table show the numbers of report.json and need nothing from outside."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from nemo_modelopt_cli.compress import summary
from nemo_modelopt_cli.compress.settings import Job
from nemo_modelopt_cli.compress.stages import Record
from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import compare
from nemo_modelopt_dropin.report import page as report

LOSSES = {"teacher": 3.44, "prune": 3.83, "distill": 3.52, "scratch": 3.88, "quantize": 3.53}


def _record(name: str, **result) -> Record:
    return Record(name, "f" * 64, "run", {"lr": 0.1}, result, 12.5)


def _records(losses=None) -> dict[str, Record]:
    curve = [{"step": i, "loss": 7 * math.exp(-i / 8) + 3} for i in range(1, 20)] + [{"step": 20, "heldout": 3.5}]
    found = {"pretrain": _record("pretrain", curve=curve)}
    for i, (name, loss) in enumerate((losses or LOSSES).items()):
        found[name] = _record(
            name,
            curve=curve,
            heldout_loss=loss,
            heldout_tokens_per_second=1000.0 + i,
            parameters=2_000_000 - i,
            body_parameters=1_500_000 - i,
            bytes=8_000_000 + i,
            shape={"num_layers": 4},
            device="a processor",
        )
    found["export"] = _record("export", hf={"path": "out/<hf>", "bytes": 1_234_567})
    return found


@pytest.fixture(scope="module")
def content() -> dict:
    return summary.build(_records(), "A <b>title</b> & more", Job("t", "a", "b"))


@pytest.fixture(scope="module")
def folder(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("report")
    report.write(content, path)
    return path


class _Page(HTMLParser):
    """Collects the parts of a page that the tests compare."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.downloads: dict[str, str] = {}
        self.ids: set[str] = set()
        self.scripts: dict[str, str] = {}
        self.cells: list[str] = []
        self.title = ""
        self._inside = ("", "")
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self._inside = (tag, named.get("id") or "")
        self.addresses += [value for name, value in attributes if name in ("src", "href") and value]
        if "download" in named:
            self.downloads[named["download"] or ""] = named["href"] or ""
        if named.get("id"):
            assert named["id"] not in self.ids, (
                f"two elements are called {named['id']}: a figure would replace the other"
            )
            self.ids.add(named["id"])

    def handle_endtag(self, tag):
        self._inside = ("", "")

    def handle_data(self, data):
        tag, name = self._inside
        if tag == "script":
            self.scripts[name] = self.scripts.get(name, "") + data
        elif tag == "td":
            self.cells.append(data)
        elif tag == "title":
            self.title += data


@pytest.fixture(scope="module")
def page(folder) -> _Page:
    return _Page((folder / "report.html").read_text(encoding="utf-8"))


def test_the_page_carries_the_numbers_of_report_json(folder, content, page):
    stored = json.loads((folder / "report.json").read_text())
    assert stored == json.loads(json.dumps(content))  # tuples are lists there
    assert json.loads(page.scripts["report"]) == stored
    for model in stored["models"]:
        assert model["name"] in page.cells
        assert f"{model['heldout_loss']:.4f}" in page.cells
    assert "1.2 MB" in page.cells  # the exported file


def test_the_documentation_lists_the_keys_of_report_json(content):
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text(encoding="utf-8")
    table = text.partition("| key | content |")[2].partition("\n\n")[0]
    keys = [key for row in table.splitlines()[2:] for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(keys) == sorted(content)


def test_the_page_asks_the_network_for_nothing(page):
    assert all(address.startswith("data:") for address in page.addresses)
    specifications = json.loads(page.scripts["specifications"])
    # Data inside; "$schema" is a name, not an address that is loaded.
    assert '"url"' not in json.dumps(specifications)


def test_text_is_escaped(folder, page):
    assert page.title == "A <b>title</b> & more"
    assert "<b>title" not in (folder / "report.html").read_text().replace("\\u003c", "")
    assert "out/<hf>" in page.cells


def test_the_page_fits_phones_paper_and_dark_rooms(folder):
    text = (folder / "report.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in text
    assert "@media print" in text
    assert "@media (prefers-color-scheme: dark)" in text


def test_every_figure_has_its_place_and_its_png(folder, page, content):
    charts = report_charts.charts(content)
    assert len(charts) == 7
    for name, chart in charts.items():
        assert name in page.ids
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert chart["spec"]["width"] == "container"
    assert not list(folder.rglob("*.part"))


def test_every_figure_has_its_data_as_a_download(page, content):
    charts = report_charts.charts(content)
    assert set(page.downloads) == {f"{name}.csv" for name in charts}
    tables = {}
    for name, address in page.downloads.items():
        kind, _, encoded = address.partition(";base64,")
        assert kind == "data:text/csv;charset=utf-8"
        tables[name] = list(csv.DictReader(io.StringIO(base64.b64decode(encoded).decode())))
        assert tables[name], name
    losses = {model["name"]: model["heldout_loss"] for model in content["models"]}
    assert {row["model"]: float(row["loss"]) for row in tables["heldout_by_stage.csv"]} == losses
    seconds = {stage["name"]: stage["seconds"] for stage in content["stages"]}
    assert {row["stage"]: float(row["seconds"]) for row in tables["times.csv"]} == seconds
    assert len(tables["tradeoff.csv"]) == len(content["models"]), "all models, and not only those on the line"


def test_tables_without_a_value_have_an_empty_cell():
    assert report_charts.csv_text([{"a": 1}, {"a": None, "b": "x, y"}]) == 'a,b\n1,\n,"x, y"\n'
    assert report_charts.finite({"a": [math.nan, 1.5, (math.inf, "x")]}) == {"a": [None, 1.5, [None, "x"]]}


def test_figures_show_the_held_out_losses(content):
    values = json.dumps(report_charts.charts(content)["heldout_by_stage"]["spec"])
    for model in content["models"]:
        assert str(model["heldout_loss"]) in values


def test_a_run_without_training_has_fewer_figures():
    records = {name: record for name, record in _records().items() if name in ("teacher", "prune")}
    found = summary.build(records, "t", Job("t", "a", "b"))
    assert set(report_charts.charts(found)) == {"heldout_by_stage", "tradeoff", "sizes", "times"}
    assert "<table" in report.render(found)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_pages_script_is_javascript(page, tmp_path):
    script = tmp_path / "page.mjs"
    script.write_text(page.scripts[""])
    subprocess.run(["node", "--check", str(script)], check=True, timeout=60, capture_output=True)


def test_the_table_fits_80_columns_and_shows_the_same_rows(content):
    screen = io.StringIO()
    Console(width=80, file=screen).print(report.table(content))
    text = screen.getvalue()
    for row in report.rows(content):
        for name, value in row.items():
            assert name == "perplexity" or value in text
    assert "…" not in text


@pytest.mark.parametrize(
    ("changed", "fails"),
    [
        ({}, set()),
        ({"prune": 3.4, "distill": 3.39, "quantize": 3.38}, set()),  # better is no fault
        ({"prune": 3.4}, {"distillation"}),
        ({"distill": 3.7}, {"distillation"}),
        ({"distill": 3.9, "scratch": 4.0, "quantize": 3.9}, {"distillation"}),
        ({"prune": math.nan}, {"pruning", "distillation"}),
        ({"distill": math.nan}, {"distillation", "distilled beats from scratch", "quantization is cheap"}),
        ({"scratch": 3.5}, {"distilled beats from scratch"}),
        ({"quantize": 3.58}, {"quantization is cheap"}),
    ],
)
def test_checks_find_numbers_that_make_no_sense(changed, fails):
    named = {summary.MODELS[name]: loss for name, loss in {**LOSSES, **changed}.items()}
    assert {check["name"] for check in summary.checks(named) if not check["ok"]} == fails


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({}, "Distillation recovered 79% of the 0.3900 nats that pruning cost (at least 50% expected)."),
        ({"distill": 3.4}, "recovered all of the 0.3900 nats that pruning cost; the student is 0.0400 nats better"),
        ({"prune": 3.443}, "from 3.4400 to 3.4430. That is too little to judge distillation by"),
        ({"prune": 3.4, "distill": 3.39}, "Pruning did not raise the held-out loss (3.4400 before, 3.4000 after)"),
        ({"prune": 3.441, "distill": 3.6}, "Distillation changed the held-out loss by +0.1590 nats, from 3.4410 to"),
        ({"distill": 3.9}, "Distillation changed the held-out loss by +0.0700 nats, from 3.8300 to 3.9000 (at most +0"),
        ({"quantize": 3.51997}, "changed the held-out loss by 0.0000 nats"),
    ],
)
def test_sentences_claim_no_more_than_the_numbers(changed, sentence):
    named = {summary.MODELS[name]: loss for name, loss in {**LOSSES, **changed}.items()}
    found = [check["sentence"] for check in summary.checks(named)]
    assert any(sentence in one for one in found), found
    assert ("prune" not in changed) or not any("recovered" in one for one in found)


def test_a_strict_run_fails_loudly(tmp_path, capsys):
    records = _records({**LOSSES, "quantize": 3.58})
    assert summary.finish(records, tmp_path, "t", Job("t", "a", "b"), strict=True) == 1
    assert "FAIL Quantization changed the held-out loss by +0.0600 nats (at most +0.05" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_run_with_good_numbers_ends_well(tmp_path, capsys):
    assert summary.finish(_records(), tmp_path, "t", Job("t", "a", "b"), strict=True) == 0
    assert "FAIL" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (report.millions, 1_404_640, "1.40 M"),
        (report.millions, 8_030_000_000, "8.03 B"),
        (report.megabytes, 226_706, "227 kB"),
        (report.megabytes, 5_822_310, "5.8 MB"),
        (report.megabytes, 2_500_000_000, "2.50 GB"),
        (report.duration, 9.06, "9.1 s"),
        (report.duration, 367, "6 min 7 s"),
        (report.duration, 7260, "2 h 1 min"),
    ],
)
def test_numbers_as_people_read_them(function, value, text):
    assert function(value) == text


def test_embedded_text_cannot_end_its_script_element():
    text = report._embedded({"a": "</script><script>alert(1)</script>"})
    assert not re.search("[<]", text)
    assert json.loads(text)["a"].startswith("</script>")


def _candidate(parameters: int, loss: float, chosen: bool = False) -> dict:
    sizes = {"ffn_hidden_size": parameters, "num_layers": 2}
    return {"parameters": parameters, "loss": loss, "kl": loss / 10, "sizes": sizes, "chosen": chosen}


# --- two runs ---------------------------------------------------------------------------------------------------------


def _two(content) -> list[dict]:
    other = copy.deepcopy(content)
    other["models"] = other["models"][:2]
    other["models"][1]["heldout_loss"] += 0.383
    other["settings"]["job"]["distillation"]["lr"] = 0.5
    return [content, other]


def test_a_comparison_shows_both_numbers_and_the_change(content):
    rows = compare.numbers(_two(content))
    found = {(row["model"], row["number"]): row for row in rows}
    assert found["pruned", "held-out loss"] == {
        "model": "pruned",
        "number": "held-out loss",
        "first": "3.8300",
        "second": "4.2130",
        "change": "+10.0%",
    }
    assert (found["distilled", "perplexity"]["second"], found["distilled", "perplexity"]["change"]) == ("", "")
    assert compare.different_settings(_two(content)) == [("distillation.lr", "0.0001", "0.5")]


@pytest.mark.parametrize(
    ("paths", "names"),
    [(("x/a", "x/b"), ("a", "b")), (("x/a", "y/a"), ("x/a", "y/a")), (("x", "x"), ("A", "B"))],
)
def test_runs_are_called_by_what_differs(paths, names):
    assert compare.labels(Path(paths[0]), Path(paths[1])) == names
