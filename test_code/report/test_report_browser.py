"""The pages in a headless browser: they render without errors, fit a phone and show the numbers of report.json."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nemo_modelopt_dropin.report import charts as report_charts
from nemo_modelopt_dropin.report import compare, pruning, quantization
from nemo_modelopt_dropin.report import page as report
from test_code.report.test_report import (
    _candidate,
    content,  # noqa: F401  the fixture
)

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")]

_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=20000"
)
# Shows a page at several widths and writes what it looks like there as JSON: "clipped" are texts of figures outside
# their figure, "cut" are tables and texts that are wider than the page and do not scroll in a box of their own.
_HARNESS = """<!doctype html><meta name="color-scheme" content="light dark"><body><script type="module">
const page = %s, widths = %s, seen = {};
const beyond = (part, box) => part.left < box.left - 1 || part.right > box.right + 1 || part.top < box.top - 1;
for (const width of widths) {
  const frame = document.createElement("iframe");
  Object.assign(frame, { width, height: 900, srcdoc: page });
  document.body.append(frame);
  await new Promise((done) => { frame.onload = done; });
  const inside = frame.contentDocument, charts = [...inside.querySelectorAll(".chart")];
  while (!charts.every((chart) => chart.querySelector("svg"))) await new Promise((done) => setTimeout(done, 20));
  seen[width] = {
    overflow: inside.documentElement.scrollWidth - inside.documentElement.clientWidth,
    wide: charts.filter((chart) => chart.scrollWidth > chart.clientWidth).map((chart) => chart.id),
    rows: [...inside.querySelectorAll("#models tbody tr")].map((row) => [...row.cells].map((cell) => cell.innerText)),
    clipped: charts.flatMap((chart) => [...chart.querySelectorAll("svg text")]
      .filter((text) => text.textContent && text.getBoundingClientRect().width
        && beyond(text.getBoundingClientRect(), chart.getBoundingClientRect()))
      .map((text) => chart.id + ": " + text.textContent)),
    cut: [...inside.querySelectorAll("body *:not(.scroll *):not(svg *):not(pre *):not(thead *):not(script)")]
      .filter((part) => part.getBoundingClientRect().width && part.getBoundingClientRect().right > width + 1)
      .map((part) => part.outerHTML.slice(0, 80)),
    scrolled: [...inside.querySelectorAll(".scroll")].filter((box) => box.scrollWidth > box.clientWidth)
      .map((box) => box.querySelector("table").id + " " + frame.contentWindow.getComputedStyle(box).overflowX),
    cards: [...inside.querySelectorAll(".answers .card")].map((card) => card.innerText),
    embedded: JSON.parse(inside.getElementById("report").textContent),
    texts: Object.fromEntries(charts.map((chart) =>
      [chart.id, [...chart.querySelectorAll("svg text")].map((text) => text.textContent)])),
    marks: Object.fromEntries(charts.map((chart) => [chart.id, chart.querySelectorAll("svg path").length])),
    background: frame.contentWindow.getComputedStyle(inside.body).backgroundColor,
    text: frame.contentWindow.getComputedStyle(inside.querySelector("svg text")).fill,
  };
}
document.body.innerHTML = "";
document.body.append(Object.assign(document.createElement("pre"), { id: "seen", textContent: JSON.stringify(seen) }));
</script>"""


def _chromium(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    profile = folder / "profile"
    shutil.rmtree(profile, ignore_errors=True)
    command = [str(CHROMIUM), *_FLAGS.split(), f"--user-data-dir={profile}", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280, check=True)
    complaints = [line for line in found.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    return found


def _seen(page: str, folder: Path, *flags: str, widths: tuple[int, ...] = (360, 390, 1100)) -> dict:
    harness = folder / "harness.html"
    harness.write_text(_HARNESS % (json.dumps(page).replace("</", "<\\/"), list(widths)), encoding="utf-8")
    dumped = _chromium(folder, *flags, "--dump-dom", harness.as_uri()).stdout
    found = re.search(r'<pre id="seen">(.*?)</pre>', dumped, re.DOTALL)
    assert found, dumped[-2000:]
    return json.loads(re.sub("&(amp|lt|gt);", lambda m: {"amp": "&", "lt": "<", "gt": ">"}[m[1]], found[1]))


def _fits(found: dict) -> None:
    """Check that nothing is cut at this width: what is too wide scrolls in a box of its own."""
    assert found["overflow"] <= 0, "the page must not scroll sideways"
    assert found["wide"] == []
    assert found["clipped"] == []
    assert found["cut"] == []
    assert all(box.endswith(" auto") for box in found["scrolled"]), found["scrolled"]


@pytest.fixture(scope="module")
def whole(content):  # noqa: F811
    """A report with data for every figure."""
    shares = [1 / (1 + i / 4) for i in range(16)]
    return {
        **content,
        "importance": {
            "layers": [{"layer": i, "score": 1 / i, "fate": "dropped" if i == 4 else "kept"} for i in range(1, 5)],
            "candidates": [_candidate(70 - i, 2.0 + i / 10, not i) for i in range(4)],
            "units": [{"kind": kind, "layer": 1, "shares": shares} for kind in ("ffn", "attention")],
        },
        "sensitivity": [{"layer": i, "matrix": "linear_fc1", "error": 0.02 + i / 100} for i in range(1, 5)],
    }


def test_the_report_renders_and_shows_the_numbers_of_report_json(whole, tmp_path):
    page = report.write(whole, tmp_path)
    seen = _seen(page.read_text(encoding="utf-8"), tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text())
    for width in ("360", "390", "1100"):
        found = seen[width]
        _fits(found)
        assert found["scrolled"] == [], "no table of this page needs to scroll"
        assert [card.split("\n")[0] for card in found["cards"]] == ["How small?", "How good?", "How fast?"]
        assert found["embedded"] == stored
        assert set(found["texts"]) == set(report_charts.charts(whole))
        assert min(found["marks"].values()) > 0
        expected = [
            (model["name"], f"{model['heldout_loss']:.4f}", f"{model['perplexity']:.2f}") for model in stored["models"]
        ]
        assert [(row[0], row[1], row[3]) for row in found["rows"]][: len(expected)] == expected
        files = stored["exports"]["hf"]
        assert [(row[0], row[7]) for row in found["rows"]][len(expected) :] == [
            ("hf files", report.megabytes(files["bytes"]))
        ]
        for model in stored["models"]:
            assert f"{model['heldout_loss']:.3f}" in found["texts"]["heldout_by_stage"]
    assert seen["1100"]["background"] == "rgb(255, 255, 255)"
    assert seen["1100"]["text"] == "rgb(29, 36, 48)"


def test_the_report_is_dark_in_the_dark_and_can_be_printed(whole, tmp_path):
    page = report.write(whole, tmp_path)
    text = page.read_text(encoding="utf-8")
    dark = _seen(text, tmp_path, "--blink-settings=preferredColorScheme=0", widths=(1100,))["1100"]
    assert dark["background"] == "rgb(20, 24, 31)"
    assert dark["text"] == "rgb(230, 233, 238)", "texts of figures follow the page"
    _chromium(tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}", page.as_uri())
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_comparison_shows_both_runs(whole, tmp_path):
    other = copy.deepcopy(whole)
    for model in other["models"]:
        model["heldout_loss"] += 0.5
    seen = _seen(compare.render(("runs/a", "runs/b"), [whole, other]), tmp_path)
    for found in seen.values():
        _fits(found)
        assert set(found["texts"]) == {"losses", "tradeoff", "curves"}
        teacher = whole["models"][0]["heldout_loss"]
        row = next(row for row in found["rows"] if row[:2] == ["teacher", "held-out loss"])
        assert row[2:4] == [f"{teacher:.4f}", f"{teacher + 0.5:.4f}"]
        assert {"runs/a", "runs/b"} <= set(found["texts"]["losses"])


def test_the_pages_of_a_pruning_and_of_a_quantization_fit_a_phone(tmp_path):
    sizes = {"parameters": 8_030_261_248, "num_layers": 32, "hidden_size": 4096, "ffn_hidden_size": 14336}
    cost = {"weight_bytes": 16_060_522_496, "flops_per_token": 15_009_316_864, "kv_cache_bytes_per_token": 131_072}
    curve = [1 / (1 + i / 9) for i in range(33)]
    pruned = {
        "before": sizes,
        "after": {**sizes, "parameters": 5_000_000_000},
        "cost": {"before": cost, "after": cost},
        "kept_layers": list(range(1, 33)),
        "layer_scores": {str(i): 1 / i for i in range(1, 33)},
        "hparam_scores": {"ffn_hidden_size": {str(i): curve for i in range(1, 33)}},
        "candidates": [
            {**_candidate(5_000_000_000 + i * 61_000_000, 2.0 + i / 10, not i), "active_parameters": 5_000_000_000}
            for i in range(9)
        ],
        "original_heldout_loss": 1.9,
    }
    layer = {"weight_format": "int4/128 + fp8", "weight_sqnr_db": 20.1, "activation_format": "fp8"}
    quantized = {
        "algorithm": "w4a8_awq",
        "loss_before": 2.0,
        "loss_after": 2.1,
        "kl_to_original": 1e-3,
        "relative_output_error": 0.1,
        "layers": [
            {"layer": f"decoder.layers.{i}.self_attention.linear_qkv", **layer, "activation_sqnr_db": 30.0 + i}
            for i in range(32)
        ],
        "sensitivity": [
            {"group": f"decoder.layers.{i}.self_attention", "kl_to_original": 1e-3 / (i + 1)}
            | {"relative_output_error": 0.1, "loss_increase": 0.01}
            for i in range(32)
        ],
        "settings": {"algorithm": "w4a8_awq", "calibration_dataset": "a/long/path/of/a/corpus" * 9},
    }
    for write, numbers in ((pruning.write, pruned), (quantization.write, quantized)):
        page = write(numbers, tmp_path / write.__module__)
        seen = _seen(page.read_text(encoding="utf-8"), tmp_path)
        for found in seen.values():
            _fits(found)
            assert min(found["marks"].values()) > 0
