"""The table of readers: it is complete, and layouts, warnings and refusals follow from it."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin.preflight import algorithms, readers

BOTH = (readers.MODELOPT, readers.COMPRESSED_TENSORS)


@pytest.fixture
def in_both(monkeypatch):
    """Let the layouts hold all formats that the table of readers has for them."""
    for name, _ in readers.TABLE:
        layouts = tuple(layout for layout in BOTH if (name, layout) in readers.TABLE)
        monkeypatch.setitem(algorithms.HF_FORMATS, name, algorithms.HfFormat(layouts))


def test_every_format_that_can_be_written_has_a_cell_for_every_reader():
    for name, entry in algorithms.HF_FORMATS.items():
        assert entry.layouts and set(entry.layouts) <= set(readers.LAYOUTS)
        for layout in entry.layouts:
            assert [*readers.cells(name, layout)] == [*readers.READERS], (name, layout)


@pytest.mark.parametrize("pair", readers.TABLE)
def test_a_reader_that_does_not_read_a_folder_has_a_reason(pair):
    assert pair not in readers.OBSTACLES
    for reader, cell in readers.TABLE[pair].items():
        assert cell.how in (readers.RUN, readers.BY_RULES, readers.REFUSED, readers.WRONG)
        assert cell.reads or cell.reason, reader


@pytest.mark.parametrize("name", dict.fromkeys(name for name, _ in readers.TABLE))
def test_a_layout_without_a_row_has_an_obstacle(name):
    for layout in readers.LAYOUTS:
        assert ((name, layout) in readers.TABLE) is not ((name, layout) in readers.OBSTACLES), layout


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("FP8", readers.MODELOPT),
        ("NVFP4", readers.MODELOPT),
        ("W4A16_NVFP4", readers.MODELOPT),
        ("MXFP8", readers.MODELOPT),
        ("FP8_PB_WO", readers.COMPRESSED_TENSORS),
        ("W4A8_AWQ", readers.MODELOPT),
        ("FP8_PER_CHANNEL_PER_TOKEN", readers.COMPRESSED_TENSORS),
        ("FP8_WO", readers.COMPRESSED_TENSORS),
        ("W8A8_SQ_PER_CHANNEL", readers.COMPRESSED_TENSORS),
        ("W8A16", readers.COMPRESSED_TENSORS),
        ("W4A16_AWQ", readers.COMPRESSED_TENSORS),
    ],
)
def test_auto_is_the_layout_that_most_servers_read(in_both, name, layout):
    assert algorithms.layout_of(name) == algorithms.layout_of(name, "auto") == layout
    for one in algorithms.HF_FORMATS[name].layouts:
        assert algorithms.layout_of(name, one) == one


def test_a_layout_that_no_server_reads_has_a_warning(in_both):
    assert algorithms.reader_warning("int8", "W8A8_SQ_PER_CHANNEL", readers.MODELOPT) == (
        "int8 in the layout modelopt: no known server reads it; --hf-layout compressed-tensors is read by vLLM, "
        "SGLang, transformers"
    )
    assert algorithms.reader_warning("int8", "W8A8_SQ_PER_CHANNEL") is None
    assert algorithms.reader_warning("fp8", "FP8", readers.MODELOPT) is None


def test_programs_that_read_no_experts_are_not_named_for_models_with_experts(in_both):
    assert readers.text("FP8_PER_CHANNEL_PER_TOKEN", readers.MODELOPT) == "vLLM, TensorRT-LLM"
    assert readers.text("FP8_PER_CHANNEL_PER_TOKEN", readers.MODELOPT, experts=True) == "no known server"
    assert algorithms.reader_warning("w4a8_awq", "W4A8_AWQ") is None
    assert algorithms.reader_warning("fp8_pc_pt", "FP8_PER_CHANNEL_PER_TOKEN", readers.MODELOPT, True) == (
        "fp8_pc_pt in the layout modelopt: no known server reads it with experts; --hf-layout compressed-tensors is "
        "read by vLLM, SGLang, transformers"
    )


def test_without_another_layout_the_warning_names_other_algorithms(monkeypatch):
    monkeypatch.setitem(algorithms.HF_FORMATS, "W8A8_SQ_PER_CHANNEL", algorithms.HfFormat())
    assert algorithms.reader_warning("int8", "W8A8_SQ_PER_CHANNEL") == (
        "int8 in the layout modelopt: no known server reads it; use fp8 to serve the model, or the nemo format to "
        "train it further"
    )


def test_a_layout_that_cannot_hold_an_algorithm(in_both):
    assert algorithms.layout_problems("--hf-layout", "w4a8_awq", "compressed-tensors") == [
        "--hf-layout compressed-tensors, algorithm w4a8_awq: the layout compressed-tensors cannot hold W4A8_AWQ "
        "weights (it has no second step of the weights and no static FP8 scale of the inputs); use modelopt (read by "
        "TensorRT-LLM), or auto"
    ]
    assert algorithms.layout_problems("--hf-layout", "int8", "compressed-tensors") == []
    assert algorithms.layout_problems("--hf-layout", "INT8_DEFAULT_CFG", "modelopt") == []
    assert algorithms.layout_problems("--hf-layout", "my_quant.json", "modelopt") == []


def test_an_algorithm_that_hugging_face_files_cannot_hold(monkeypatch):
    monkeypatch.setitem(algorithms.TABLE, "int3", algorithms.Algorithm("INT3_CFG", "INT3", "none", 3, None))
    assert algorithms.layout_problems("--hf-layout", "int3", "auto") == [
        "algorithm int3 cannot be written as Hugging Face files; use the format nemo or trtllm"
    ]


@pytest.fixture
def messages(cpu_backend, monkeypatch):
    """Return the messages that `layout_choice` logs, with their levels."""
    from nemo.collections.llm.modelopt.quantization.export import layout_choice

    found = []

    class Logging:
        info = staticmethod(lambda text: found.append(("info", text)))
        warning = staticmethod(lambda text: found.append(("warning", text)))

    monkeypatch.setattr(layout_choice, "logging", Logging)
    return found


def _log(algorithm, **export):
    from nemo.collections.llm.modelopt import ExportConfig
    from nemo.collections.llm.modelopt.quantization.export import layout_choice
    from nemo.collections.llm.modelopt.quantization.quant_cfg_choices import get_quant_cfg_choices

    settings = {"export_format": "hf", **export}
    layout_choice.log(None, ExportConfig("out", **settings), {algorithm: get_quant_cfg_choices()[algorithm]})


def test_layout_and_readers_are_logged_before_the_calibration(messages, in_both):
    _log("fp8")
    _log("int8")
    _log("int8", hf_layout="modelopt")
    _log("int8", export_format="nemo")
    assert messages == [
        ("info", "fp8 is written in the layout modelopt, which is read by vLLM, SGLang, TensorRT-LLM."),
        ("info", "int8 is written in the layout compressed-tensors, which is read by vLLM, SGLang, transformers."),
        (
            "warning",
            "int8 in the layout modelopt: no known server reads it; --hf-layout compressed-tensors is read by vLLM, "
            "SGLang, transformers.",
        ),
    ]


def test_the_plan_names_the_layout_the_readers_and_the_files(in_both):
    from nemo_modelopt_cli import dry_run

    assert dry_run.hf_layout("int8", "auto") == [
        (
            "hf layout",
            "compressed-tensors, read by vLLM (run), SGLang (accepted by its rules, without experts), transformers "
            "(run)",
        )
    ]
    rows = dry_run.hf_layout("int8", "modelopt")
    assert rows[0] == ("hf layout", "modelopt, read by no known server")
    assert rows[1][1].startswith("warning: int8 in the layout modelopt: no known server reads it; --hf-layout comp")
    assert dry_run.hf_layout("my_quant.json", "auto") == []
