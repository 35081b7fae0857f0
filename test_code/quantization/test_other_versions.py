"""Checkpoints of other versions of modelopt, in parts and made from ours; `make test-across` has real ones."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from test_code.support import installed, jobs_prune, jobs_quant, jobs_state

# One before and one after the change of forms with 0.44, and not the installed one.
OLDER, NEWER = "0.36.0", "0.49.0"
EIGHT = {"num_bits": 8, "axis": 0, "enable": True}


@pytest.fixture(scope="module")
def other(cpu_backend):
    from nemo.collections.llm.modelopt.quantization.insert import other_versions

    return other_versions


def state(writer: str, quant_cfg, **calibration) -> dict:
    """Return a state with a quantization and a calibration as a checkpoint holds it."""
    modes = [
        ("quantize", {"config": {"quant_cfg": quant_cfg, "algorithm": "max"}, "metadata": {}}),
        ("max_calibrate", {"config": {"method": "max", **calibration}, "metadata": {}}),
    ]
    return {"modelopt_version": writer, "modelopt_state_dict": modes}


DICTIONARY = {"*weight_quantizer": dict(EIGHT), "default": {"enable": False}, "*output_layer*": {"enable": False}}
LIST = [
    {"quantizer_name": "*", "parent_class": None, "cfg": None, "enable": False},
    {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0, "effective_bits": 8.5}, "enable": True},
    {"quantizer_name": "*output_layer*", "cfg": None, "enable": False},
]


class TestSettings:
    @pytest.mark.skipif(not installed.KV_CACHE, reason="modelopt 0.37 reads no checkpoints of later versions")
    @pytest.mark.parametrize("quant_cfg, writer", [(DICTIONARY, OLDER), (LIST, NEWER)])
    def test_a_quant_cfg_of_any_form_means_the_same(self, other, quant_cfg, writer):
        from nemo.collections.llm.modelopt.quantization import quant_cfg_entries

        found = other.translated(state(writer, quant_cfg), Path("weights"))
        assert found["modelopt_version"] == other.installed()
        config = found["modelopt_state_dict"][0][1]["config"]
        assert isinstance(config["quant_cfg"], list) is quant_cfg_entries.TAKES_LISTS
        first, second, third, *new = quant_cfg_entries.entries(config)
        assert first.is_default and third.wildcard == "*output_layer*" and third.disables
        assert second.wildcard == "*weight_quantizer" and second.enables
        assert (second.steps[0]["num_bits"], second.steps[0]["axis"]) == (8, 0)
        assert {str(entry) for entry in new} == quant_cfg_entries.left_as_before()

    def test_how_it_was_calibrated_is_left_out_if_unknown(self, other):
        given = state(OLDER, DICTIONARY, of_another_version=True, distributed_sync="neither yes nor no")
        config = other.translated(given, Path("weights"))["modelopt_state_dict"][1][1]["config"]
        assert config == {"method": "max"}
        assert "of_another_version" in given["modelopt_state_dict"][1][1]["config"]

    @pytest.mark.parametrize("value, refused", [(True, True), (3, True), (False, False), (None, False)])
    def test_an_unknown_attribute_that_is_set_raises_an_error(self, other, value, refused):
        given = state(OLDER, {**DICTIONARY, "*weight_quantizer": {**EIGHT, "sparkles": value}})
        if not refused:
            other.translated(given, Path("weights"))
            return
        versions = rf"checkpoint weights was written with modelopt {OLDER}, and modelopt {other.installed()} cannot"
        with pytest.raises(
            ValueError, match=rf"{versions} restore it: its quant_cfg sets 'sparkles'.*Install .*0\.36\."
        ):
            other.translated(given, Path("weights"))

    def test_a_mode_that_is_missing_raises_an_error(self, other):
        given = {"modelopt_version": OLDER, "modelopt_state_dict": [("teleport", {"config": {}, "metadata": {}})]}
        with pytest.raises(
            ValueError, match=r"written with modelopt 0\.36\.0, .*it lacks the mode 'teleport'\. Install"
        ):
            other.translated(given, Path("weights"))

    def test_keys_that_the_installed_version_cannot_read_raise_an_error(self, other, monkeypatch):
        monkeypatch.setattr(other, "installed", lambda: "0.37.0")
        with pytest.raises(ValueError, match=r"written with modelopt 0\.43\.1, and modelopt 0\.37\.0 cannot.*keys"):
            other.translated(state("0.43.1", DICTIONARY), Path("weights"))


class TestQuantizerStates:
    CONTENT = {
        "modelopt_quantizer_state": {
            "weight_quantizer": {
                "_num_bits": (4, 3),
                "_block_sizes": {-1: 16},
                "_pytorch_state_metadata": {"buffers": {"_amax": {"shape": torch.Size([2]), "dtype": torch.float32}}},
                "_amax_for_smoothing": torch.arange(3.0),
            }
        }
    }

    def _bytes(self, saved: bool) -> torch.Tensor:
        stream = io.BytesIO()
        torch.save(self.CONTENT, stream) if saved else stream.write(pickle.dumps(self.CONTENT))
        return torch.frombuffer(bytearray(stream.getvalue()), dtype=torch.uint8)

    @pytest.mark.parametrize("saved", [True, False])
    def test_either_form_becomes_the_installed_one(self, other, saved):
        content = other.recoded(self._bytes(saved)).numpy().tobytes()
        reads_saved = Version(other.installed()) >= Version("0.44")
        found = torch.load(io.BytesIO(content), weights_only=True) if reads_saved else pickle.loads(content)
        ours = found["modelopt_quantizer_state"]["weight_quantizer"]
        smoothing = ours.pop("_amax_for_smoothing")
        expected = {**self.CONTENT["modelopt_quantizer_state"]["weight_quantizer"]}
        assert torch.equal(smoothing, expected.pop("_amax_for_smoothing")) and ours == expected

    @pytest.mark.parametrize("inside", [False, True])
    def test_planted_code_is_not_run(self, other, monkeypatch, tmp_path, inside):
        """Where plain pickles are another version's; the installed version's are read by modelopt itself."""
        monkeypatch.setattr(other.quant_cfg_entries, "TAKES_LISTS", True)
        planted = jobs_state.Planted(str(tmp_path / "planted"))
        content = pickle.dumps(_InTensor(planted) if inside else {"modelopt_quantizer_state": planted})
        with pytest.raises((ValueError, pickle.UnpicklingError), match=r"mkdir"):
            other.recoded(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        assert os.listdir(tmp_path) == []


class _InTensor:
    """Is pickled as a tensor is, with an object in place of its numbers."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self._saved(),)

    def _saved(self) -> bytes:
        stream = io.BytesIO()
        torch.save(self.content, stream)
        return stream.getvalue()


def as_written_by(path: str, version: str) -> None:
    """Change a checkpoint's settings to what another version would have written, in the form of before 0.44."""
    from nemo.collections.llm.modelopt.quantization import quant_cfg_entries

    file = Path(path, "weights", "modelopt_state", "common.pt")
    content = torch.load(file, weights_only=False)
    content["modelopt_version"] = version
    for name, mode in content["modelopt_state_dict"]:
        mode["config"]["of_another_version"] = False
        if name == "quantize":
            listed = quant_cfg_entries.listed(mode["config"], lambda entry: not entry.module_class)["quant_cfg"]
            dictionary = {
                "default" if entry["quantizer_name"] == "*" else entry["quantizer_name"]: {
                    **entry.get("cfg", {}),
                    "enable": entry.get("enable", True),
                }
                for entry in listed
            }
            # Where a dictionary is read in its own order, this one disables everything.
            mode["config"]["quant_cfg"] = {**dictionary, "default": dictionary.pop("default")}
    torch.save(content, file)


def logits_of(path: str) -> torch.Tensor:
    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from test_code.support import tiny

    model, _ = jobs_state.restored(path)
    return hf_verify.quantized_logits(tiny.core(model), tiny.VOCABULARY).rounded


def as_of_another_version(folder: str) -> dict[str, list]:
    """Restore, and train on, a checkpoint before and after its settings are another version's."""
    from test_code.support import ranks

    data = jobs_quant.corpus(Path(folder, "texts.jsonl"))
    source = jobs_quant.make_checkpoint(Path(folder, "source"), llama=True)
    path = str(Path(folder, "fp8"))
    ranks.reset()
    jobs_quant.ptq(source, path, "int8_sq", quant={"calibration_dataset": data, "calibration_dataset_size": 8})
    found: dict[str, list] = {"logits": [], "losses": []}
    for version in (None, OLDER):
        if version:
            as_written_by(path, version)
        ranks.reset()
        found["logits"].append(logits_of(path))
        ranks.reset()
        found["losses"].append(jobs_prune.train_checkpoint(path))
    return found


def test_a_checkpoint_of_another_version_is_the_same_model(ranks, tmp_path):
    found = ranks(1).run(as_of_another_version, str(tmp_path))[0]
    assert torch.equal(*found["logits"])
    assert found["losses"][0] == found["losses"][1]
