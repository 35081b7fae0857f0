"""A teacher with another tokenizer: sorted probabilities, compared where the texts before both tokens are the same."""

from __future__ import annotations

import re

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

from test_code.support import command_lines, devices, jobs_aligned, jobs_packed, tiny

# fp32 exponentials and sums of a few hundred probabilities.
FP32 = {"rtol": 2e-5, "atol": 2e-6}
ALIGNED = {"logit_kl_vocabulary": "aligned-text", "skip_lm_loss": False, "loss_weights": {"kd_logits": 1.0, "lm": 1.0}}


@pytest.fixture(scope="module")
def folder(ranks_factory, tmp_path_factory):
    """Return a folder with checkpoints of a teacher with another tokenizer and of a student, a text, and settings."""
    found = tmp_path_factory.mktemp("aligned")
    ranks_factory(1).run(jobs_aligned.teacher, str(found / "teacher"))
    ranks_factory(1).run(jobs_aligned.student, str(found / "student"))
    (found / "text.txt").write_text("".join(f"{text}\n" for text in tiny.texts(30)))
    (found / "losses.yaml").write_text(yaml.safe_dump(ALIGNED))
    return found


@pytest.mark.parametrize("sizes", [(11, 7), (7, 11), (9, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradient_are_those_of_the_definition(cpu_backend, sizes, dtype):
    from nemo.collections.llm.modelopt._divergence.sorted_probabilities import sorted_distance

    generator = torch.Generator().manual_seed(sum(sizes))
    student, teacher = (torch.randn(5, size, generator=generator).mul(2).to(dtype) for size in sizes)
    pairs = [(0, 3), (2, 2), (4, 0)]
    counterparts = torch.tensor([3, -1, 2, -1, 0])
    leaf = student.clone().requires_grad_()
    found = sorted_distance(leaf, teacher, counterparts, 2.0, chunk_rows=2)
    (found * torch.linspace(0.5, 1.5, 5)).sum().backward()
    value, gradient = jobs_aligned.reference(student, teacher, pairs, 2.0)
    # The gradient is rounded to 8 bits of mantissa; the value is computed in fp32.
    rounding = {"rtol": 2**-7, "atol": 1e-5} if dtype == torch.bfloat16 else FP32
    torch.testing.assert_close(found.double(), value, **FP32)
    torch.testing.assert_close(leaf.grad.double(), gradient, **rounding)
    assert not leaf.grad[counterparts < 0].any() and (value[[0, 2, 4]] > 0).all()


def test_a_permuted_vocabulary_has_no_distance(cpu_backend):
    from nemo.collections.llm.modelopt._divergence.sorted_probabilities import sorted_distance

    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    found = sorted_distance(logits, logits[:, torch.randperm(50)], torch.arange(4))
    assert found.abs().max() < 1e-6  # fp32 sums in another order


@pytest.mark.parametrize("sizes", [(12, 8), (8, 12)])
def test_a_split_vocabulary_gives_the_same(ranks, sizes):
    for value, expected, gradient, part in ranks(2).run(jobs_aligned.sharded_distance, *sizes):
        torch.testing.assert_close(value, expected, **FP32)
        torch.testing.assert_close(gradient, part, **FP32)


@st.composite
def cut_texts(draw):
    """Draw a text and two ways to cut it into tokens, as ends; a character may be several tokens."""
    length = draw(st.integers(1, 20))
    ends = st.lists(st.integers(1, length), min_size=1, max_size=25).map(lambda places: [*sorted(places), length])
    return length, draw(ends), draw(ends)


@profile(max_examples=100, deadline=None)  # the first example imports torch
@given(cut_texts())
def test_counterparts_have_read_the_same_text(cut):
    from nemo_modelopt_cli.aligned import counterparts

    length, student, teacher = cut
    found = counterparts(student, teacher)
    assert found[-1] == len(teacher) - 1, "both have read the whole text at the end"
    for place, (end, other) in enumerate(zip(student, found, strict=True)):
        complete = end not in student[place + 1 :]
        assert (other >= 0) == (complete and end in teacher)
        if other >= 0:
            assert teacher[other] == end and end not in teacher[other + 1 :]


def test_bytes_of_a_character_are_aligned_at_its_end(cpu_backend):
    from nemo_modelopt_cli import aligned

    ids, ends = aligned.encode("a é", jobs_aligned.other_tokenizer(), "teacher")
    assert len(ids) == 4 and ends == [1, 2, 3, 3], "é is two tokens"
    assert aligned.counterparts([1, 3], ends) == [0, 3]


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True}])
def test_training_compares_the_logits_of_the_same_text(ranks, folder, layout):
    own, other = tiny.tokenizer().tokenizer, jobs_aligned.other_tokenizer().tokenizer
    size = layout.get("tp", 1)
    found = ranks(size).run(
        jobs_aligned.distill, str(folder / "teacher"), str(folder / "losses.yaml"), str(folder / "text.txt"), layout
    )
    student, teacher = (torch.cat([rank[name] for rank in found], -1) for name in ("student", "teacher"))
    assert student.shape[-1] != teacher.shape[-1]
    first = found[0]
    compared = 0
    for sample, places in enumerate(first["counterparts"]):
        pairs = [(i, j) for i, j in enumerate(places.tolist()) if j >= 0]
        compared += len(pairs)
        expected, _ = jobs_aligned.reference(student[:, sample], teacher[:, sample], pairs)
        torch.testing.assert_close(first["loss"][sample].double(), expected, **FP32)
        tokens = first["teacher_tokens"][sample].tolist()
        # Each counterpart has read a whole number of words more: decoded prefixes are prefixes of each other.
        prefixes = [other.decode(tokens[: j + 1]) for _, j in pairs]
        assert all(after.startswith(before) for before, after in zip(prefixes, prefixes[1:], strict=False))
    assert compared > 10 and own.vocab_size != other.vocab_size
    for step in first["metrics"]:
        assert step["kd_logits_loss"] > 0 and step["lm_loss"] > 0
        assert not {"kd_top1_agreement", "teacher_lm_loss"} & step.keys()


def test_samples_of_both_models_hold_one_text(cpu_backend, folder):
    from nemo_modelopt_cli import aligned

    own, other = tiny.tokenizer(), jobs_aligned.other_tokenizer()
    texts = [piece for text in tiny.texts(12) for piece in aligned.pieces(text, own, 16)]
    assert "".join(texts) == "".join(tiny.texts(12)) and len(texts) > 12
    dataset = aligned.AlignedTexts(texts, own, other, 32)
    for place in range(len(dataset)):
        sample = dataset[place]
        for i, j in enumerate(sample["counterparts"].tolist()):
            if j >= 0:
                read = own.tokenizer.decode(sample["tokens"][: i + 1])
                assert read == other.tokenizer.decode(sample["teacher_tokens"][: j + 1])
        assert sample["loss_mask"].sum() == min(32, len(own.tokenizer(texts[place])["input_ids"]))


@pytest.mark.parametrize(
    ("changed", "layout", "message"),
    [
        ({}, {}, r"aligned-text: the data \(TinyData\) has no text to encode for the teacher; use --text"),
        ({"skip_lm_loss": True, "loss_weights": None}, {}, "set skip_lm_loss to false: only the next-token loss shows"),
        ({"intermediate_layer_pairs": [["decoder.layers.0", "decoder.layers.0"]]}, {}, "layer pairs compare the model"),
        ({"logit_kl_topk": 8, "fused_logits": "on"}, {}, "set logit_kl_topk to null.*; set fused_logits to"),
    ],
)
def test_what_cannot_be_compared_raises_an_error_before_models_are_built(
    ranks, folder, tmp_path, changed, layout, message
):
    (tmp_path / "losses.yaml").write_text(yaml.safe_dump({**ALIGNED, **changed}))
    found = ranks(1).run(jobs_aligned.refusal, str(folder / "teacher"), str(tmp_path / "losses.yaml"), layout)[0]
    assert re.match(f"ModelOptConfigError: .*{message}", found), found


def test_the_default_refuses_another_tokenizer_and_names_both(ranks, folder):
    found = ranks(1).run(jobs_aligned.refusal, str(folder / "teacher"), None)[0]
    assert found.startswith("ModelOptConfigError: Student and teacher have different ")
    assert "logit_kl_vocabulary: aligned-text" in found


@pytest.fixture
def here(tmp_path, monkeypatch):
    command_lines.inputs(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    return tmp_path


@pytest.mark.parametrize(
    ("flags", "changed", "problem"),
    [
        ("--text text.jsonl", {"skip_lm_loss": True}, "aligned-text needs other settings: set skip_lm_loss to false"),
        ("--use_mock_data", {}, "aligned-text needs --text, because both models read the text"),
        ("--text chats.jsonl --chat-template-path text.jsonl --tokenizer model", {}, "reads texts, not conversations"),
        ("--text text.jsonl --pp 2 --devices 4", {}, "needs --pp 1 and --cp 1, got 2 and 1"),
        ("--text text.jsonl --answer_only_loss", {}, "takes neither --packed_sequence_size nor --answer_only_loss"),
        ("--text text.jsonl", {"logit_kl_vocabulary": "any"}, "logit_kl_vocabulary must be one of same, aligned-text"),
    ],
)
def test_the_command_reports_it_before_nemo_is_imported(here, capsys, flags, changed, problem):
    (here / "losses.yaml").write_text(yaml.safe_dump({**ALIGNED, "loss_weights": None, **changed}))
    line = command_lines.RUNS["distill"].replace("--text text.jsonl", f"{flags} --distillation_config losses.yaml")
    with pytest.raises(SystemExit, match="2"):
        command_lines.script_of("distill").resolve(line.split())
    assert problem in capsys.readouterr().err


def test_the_command_distills_from_a_teacher_with_another_tokenizer(ranks, folder, tmp_path):
    line = (
        f"{' '.join(devices.flags())} --name kd --log_dir {tmp_path} "
        f"--model_path {folder}/student --teacher_path {folder}/teacher "
        f"--text {folder}/text.txt --distillation_config {folder}/losses.yaml --seq_length 24 --gbs 4 --mbs 2 "
        "--max_steps 2 --warmup_steps 0 --log_interval 1 --val_check_interval 2 --limit_val_batches 1"
    )
    found = ranks(1).run(jobs_packed.run_distill, line, timeout=300)[0]
    assert {"distillation loss", "validation loss", "checkpoint"} <= found.keys()
    assert "top-1 agreement" not in found
