"""vLLM serves every folder whose format it has, with the log probabilities of the quantized model in memory."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from nemo_modelopt_dropin.preflight import readers
from test_code.serving import cells, client
from test_code.support import jobs_serving

pytestmark = pytest.mark.serving

PAIRS = [(family, cell) for cell in (*cells.VLLM, *cells.OPTIONS) for family in cell.families]
# Each format is made wrong once, and one with experts.
DOUBLED = [
    (family, cell)
    for family, cell in PAIRS
    if family == "llama" or (family, cell.name) == ("mixtral", "mxfp8-modelopt")
]
# Formats with stored scales of inputs.
STATIC = [("llama", cell) for cell in cells.VLLM if cell.algorithm in ("fp8", "int8", "int8_sq", "nvfp4", "nvfp4_awq")]
SWAPPED = [(family, cells.VLLM[0]) for family in ("llama", "mixtral")]


def ids(pairs) -> list[str]:
    """Return the names of tests."""
    return [f"{family}-{cell.name}" for family, cell in pairs]


@pytest.fixture(scope="module")
def ahead(request, made, exported):
    """Return a function that returns a folder, the model in memory and the original log probabilities.

    A thread makes the exports in the order of the tests, while vLLM serves others.
    """
    pool = ThreadPoolExecutor(1)
    futures: dict[tuple, Future] = {}

    def make(family: str, cell: cells.Cell) -> tuple:
        _, _, original = made(family)
        return *exported(family, cell.algorithm, cell.layout, quant=cell.quant), original

    for item in request.session.items:
        wanted = getattr(item, "callspec", None)
        if item.path == request.path and wanted and "cell" in wanted.params:
            key = wanted.params["family"], wanted.params["cell"]
            if key not in futures:
                futures[key] = pool.submit(make, *key)
    yield lambda *key: futures[key].result()
    pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def served(engine, ahead, rows):
    """Return a function that serves an export and returns its row: the divergence, its bound, and what computed."""
    done: dict[tuple, dict] = {}

    def serve(family: str, cell: cells.Cell) -> dict:
        if (family, cell) not in done:
            folder, memory, original = ahead(family, cell)
            answer = engine.serve(folder)
            assert answer["version"].startswith(readers.READERS[readers.VLLM]), "the table names another version"
            assert all(len(tokens) == 4 for tokens in answer["tokens"])
            row = {
                "family": family,
                "algorithm": cell.label,
                "layout": cell.layout,
                "served": jobs_serving.divergence(memory.logprobs, answer["logprobs"]),
                "bound": client.bound(memory.noise),
                "quantization": jobs_serving.divergence(memory.logprobs, original),
                "kernels": ", ".join(answer["kernels"]),
                "cache": answer["cache"],
            }
            done[family, cell] = row
            rows.append(row)
        return done[family, cell]

    return serve


@pytest.mark.parametrize(("family", "cell"), PAIRS, ids=ids(PAIRS))
def test_vllm_serves_what_is_in_memory(served, family, cell):
    row = served(family, cell)
    assert row["served"] <= row["bound"]
    assert row["cache"] == (8 if cell.quant.get("enable_kv_cache") else 16)


def assert_broken(engine, ahead, served, target, family, cell, name, change):
    """Serve an export with other tensors; its divergence must exceed the bound of the export."""
    row = served(family, cell)
    folder, memory, _ = ahead(family, cell)
    answer = engine.serve(client.changed(folder, target, change))
    row[name] = jobs_serving.divergence(memory.logprobs, answer["logprobs"])
    assert row[name] > row["bound"]


@pytest.mark.parametrize(("family", "cell"), DOUBLED, ids=ids(DOUBLED))
def test_the_bound_is_broken_by_a_doubled_scale(engine, ahead, served, tmp_path, family, cell):
    assert_broken(engine, ahead, served, tmp_path / "wrong", family, cell, "doubled scale", client.double_scale)


@pytest.mark.parametrize(("family", "cell"), STATIC, ids=ids(STATIC))
def test_the_bound_is_broken_by_a_small_scale_of_inputs(engine, ahead, served, tmp_path, family, cell):
    assert_broken(engine, ahead, served, tmp_path / "wrong", family, cell, "input scale", client.shrink_input_scale)


@pytest.mark.parametrize(("family", "cell"), SWAPPED, ids=ids(SWAPPED))
def test_the_bound_is_broken_by_exchanged_layers(engine, ahead, served, tmp_path, family, cell):
    assert_broken(engine, ahead, served, tmp_path / "wrong", family, cell, "swapped", client.swap)


@pytest.mark.parametrize(("family", "cell"), [p for p in PAIRS if p[1].algorithm == "auto"])
def test_mixtures_contain_both_formats(ahead, family, cell):
    folder, _, _ = ahead(family, cell)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    layers = section.get("quantized_layers", {}).values()
    assert len({entry["quant_algo"] for entry in layers} or section["config_groups"]) == 2
