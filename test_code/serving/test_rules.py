"""Every folder that we write is one that its readers take, by rules that were read from their source code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nemo_modelopt_dropin.preflight import algorithms, readers
from test_code.serving import cells, rules

FAMILIES = ("llama", "qwen2-tied", "mixtral")


# The router reads the norm before the experts, which can therefore not hold factors of their inputs.
UNWRITABLE = {("mixtral", name, readers.COMPRESSED_TENSORS) for name in ("int4_awq", "int8_sq")}


def written() -> list[tuple[str, str]]:
    """Return each algorithm with each layout that can hold its format."""
    return [
        (name, layout)
        for name, entry in algorithms.TABLE.items()
        if entry.hf_format is not None and algorithms.version_problem(name) is None
        for layout in algorithms.HF_FORMATS[entry.hf_format].layouts
    ]


CASES = [
    (family, algorithm, layout)
    for algorithm, layout in written()
    for family in FAMILIES
    if (family, algorithm, layout) not in UNWRITABLE
]


@pytest.mark.parametrize(("family", "algorithm", "layout"), CASES)
def test_a_folder_keeps_to_the_rules_of_its_readers(made, exported, family, algorithm, layout):
    row = readers.cells(algorithms.get(algorithm).hf_format, layout)
    found = [reader for reader, cell in row.items() if cell.reads and (cell.experts or family != "mixtral")]
    # `test_transformers.py` compares the results of folders in the other layout.
    folder, _ = exported(family, algorithm, layout, **({"draws": 0} if layout == readers.MODELOPT else {}))
    # Factors of inputs move into other layers, and the folder then says NVFP4.
    name = "NVFP4" if algorithm == "nvfp4_awq" and family != "mixtral" else algorithms.get(algorithm).hf_format
    taken = {reader: rules.RULES.get((reader, layout), {}).get(name) for reader in found}
    assert [reader for reader, rule in taken.items() if rule is None] == [], "the table claims more than the rules"
    original = made(family)[0] / "original"
    for reader, rule in taken.items():
        # Experts in INT8 have input scales for each token.
        experts = rules.RULES[reader, layout].get("W8A8_PER_CHANNEL_PER_TOKEN") if algorithm == "int8" else None
        assert rules.problems(rule, layout, folder, original, experts) == [], reader


def test_the_table_names_every_reader_that_a_rule_knows():
    """A rule without an entry in the table would leave a reader out of the documentation."""
    unknown = [
        (reader, layout, name)
        for (reader, layout), formats in rules.RULES.items()
        for name in formats
        if (cell := readers.cells(name, layout).get(reader)) is None or not cell.reads
    ]
    assert unknown == []


def runs() -> dict[tuple[str, str, str], bool]:
    """Return each reader, format and layout that a test runs, and whether it does so with experts.

    `test_vllm.py` serves all cells, and `test_transformers.py` loads those of one layout.
    """
    found: dict[tuple[str, str, str], bool] = {}
    for cell in cells.VLLM:
        experts = "mixtral" in cell.families
        names = [algorithms.get(cell.algorithm).hf_format]
        # Experts in INT8 have input scales for each token.
        names += ["W8A8_PER_CHANNEL_PER_TOKEN"] if cell.algorithm == "int8" else []
        for reader in (readers.VLLM, *([readers.TRANSFORMERS] if cell.layout == cells.COMPRESSED else [])):
            for name in names:
                found[reader, name, cell.layout] = experts or found.get((reader, name, cell.layout), False)
    return found


def test_the_table_says_run_where_a_test_runs_the_reader():
    claimed = {
        (reader, name, layout)
        for name, entry in algorithms.HF_FORMATS.items()
        for layout in entry.layouts
        for reader, cell in readers.cells(name, layout).items()
        if cell.how == readers.RUN or (cell.reads and reader == readers.VLLM)
    }
    assert claimed == set(runs())


def test_the_table_says_where_vllm_reads_experts():
    for (reader, name, layout), experts in runs().items():
        assert reader != readers.VLLM or readers.cells(name, layout)[reader].experts is experts, (name, layout)


def test_the_page_shows_the_divergence_of_all_that_is_served():
    page = Path(__file__).parents[2] / "docs" / "load-exports.md"
    found = re.findall(r"^\| `([^`]+)` \| (\S+) \| [\d.]+ \(", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(found) == sorted((cell.label, cell.layout) for cell in (*cells.VLLM, *cells.OPTIONS))
