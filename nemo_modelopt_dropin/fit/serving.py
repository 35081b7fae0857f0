"""Compute the memory of a served model: weights in their format, KV cache, activations and logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_modelopt_dropin.fit import files
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.preflight import algorithms, model_sizes
from nemo_modelopt_dropin.preflight.model_sizes import Memory, Shape

# Prompts are processed in pieces of this many tokens at most, as servers do (vLLM's max_num_batched_tokens).
CHUNK = 8192


@dataclass(frozen=True)
class Load:
    """What a server has to hold at a time.

    Attributes:
        context: Tokens of a sequence, prompt and reply.
        batch: Sequences at a time.
        chunk: Tokens of prompts that are processed in one forward pass at most.
        experts_per_token: Experts that a token is sent to.
    """

    context: int = 4096
    batch: int = 1
    chunk: int = CHUNK
    experts_per_token: int = 0


def cache_bytes(shape: Shape, load: Load, fp8: bool = False) -> int:
    """Return the bytes of keys and values of all sequences.

    Args:
        shape: The sizes of the model.
        load: Context and batch.
        fp8: Whether a number takes one byte instead of two.
    """
    numbers = 2 * shape.num_layers * shape.num_query_groups * shape.kv_channels
    return numbers * load.context * load.batch * (1 if fp8 else 2)


def memory(shape: Shape, found: Format, load: Load, layout: str = algorithms.AUTO) -> Memory:
    """Return the memory of a server on one device by purpose; that of libraries and kernels is not counted.

    The largest moment is the one in which a full chunk of prompts runs through a layer while the caches are full.
    Attention stores no scores, and logits exist for the last token of each sequence only.

    Args:
        shape: The sizes of the model.
        found: Its format.
        load: Context and batch.
        layout: Layout of the Hugging Face files.
    """
    tokens = min(load.chunk, load.context * load.batch)
    forward = model_sizes.forward_memory(_of_one_token(shape, load), 1, tokens, 1, 1, 2)
    return Memory(
        {
            "weights": files.weight_bytes(shape, found, layout),
            "KV cache": cache_bytes(shape, load, found.fp8_cache),
            "activations": forward.parts["activations"],
            "logits": 4.0 * load.batch * shape.vocab_size,
        }
    )


def _of_one_token(shape: Shape, load: Load) -> Shape:
    """Return the shape with the inner size that one token uses."""
    if not shape.experts:
        return shape
    inner = shape.ffn_hidden_size * max(1, load.experts_per_token) + shape.shared_expert_size
    return replace(shape, ffn_hidden_size=inner)
