"""What the process with the fake GPU executes for the tests of pruning."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from test_code.fake_gpu import device, models

SIZES = {"hidden_size": 256, "ffn_hidden_size": 512}


def prune(targets: dict[str, int], batches: int) -> tuple[list[str], dict[str, int]]:
    """Measure the importance of a model on batches with a loss mask, and prune it.

    Args:
        targets: hparam -> size; none to measure only.
        batches: number of micro-batches.

    Returns:
        The functions of this package in which the host waited, and the sizes of the pruned model.
    """
    import modelopt.torch.prune as mtp

    from nemo.collections.llm.modelopt.prune import _checks, _heldout, _norms, _search

    def minitron(model: Any, mode: Any, export_config: Any, forward_loop: Any) -> Any:
        # modelopt prints its results, and has no other way to pass a loop.
        options = {"constraints": {"export_config": export_config}, "config": {"forward_loop": forward_loop}}
        return mtp.prune(model, mode=mode, dummy_input=None, **options)

    with models.layout():
        config = models.config(**SIZES)
        core = config.configure_model(None)
        core.eval()
        _norms.register_torch_norms()
        data = [_host_batch(config) for _ in range(batches)]
        with device.count() as waits:
            _search.prune_by_importance(core, targets, minitron, lambda model: _heldout.run_batches(model, data))
        assert {parameter.device.type for parameter in core.parameters()} == {device.GPU}
        return _own(waits), _checks.model_sizes(core)


def compare(batches: int) -> tuple[list[str], list[str]]:
    """Return the functions in which the host waits while it observes a model on held-out batches, and evaluates it."""
    from nemo.collections.llm.modelopt.errors import ModelOptConfigError
    from nemo.collections.llm.modelopt.prune import _heldout

    with models.layout():
        config = models.config(**SIZES)
        core = config.configure_model(None)
        core.eval()
        data = [_host_batch(config) for _ in range(batches)]
        hidden = [torch.ones(config.seq_length, 2, config.hidden_size, dtype=torch.bfloat16) for _ in data]
        reference = _heldout.Reference(data, hidden, (core.output_layer.weight.detach(), None))
        with device.count() as waits, _no_weight(ModelOptConfigError):
            _heldout.observe(core, lambda: _heldout.run_batches(core, data))
        with device.count() as of_evaluation, _no_weight(ModelOptConfigError):
            _heldout.evaluate(core, reference)
        return _own(waits), _own(of_evaluation)


@contextlib.contextmanager
def _no_weight(error: type[Exception]) -> Iterator[None]:
    """Expect the error of a comparison without tokens: the host reads a weight of zero, but only at the end."""
    try:
        yield
    except error as found:
        assert "leaves no token" in str(found)
    else:
        raise AssertionError("the sums were not read")


def fingerprints() -> tuple[list[str], list[str], int]:
    """Return where the host waits for the two fingerprints of Llama's weights, and the largest tensor in fp64."""
    from nemo.collections.llm.modelopt.prune import _scores
    from nemo.collections.llm.modelopt.quantization.insert import mixed_precision

    with models.layout():
        core = models.llama_8b(num_layers=2).configure_model(None)
        with device.count() as waits:
            _scores.fingerprint(core)
        with device.count() as of_search:
            mixed_precision._identity(core, {})
        return _own(waits), _own(of_search), device.largest_double()


def _host_batch(config: Any) -> dict[str, torch.Tensor]:
    """Return a micro-batch as a loader does: on the host, with a prompt that does not count."""
    shape = 2, config.seq_length
    mask = torch.ones(shape)
    mask[0, :5] = 0.0
    tokens = torch.zeros(shape, dtype=torch.long)
    positions = torch.arange(shape[1]).expand(shape)
    causal = torch.ones(2, 1, shape[1], shape[1], dtype=torch.bool).triu(1)
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": mask,
        "position_ids": positions,
        "attention_mask": causal,
    }


def _own(waits: list[device.Wait]) -> list[str]:
    return [wait.where.rpartition(" ")[-1] for wait in waits if wait.ours]
