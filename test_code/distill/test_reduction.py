"""The metrics of a distillation: one mapping from names in the log to losses, and their sums."""

from __future__ import annotations

import pytest
import torch

PAIRS = [["decoder.layers.0", "decoder.layers.1", "mse"], ("decoder.final_layernorm", "decoder.final_layernorm")]


@pytest.fixture
def metrics(cpu_backend):
    from nemo.collections.llm.modelopt.distill._reduction import Metrics

    return Metrics(PAIRS)


def test_each_name_has_its_key(metrics):
    assert metrics.keys == {
        "kd_loss": "kd_loss",
        "kd_logits_loss": "logits_loss",
        "kd_intermediate_loss": "intermediate_loss",
        "lm_loss": "lm_loss",
        "kd_top1_agreement": "top1_agreement",
        "teacher_lm_loss": "teacher_lm_loss",
        "kd_intermediate_loss/decoder.layers.0-decoder.layers.1": "pair_0",
        "kd_intermediate_loss/decoder.final_layernorm-decoder.final_layernorm": "pair_1",
    }


def test_means_weigh_micro_batches_by_their_unmasked_tokens(metrics):
    one, three = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    losses = [{"kd_loss": torch.tensor(2.0), "pair_1": torch.tensor(8.0)}, {"kd_loss": torch.tensor(6.0)}]
    sums = metrics.sums(losses[0], one) + metrics.sums(losses[1], three)
    assert sums[-2:].tolist() == [4.0, 8.0]
    means = metrics.means(sums)
    assert list(means) == list(metrics.keys)
    assert {name: value.item() for name, value in means.items() if value} == {
        "kd_loss": 5.0,
        "kd_intermediate_loss/decoder.final_layernorm-decoder.final_layernorm": 2.0,
    }


def test_no_tokens_are_no_nan(metrics):
    for sums in (metrics.no_sums("cpu"), metrics.sums({"kd_loss": torch.tensor(0.0)}, torch.zeros(2, 4))):
        assert len(sums) == len(metrics.keys) + 2
        assert all(value.item() == 0.0 for value in metrics.means(sums).values())


def test_tokens_with_the_ignore_index_do_not_count(cpu_backend):
    from nemo.collections.llm.modelopt.distill._reduction import without_ignored

    mask, labels = torch.tensor([[1.0, 1.0, 0.0, 0.5]]), torch.tensor([[3, -100, 4, 0]])
    assert without_ignored(mask, labels).tolist() == [[1.0, 0.0, 0.0, 0.5]]
    assert without_ignored(mask, None) is mask
    assert without_ignored(mask, labels[:, :2]) is mask


def losses_with_ignored_labels():
    """Return the loss of a micro-batch, its gradient and its number of tokens, with an ignore index and with a mask."""
    from nemo.collections.llm.modelopt.distill.model import _DistillationLossReduction
    from test_code.support import tiny

    tiny.init_parallel()
    found = []
    labels = torch.tensor([[3, -100, 4, 0], [-100, -100, 1, 2]])
    for batch in ({"loss_mask": torch.ones(2, 4), "labels": labels}, {"loss_mask": (labels >= 0).float()}):
        of_tokens = torch.arange(8.0).view(2, 4).requires_grad_()
        reduction = _DistillationLossReduction(
            lambda student_loss, loss_reduction_fn, leaf=of_tokens: {"kd_loss": loss_reduction_fn(leaf)}
        )
        loss, report = reduction.forward(batch, torch.zeros(2, 4))
        loss.backward()
        found.append((loss.item(), of_tokens.grad.tolist(), report["kd_sums"][-2].item()))
    return found


def test_a_label_with_the_ignore_index_is_a_masked_token(ranks):
    ((ignored, masked),) = ranks(1).run(losses_with_ignored_labels)
    assert ignored == masked
    assert ignored[2] == 5.0
