"""vLLM serves every folder whose format it has, with the log probabilities of the quantized model in memory."""

from __future__ import annotations

import pytest

from test_code.serving import cells, client

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def plain(engine, made):
    """Return a function that returns how far vLLM is from the model in memory before quantization."""
    done: dict[str, float] = {}

    def measure(family: str) -> float:
        if family not in done:
            folder, _, expected = made(family)
            done[family] = client.divergence(expected, engine.serve(folder / "original")["logprobs"])
        return done[family]

    return measure


@pytest.fixture(scope="module")
def served(engine, made, exported, plain, rows):
    """Return a function that serves an export and returns its row: the divergence, its bound, and what computed."""
    done: dict[tuple[str, str], dict] = {}

    def serve(family: str, cell: cells.Cell, **settings) -> dict:
        if (family, cell.name + str(settings)) not in done:
            _, _, original = made(family)
            folder, expected = exported(family, cell.algorithm, cell.layout, **settings)
            answer = engine.serve(folder)
            quantization = client.divergence(expected, original)
            row = {
                "family": family,
                "algorithm": cell.algorithm + " +kv" * bool(settings),
                "layout": cell.layout,
                "served": client.divergence(expected, answer["logprobs"]),
                "bound": client.bound(plain(family), quantization, cell.allowed),
                "quantization": quantization,
                "kernels": ", ".join(answer["kernels"]),
            }
            assert all(len(tokens) == 4 for tokens in answer["tokens"])
            done[family, cell.name + str(settings)] = row
            rows.append(row)
        return done[family, cell.name + str(settings)]

    return serve


PAIRS = [(family, cell) for cell in cells.VLLM for family in cell.families]


@pytest.mark.parametrize(("family", "cell"), PAIRS, ids=[f"{family}-{cell.name}" for family, cell in PAIRS])
def test_vllm_serves_what_is_in_memory(served, family, cell):
    row = served(family, cell)
    assert row["served"] <= row["bound"]


@pytest.mark.parametrize(
    ("family", "cell"),
    [(family, cell) for family, cell in PAIRS if family in ("llama", "mixtral")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_the_bound_is_broken_by_wrong_tensors(engine, exported, served, tmp_path, family, cell):
    row = served(family, cell)
    folder, expected = exported(family, cell.algorithm, cell.layout)
    for name, change in (("doubled scale", client.double_scale), ("swapped", client.swap)):
        answer = engine.serve(client.changed(folder, tmp_path / name, change))
        row[name] = client.divergence(expected, answer["logprobs"])
        assert row[name] > row["bound"], name


@pytest.mark.parametrize("family", ["llama", "qwen2-tied"])
def test_vllm_reads_the_scales_of_the_kv_cache(served, family):
    # Two kinds of computed values are rounded: inputs, and the cache.
    row = served(family, cells.Cell("fp8", cells.MODELOPT, True, share=1.5), quant={"enable_kv_cache": True})
    assert row["served"] <= row["bound"]
