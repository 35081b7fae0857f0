"""Megatron's GPT models on the fake GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from test_code.fake_gpu import device


@contextlib.contextmanager
def layout(tp: int = 1, pp: int = 1, stage: int = 0, cp: int = 1, ep: int = 1) -> Iterator[dict[str, Any]]:
    """Let this process be the last rank of a pipeline stage, and yield the fields of the configurations.

    Args:
        tp: tensor-parallel ranks, which also share the sequence.
        pp: pipeline stages.
        stage: this rank's stage.
        cp: context-parallel ranks. The fields do not have them, because Megatron's own attention does not support them:
            models see a part of a sequence, and the groups of the losses are those of all parts.
        ep: expert-parallel ranks, which are data parallel otherwise.
    """
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp, "expert_model_parallel_size": ep}
    ranks = tp * cp * ep
    with device.session(ranks * pp, ranks * stage + ranks - 1, context_parallel_size=cp, **sizes):
        yield {**sizes, "sequence_parallel": tp > 1}


def config(**overrides: Any) -> Any:
    """Return a Llama-style configuration in bf16, small by default: 2 layers, hidden 64, vocabulary 256."""
    from test_code.support import tiny

    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    return tiny.config(**{"num_layers": 2, "vocab_size": tiny.VOCABULARY, **bf16, **overrides})


def llama_8b(**overrides: Any) -> Any:
    """Return a configuration with the sizes of Llama 3.1 8B, for sequences of 4096 tokens."""
    sizes = {
        "num_layers": 32,
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 128256,
        "seq_length": 4096,
        "rotary_base": 500_000,
    }
    return config(**{**sizes, **overrides})


def batch(model_config: Any, samples: int = 2) -> dict[str, torch.Tensor]:
    """Return a micro-batch on the device, with the names that a NeMo model's data step has."""
    shape = samples, model_config.seq_length
    tokens = torch.zeros(shape, dtype=torch.long, device="cuda")
    return {
        "tokens": tokens,
        "labels": tokens,
        "loss_mask": torch.ones(shape, device="cuda"),
        "position_ids": torch.arange(shape[1], device="cuda").expand(shape),
    }


def run(model: torch.nn.Module, inputs: dict[str, torch.Tensor], labels: bool = True) -> torch.Tensor:
    """Return the output of a forward pass, as NeMo's forward step calls it: Megatron's attention is causal."""
    return model(inputs["tokens"], inputs["position_ids"], None, labels=inputs["labels"] if labels else None)
