"""A teacher with another tokenizer, NaN weights or logits that overflow is reported as the teacher's, at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import lightning.pytorch as pl
import pytest
import sentencepiece
import torch

from nemo_modelopt_dropin.preflight import tokenizer_files
from nemo_modelopt_dropin.preflight.tokenizer_files import Vocabulary
from test_code.support import command_lines, jobs_distill, tiny


class Damage(pl.Callback):
    """Change weights before the checkpoint is written."""

    def __init__(self, how: str):
        self.how = how

    @torch.no_grad()
    def on_train_end(self, trainer, pl_module):
        core = tiny.core(pl_module)
        if self.how == "nan":
            core.decoder.layers[1].mlp.linear_fc1.weight[3, 5] = float("nan")
        elif self.how == "inf":
            core.decoder.layers[2].self_attention.linear_proj.weight[0, 0] = float("-inf")
        elif self.how == "overflow":
            core.output_layer.weight.fill_(1e38)
            core.decoder.final_layernorm.weight.fill_(1e3)


def make(path: str, how: str) -> str:
    """Write a teacher damaged in its weights ("nan", "inf", "overflow") or tokenizer ("vocabulary", "merges")."""
    with jobs_distill.alone():
        # The callback comes first: callbacks that are passed run before the one that saves.
        run = tiny.trainer(max_steps=1, callbacks=[Damage(how), tiny.SaveAtEnd(path)])
        run.fit(tiny.model(), tiny.data())
    file = next((Path(path) / "context").rglob("tokenizer.json"))
    content = json.loads(file.read_text())
    merges, words = content["model"]["merges"], content["model"]["vocab"]
    if how == "vocabulary":
        a, b = sorted(words)[40], sorted(words)[41]
        words[a], words[b] = words[b], words[a]
    elif how == "merges":
        merges[-1], merges[-2] = merges[-2], merges[-1]
    file.write_text(json.dumps(content))
    return path


def train(teacher_path: str, settings: str | None) -> tuple[str | None, int]:
    """Distill for two steps; return the class and text of the error, and the number of steps that were made."""
    with jobs_distill.alone():
        model = jobs_distill.distillation_model(teacher_path, settings)
        run = tiny.trainer(max_steps=2)
        try:
            run.fit(model, tiny.data())
        except Exception as error:
            return f"{type(error).__name__}: {error}", run.global_step
    return None, run.global_step


@pytest.fixture(scope="module")
def teachers(ranks_factory, tmp_path_factory) -> dict[str, str]:
    """Real checkpoints, by what is wrong with them."""
    folder = tmp_path_factory.mktemp("teachers")
    kinds = ("whole", "vocabulary", "merges", "nan", "inf", "overflow")
    return {kind: ranks_factory(1).run(make, str(folder / kind), kind, timeout=240)[0] for kind in kinds}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("whole", None),
        ("vocabulary", "Student and teacher have different tokenizers: 2 of "),
        ("merges", "Student and teacher have different tokenizers: the vocabularies agree, but merge"),
        ("nan", "The teacher's weights are not finite: 1 of"),
        ("inf", "The teacher's weights are not finite: 1 of"),
        ("overflow", "holds NaN or infinity in the first step, although its weights are finite"),
    ],
)
def test_wrong_teachers_are_named_on_the_first_step(ranks, teachers, kind, message):
    found, steps = ranks(1).run(train, teachers[kind], None, timeout=240)[0]
    if message is None:
        assert (found, steps) == (None, 2)
        return
    assert found.startswith("ModelOptConfigError: ") and message in found
    assert steps == 0
    if kind in ("nan", "inf"):
        assert ("linear_fc1.weight" if kind == "nan" else "linear_proj.weight") in found


@pytest.mark.parametrize("kind", ["vocabulary", "merges"])
def test_another_tokenizer_may_be_allowed(ranks, teachers, kind, tmp_path):
    (tmp_path / "kd.yaml").write_text("allow_other_tokenizer: true\n")
    assert ranks(1).run(train, teachers[kind], str(tmp_path / "kd.yaml"), timeout=240)[0] == (None, 2)


@pytest.mark.parametrize("kind", ["whole", "vocabulary", "merges"])
def test_the_script_says_so_before_nemo_is_imported(teachers, kind, tmp_path, monkeypatch, capsys):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    models = f"--model_path {teachers['whole']} --teacher_path {teachers[kind]}"
    command = command_lines.RUNS["distill"].replace("--model_path model --teacher_path teacher", models).split()
    if kind != "whole":
        with pytest.raises(SystemExit, match="2"):
            command_lines.script_of("distill").resolve(command)
        assert "different tokenizers: " in capsys.readouterr().err
    (tmp_path / "kd.yaml").write_text("" if kind == "whole" else "allow_other_tokenizer: true\n")
    command_lines.script_of("distill").resolve([*command, "--distillation_config", "kd.yaml"])


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "two", "message"),
    [
        (Vocabulary({0: "a", 1: "b"}), Vocabulary({0: "a", 1: "b"}), None),
        (Vocabulary({0: "a", 1: "b"}), Vocabulary({0: "a", 1: "b", 2: "c"}), None),  # the size is checked elsewhere
        (Vocabulary({0: "a", 1: "b"}), Vocabulary({0: "b", 1: "a"}), "2 of 2 entries of the vocabulary differ (0 is"),
        (Vocabulary({0: "a"}, ("a b", "c d")), Vocabulary({0: "a"}, ("a b", "d c")), "merge 2 is 'c d' and 'd c'"),
        (Vocabulary({0: "a"}, ("a b",)), Vocabulary({0: "a"}), None),
        (None, Vocabulary({0: "a"}), None),
    ],
)  # fmt: skip
def test_differences(one, two, message):
    found = tokenizer_files.difference(one, two)
    assert (found is None) if message is None else message in found


def test_forms_of_one_tokenizer_agree(tmp_path):
    file = Path(tiny.tokenizer_folder()) / "tokenizer.json"
    content = json.loads(file.read_text())
    own = tokenizer_files.of_json(content)
    content["model"]["merges"] = [one if isinstance(one, str) else " ".join(one) for one in content["model"]["merges"]]
    content["added_tokens"][0]["content"] = "<another>"
    assert tokenizer_files.difference(own, tokenizer_files.of_json(content)) is None
    assert tokenizer_files.of_json({"model": {"vocab": 3}}) is None and tokenizer_files.of_json([]) is None
    pieces = tokenizer_files.of_json({"model": {"type": "Unigram", "vocab": [["a", -1.5], ["b", -2]]}})
    assert pieces == Vocabulary({0: "a", 1: "b"})
    # Neither a folder of two tokenizers nor a broken file is guessed at.
    shutil.copytree(tiny.tokenizer_folder(), tmp_path / "a")
    assert tokenizer_files.of_folder(tmp_path) == own
    shutil.copytree(tiny.tokenizer_folder(), tmp_path / "b")
    assert tokenizer_files.of_folder(tmp_path) is None
    (tmp_path / "b" / "tokenizer.json").write_text("{")
    assert tokenizer_files.of_folder(tmp_path / "b") is None


def test_vocabularies_of_nemos_tokenizers(cpu_backend, tmp_path):
    from nemo.collections.common.tokenizers import SentencePieceTokenizer

    from nemo.collections.llm.modelopt.distill._tokenizers import vocabulary

    found = vocabulary(tiny.tokenizer())
    assert found == tokenizer_files.of_folder(tiny.tokenizer_folder()) and found.merges
    (tmp_path / "text").write_text("\n".join(tiny.texts(200)))
    for name, size in (("one", 55), ("two", 58)):
        sentencepiece.SentencePieceTrainer.train(
            input=str(tmp_path / "text"), model_prefix=str(tmp_path / name), vocab_size=size, minloglevel=2
        )
    one, again, two = (vocabulary(SentencePieceTokenizer(str(tmp_path / f"{n}.model"))) for n in ("one", "one", "two"))
    assert one.tokens[0] == "<unk>" and len(one.tokens) == 55
    assert tokenizer_files.difference(one, again) is None and tokenizer_files.difference(one, two) is not None
    # What stands for a tokenizer in a test is not compared.
    assert vocabulary(Mock(vocab_size=8)) is None and vocabulary(None) is None


def test_tiktoken_is_compared_by_its_ranks(cpu_backend, tmp_path):
    import base64

    from nemo.collections.common.tokenizers.tiktoken_tokenizer import TiktokenTokenizer

    from nemo.collections.llm.modelopt.distill._tokenizers import vocabulary

    found = []
    for name, pair in (("a", ["ab", "cd"]), ("b", ["cd", "ab"])):
        tokens = [bytes([i]) for i in range(256)] + [one.encode() for one in pair]
        rows = [
            {"rank": i, "token_bytes": base64.b64encode(one).decode(), "token_str": one.decode(errors="replace")}
            for i, one in enumerate(tokens)
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        found.append(
            vocabulary(TiktokenTokenizer(str(tmp_path / f"{name}.json"), num_special_tokens=10, vocab_size=268))
        )
    assert tokenizer_files.difference(found[0], found[0]) is None
    assert "2 of 258 entries of the vocabulary differ" in tokenizer_files.difference(*found)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("value", "whole"), [(1.0, True), (float("nan"), False), (float("inf"), False), (-float("inf"), False)]
)
def test_finite_numbers(cpu_backend, dtype, value, whole):
    from nemo.collections.llm.modelopt import ModelOptConfigError
    from nemo.collections.llm.modelopt.distill import _finite

    model = torch.nn.Linear(4, 4).to(dtype)
    model.weight.data[1, 2] = value
    if whole:
        _finite.check_weights(model, "folder")
        return
    with pytest.raises(
        ModelOptConfigError, match=r"1 of 2 hold NaN or infinity, first \['weight'\]. The checkpoint fol"
    ):
        _finite.check_weights(model, "folder")
    model._intermediate_output = model.weight.data
    flags = _finite.FiniteFlags()
    flags.see_layers([model])
    with pytest.raises(ModelOptConfigError, match="The teacher's output of Linear holds NaN or infinity in the first"):
        _finite.raise_on_all_ranks(flags, [], 1)
