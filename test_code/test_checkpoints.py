"""NeMo checkpoints between stock and ours, between layouts, by every way of saving, and what a student is good for."""

from __future__ import annotations

import pytest
import torch

from test_code.support import installed, jobs_distill, tolerances
from test_code.support import jobs_checkpoints as jobs

# What is saved, at which layout, how, and the layout at which it is loaded.
CASES = [
    ("plain", "TP=2", "in fit", "1 rank"),
    ("plain", "1 rank", "ModelCheckpoint async", "PP=2"),
    ("plain", "PP=2", "after fit", "TP=2"),
    ("student", "PP=2", "ModelCheckpoint", "TP=2"),
    ("student", "TP=2", "in fit async", "1 rank"),
    ("student", "1 rank", "after fit async", "PP=2"),
]
STUDENT = {"ffn_hidden_size": 64}
PAIR = "intermediate_layer_pairs: [[decoder.final_layernorm, decoder.final_layernorm]]\n"


@pytest.fixture(scope="module")
def pools(ranks_factory, stock_ranks):
    return {"ours": ranks_factory(2), "stock": stock_ranks(2)}


@pytest.fixture(scope="module")
def teacher_path(pools, tmp_path_factory):
    return pools["ours"].run(jobs_distill.teacher, str(tmp_path_factory.mktemp("teacher") / "checkpoint"))[0]


def assert_same_weights(loaded: dict, saved: dict) -> None:
    assert loaded.keys() == saved.keys() and len(saved) == 9
    for name, value in saved.items():
        assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name


@pytest.mark.parametrize("kind, layout, how, other_layout", CASES)
@pytest.mark.parametrize("writer, reader", [("ours", "stock"), ("stock", "ours")])
def test_one_loads_what_the_other_saved(pools, teacher_path, tmp_path, writer, reader, kind, layout, how, other_layout):
    path, saved = pools[writer].run(jobs.write, kind, str(tmp_path / "checkpoint"), layout, how, teacher_path)[0]
    sizes = None if kind == "plain" else STUDENT
    if how.startswith("after fit") and (kind, writer) != ("student", "ours"):
        # NeMo counts the wrappers that are on when it saves, and asks for one when it loads: ours finds them.
        assert pools["stock"].run(jobs.refused, path, **(sizes or {}))[0] == "RuntimeError"
        reader = "ours"
    if writer == "ours":
        sizes = None  # the context of our student is a plain model's
    name, loaded, loss = pools[reader].run(jobs.read, path, other_layout, sizes)[0]
    assert name == "GPTModel"
    assert_same_weights(loaded, saved)
    # A uniform guess over the 256 tokens costs 5.55; the models have hardly been trained.
    assert 5.2 < loss < 5.7


def test_the_context_of_a_student_deviates_by_being_loadable(pools):
    """Stock's lacks the teacher, which its class demands, once the process has built any plain model."""
    name, arguments = pools["ours"].run(jobs.context_of_student)[0]
    assert name == "GPTModel" and {"config", "optim", "tokenizer"} <= {*arguments}
    name, arguments = pools["stock"].run(jobs.context_of_student)[0]
    assert name == "DistillationGPTModel" and "teacher_ckpt_path" not in arguments


# Width by stock: test_parity, because modelopt prunes PyTorch's norms only if somebody registers them.
@pytest.mark.parametrize(
    "writer, request_, layout, other_layout",
    [
        ("ours", {"drop_layers": [2, 3]}, "PP=2", "TP=2"),
        pytest.param("stock", {"drop_layers": [2, 3]}, "TP=2", "PP=2", marks=installed.stock_prunes),
        ("ours", {"target_ffn_hidden_size": 96, "target_hidden_size": 48}, "PP=2", "TP=2"),
    ],
)
def test_pruned_checkpoints(pools, tmp_path, writer, request_, layout, other_layout):
    path = str(tmp_path / "pruned")
    saved = pools[writer].run(jobs.write_pruned, path, layout, request_)[0]
    if writer == "stock":
        assert pools["stock"].run(jobs.refused, path, num_layers=2)[0] == "RuntimeError"
    reader = {"ours": "stock", "stock": "ours"}[writer]
    _, loaded, loss = pools[reader].run(jobs.read, path, other_layout)[0]
    assert_same_weights(loaded, saved)
    assert loss == loss


@pytest.fixture(scope="module")
def student_path(pools, teacher_path, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("student") / "checkpoint")
    return pools["ours"].run(jobs.write, "student", folder, "TP=2", "ModelCheckpoint", teacher_path)[0][0]


@pytest.mark.parametrize("interrupted", [{3: "TP=2", 6: "TP=2"}, {3: "PP=2", 6: "PP=2"}, {3: "TP=2", 6: "1 rank"}])
def test_an_interrupted_distillation_goes_on_as_if_it_had_not_been(
    pools, teacher_path, student_path, tmp_path, interrupted
):
    (tmp_path / "pair.yaml").write_text(PAIR)
    arguments = (student_path, teacher_path, str(tmp_path / "pair.yaml"))
    curves = [
        pools["ours"].run(jobs.distill_with_resume, *arguments, str(tmp_path / name), stops)[0]
        for name, stops in (("once", {6: interrupted[3]}), ("twice", interrupted))
    ]
    assert len(curves[0]) == len(curves[1]) == 6
    # Within a layout it is bit for bit; another one sums in another order.
    assert curves[1] == pytest.approx(curves[0], rel=tolerances.of("loss"))
    assert interrupted[3] != interrupted[6] or curves[1] == curves[0]


def test_a_student_generates_trains_on_and_is_distilled_and_quantized_again(
    pools, teacher_path, student_path, tmp_path
):
    found = pools["ours"].run(jobs.use_student, student_path, teacher_path, str(tmp_path / "next"))[0]
    assert len(found["text"]) == 1 and found["text"][0].strip()
    assert len(found["training"]) == 3 and all(5 < loss < 6 for loss in found["training"])
    assert len(found["distillation"]) == 2 and all(0 < loss < 1 for loss in found["distillation"])
    # Inputs and weights of four linear layers in each of four layers, and keys and values.
    assert found["amax"] == found["read"] == (40 if installed.KV_CACHE else 32)
