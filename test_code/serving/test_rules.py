"""Every folder that we write is one that its readers take, by rules that were read from their source code."""

from __future__ import annotations

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
        if entry.hf_format is not None
        for layout in algorithms.HF_FORMATS[entry.hf_format].layouts
        # AWQ's factors of inputs move into other layers if they can, and the files then say NVFP4 or a mixture.
        if name != "nvfp4_awq"
    ]


CASES = [
    (family, algorithm, layout)
    for algorithm, layout in written()
    for family in FAMILIES
    if (family, algorithm, layout) not in UNWRITABLE
]


@pytest.mark.parametrize(("family", "algorithm", "layout"), CASES)
def test_a_folder_keeps_to_the_rules_of_its_readers(made, exported, family, algorithm, layout):
    name = algorithms.get(algorithm).hf_format
    cells = {reader: cell for reader, cell in readers.cells(name, layout).items() if cell.reads}
    taken = {reader: rules.RULES.get((reader, layout), {}).get(name) for reader in cells}
    assert [reader for reader, rule in taken.items() if rule is None] == [], "the table claims more than the rules"
    folder, _ = exported(family, algorithm, layout)
    original = made(family)[0] / "original"
    for reader, rule in taken.items():
        if family == "mixtral" and not rule.experts:
            continue
        assert rules.problems(rule, layout, folder, original) == [], reader


def test_the_table_names_every_reader_that_a_rule_knows():
    """A rule without an entry in the table would leave a reader out of the documentation."""
    unknown = [
        (reader, layout, name)
        for (reader, layout), formats in rules.RULES.items()
        for name in formats
        if (cell := readers.cells(name, layout).get(reader)) is None or not cell.reads
    ]
    assert unknown == []


def test_every_format_that_vllm_reads_is_served():
    claimed = {
        (entry.hf_format, layout)
        for entry in algorithms.TABLE.values()
        if entry.hf_format is not None
        for layout in algorithms.HF_FORMATS[entry.hf_format].layouts
        if readers.cells(entry.hf_format, layout)[readers.VLLM].reads
    }
    assert claimed == {(algorithms.get(cell.algorithm).hf_format, cell.layout) for cell in cells.VLLM}
