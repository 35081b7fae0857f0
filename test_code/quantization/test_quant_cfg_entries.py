"""The two forms of a quant_cfg: a dictionary until modelopt 0.43, a list of entries from 0.44."""

import copy
import fnmatch
import json
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.nn import TensorQuantizer

from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import _quant_cfg_check, quant_cfg_entries
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization._quant_cfg import base_quant_cfg

FP8 = {"num_bits": (4, 3), "axis": None}
INT4 = {"num_bits": 4, "block_sizes": {-1: 128, "type": "static"}}
DICTIONARY = {
    "*weight_quantizer": [INT4, FP8],
    "*input_quantizer": {**FP8, "enable": False},
    "nn.BatchNorm1d": {"*": {"enable": False}},
    "*lm_head*": {"enable": False},
    "default": {"enable": False},
}
LIST = [
    {"quantizer_name": "*", "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": [INT4, FP8]},
    {"quantizer_name": "*input_quantizer", "cfg": FP8, "enable": False},
    {"quantizer_name": "*", "parent_class": "nn.BatchNorm1d", "enable": False},
    {"quantizer_name": "*lm_head*", "enable": False},
]


def form(monkeypatch, takes_lists):
    monkeypatch.setattr(quant_cfg_entries, "TAKES_LISTS", takes_lists)


def test_a_default_is_the_first_entry_wherever_it_is():
    found = quant_cfg_entries.entries({"quant_cfg": DICTIONARY})
    assert found[0].is_default
    assert [str(entry) for entry in found] == [
        "*",
        "*weight_quantizer",
        "*input_quantizer",
        "nn.BatchNorm1d: *",
        "*lm_head*",
    ]
    assert [len(entry.steps) for entry in found] == [0, 2, 1, 0, 0]


def test_a_list_has_the_same_entries_as_the_dictionary():
    def meaning(quant_cfg):
        return [
            (str(e), e.disables or any(s.get("enable") is False for s in e.steps), [s["num_bits"] for s in e.steps])
            for e in quant_cfg_entries.entries(quant_cfg)
        ]

    assert meaning({"quant_cfg": DICTIONARY}) == meaning({"quant_cfg": LIST})


def test_a_dictionary_becomes_a_list_for_a_version_that_takes_lists(monkeypatch):
    form(monkeypatch, True)
    given_ = {"quant_cfg": DICTIONARY, "algorithm": "awq_lite"}
    before = copy.deepcopy(given_)
    assert quant_cfg_entries.native(given_, "q.json") == {"quant_cfg": LIST, "algorithm": "awq_lite"}
    assert given_ == before


def test_a_list_becomes_a_dictionary_for_a_version_that_takes_dictionaries(monkeypatch):
    form(monkeypatch, False)
    found = quant_cfg_entries.native({"quant_cfg": LIST}, "q.json")["quant_cfg"]
    assert list(found) == ["default", "*weight_quantizer", "*input_quantizer", "nn.BatchNorm1d", "*lm_head*"]
    assert found["nn.BatchNorm1d"] == {"*": {"enable": False}}
    # The attributes that an earlier entry sets have their defaults, as an entry of a list replaces them all.
    assert found["*input_quantizer"] == {**FP8, "block_sizes": None, "enable": False}
    # In a dictionary, attributes alone do not enable what "default" disabled.
    assert all(step["enable"] for step in found["*weight_quantizer"])


@pytest.mark.parametrize("takes_lists", [True, False])
def test_the_native_form_is_kept_as_it_is(monkeypatch, takes_lists):
    form(monkeypatch, takes_lists)
    quant_cfg = {"quant_cfg": LIST if takes_lists else DICTIONARY}
    found = quant_cfg_entries.native(quant_cfg, "q.json")
    assert found == quant_cfg and found["quant_cfg"] is not quant_cfg["quant_cfg"]


@pytest.mark.parametrize("base", [DICTIONARY, LIST], ids=["dictionary", "list"])
@pytest.mark.parametrize("other", [{"*k_bmm*": FP8}, [{"quantizer_name": "*k_bmm*", "cfg": FP8}]], ids=["dict", "list"])
def test_settings_of_either_form_extend_those_of_the_other(base, other):
    quant_cfg = {"quant_cfg": copy.deepcopy(base)}
    quant_cfg_entries.extend(quant_cfg, {"quant_cfg": other})
    assert type(quant_cfg["quant_cfg"]) is type(base)
    last = quant_cfg_entries.entries(quant_cfg)[-1]
    assert (last.wildcard, last.steps[0]["num_bits"], last.enables) == ("*k_bmm*", (4, 3), True)


def test_the_last_of_several_settings_with_one_wildcard_counts():
    listed = [*LIST, {"quantizer_name": "*weight_quantizer", "cfg": FP8}, {"quantizer_name": "*input*", "cfg": FP8}]
    off = {"quantizer_name": "*input*", "enable": False}
    found = list(choices.quantizer_settings({"quant_cfg": listed}))
    assert found == [("*weight_quantizer", FP8), ("*input*", FP8)]
    assert list(choices.quantizer_settings({"quant_cfg": [*listed, off]})) == found[:1]


@pytest.mark.parametrize(
    "named, added",
    [
        ({}, ["nn.Embedding", "nn.LayerNorm"]),
        ({"quantizer_name": "*position_embeddings.weight_quantizer", "cfg": FP8}, ["nn.LayerNorm"]),
        ({"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False}, ["nn.LayerNorm"]),
        ({"quantizer_name": "*input_layernorm.input_quantizer", "cfg": FP8}, ["nn.Embedding"]),
    ],
)
def test_embeddings_and_norms_are_left_out_unless_a_setting_names_them(monkeypatch, named, added):
    monkeypatch.setattr(quant_cfg_entries, "_NEWLY_QUANTIZED", {"nn.Embedding": "embed", "nn.LayerNorm": "norm"})
    quant_cfg = {"quant_cfg": [*LIST, *([named] if named else [])]}
    before = len(quant_cfg["quant_cfg"])
    quant_cfg_entries.leave_as_before(quant_cfg)
    assert [entry["parent_class"] for entry in quant_cfg["quant_cfg"][before:]] == added


@pytest.mark.parametrize("algorithm", ["weights.json", "INT8_DEFAULT_CFG", "FP8_DEFAULT_CFG"])
def test_no_wildcard_quantizes_an_embedding_or_a_norm(tmp_path, algorithm):
    path = tmp_path / "weights.json"
    both = {"*weight_quantizer": {"num_bits": 8}, "*input_quantizer": {"num_bits": 8}}
    path.write_text(json.dumps({"quant_cfg": {**both, "default": {"enable": False}}}))
    model = torch.nn.ModuleDict(
        {"words": torch.nn.Embedding(8, 8), "ln": torch.nn.LayerNorm(8), "linear": torch.nn.Linear(8, 8)}
    )
    name = str(path) if algorithm == path.name else algorithm
    quant_cfg, _ = base_quant_cfg(name, {}, lambda name: json.loads(Path(name).read_text()))
    mtq.quantize(model, {**quant_cfg, "algorithm": "max"}, lambda m: m["linear"](m["ln"](m["words"].weight)))
    on = [name for name, one in model.named_modules() if isinstance(one, TensorQuantizer) and one.is_enabled]
    assert on == ["linear.input_quantizer", "linear.weight_quantizer"]


@pytest.mark.parametrize(
    "listed, message",
    [
        ([{"quantizer_name": "*", "enable": True}], r'q\.json: "enable" alone for \'\*\' needs nvidia-modelopt 0\.44'),
        (
            [
                {"quantizer_name": "*", "parent_class": "nn.Linear", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": FP8},
                {"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": FP8},
            ],
            r"q\.json: entries with \"parent_class\" 'nn\.Linear' must follow each other",
        ),
    ],
)
def test_a_list_without_a_dictionary_of_the_same_meaning_is_an_error(monkeypatch, listed, message):
    form(monkeypatch, False)
    with pytest.raises(ModelOptConfigError, match=message):
        quant_cfg_entries.native({"quant_cfg": listed}, "q.json")


@pytest.mark.parametrize(
    "entry, message",
    [
        (3, r"q: entry 0 is 3; expected an object"),
        ({"cfg": FP8}, r"q: entry 0 is .*expected an object"),
        ({"quantizer_name": "*", "cfgs": FP8}, r"q: entry 0 \('\*'\): unknown field 'cfgs'.*[Dd]id you mean"),
        ({"quantizer_name": "*", "enable": 1}, r'"enable" is 1; expected true or false'),
        ({"quantizer_name": "*", "enable": False, "parent_class": 2}, r'"parent_class" is 2; expected a name'),
        ({"quantizer_name": "*"}, r'sets nothing: "cfg" is None'),
        ({"quantizer_name": "*", "cfg": {}}, r'sets nothing: "cfg" is \{\}'),
        ({"quantizer_name": "*", "cfg": "int8"}, r"is 'int8'; expected attributes of a quantizer"),
        ({"quantizer_name": "*", "cfg": {"num_bit": 8}}, r"unknown field 'num_bit'"),
    ],
)
def test_a_wrong_entry_of_a_list_is_named(entry, message):
    with pytest.raises(ModelOptConfigError, match=message):
        _quant_cfg_check.check({"quant_cfg": [entry]}, "q")


@pytest.mark.parametrize("settings_", [DICTIONARY, LIST], ids=["dictionary", "list"])
def test_options_apply_to_both_forms(settings_):
    quant_cfg = {"quant_cfg": copy.deepcopy(settings_), "algorithm": "awq_lite"}
    choices.set_awq_block_size(quant_cfg, 32)
    assert [a.get("block_sizes", {}).get(-1) for _, a in choices.quantizer_settings(quant_cfg)] == [32, None]
    cache = {"*[kv]_bmm_quantizer": FP8} if isinstance(settings_, dict) else [
        {"quantizer_name": "*[kv]_bmm_quantizer", "cfg": FP8}
    ]  # fmt: skip
    first = {"default": {"enable": False}} if isinstance(settings_, dict) else [LIST[0]]
    before = choices.enabled_quantizers(quant_cfg, "layers.0", ("weight_quantizer",))
    choices.enable_kv_cache(quant_cfg, {"quant_cfg": {**first, **cache} if isinstance(cache, dict) else first + cache})
    assert choices.has_kv_cache(quant_cfg)
    assert choices.enabled_quantizers(quant_cfg, "layers.0", ("weight_quantizer",)) == before != {}
    choices.disable_kv_cache(quant_cfg)
    assert not choices.has_kv_cache(quant_cfg) and len(quant_cfg["quant_cfg"]) == len(settings_)
    quant_cfg_entries.add(quant_cfg, "layers.0.*", {"enable": False})
    assert set(choices.enabled_quantizers(quant_cfg, "layers.1", ("weight_quantizer", "input_quantizer"))) == {
        "weight_quantizer"
    }
    assert not choices.enabled_quantizers(quant_cfg, "layers.0", ("weight_quantizer",))


ATTRIBUTES = st.fixed_dictionaries(
    {"num_bits": st.sampled_from([4, 8, (4, 3)])}, optional={"axis": st.sampled_from([0, None])}
)
ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["*weight_quantizer", "*input_quantizer", "*quantizer", "0.*", "1.input*"]),
        st.one_of(st.none(), ATTRIBUTES),
    ),
    max_size=5,
)


@settings(deadline=None, max_examples=60)
@given(ENTRIES)
def test_a_converted_list_sets_what_its_entries_say(drawn):
    """modelopt sets on the quantizers of a model what a list says, each entry replacing the ones before."""
    listed = [{"quantizer_name": "*", "enable": False}]
    listed += [
        {"quantizer_name": name, "enable": False} if cfg is None else {"quantizer_name": name, "cfg": cfg}
        for name, cfg in drawn
    ]
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    mtq.replace_quant_module(model)
    mtq.set_quantizer_by_cfg(model, quant_cfg_entries.native({"quant_cfg": listed}, "drawn")["quant_cfg"])
    for name, quantizer in model.named_modules():
        if isinstance(quantizer, TensorQuantizer):
            said = [entry for entry in listed if fnmatch.fnmatch(name, entry["quantizer_name"])]
            assert quantizer.is_enabled == ("cfg" in said[-1]), name
            if quantizer.is_enabled:
                assert quantizer.num_bits == said[-1]["cfg"]["num_bits"], name
                assert quantizer.axis == said[-1]["cfg"].get("axis"), name
