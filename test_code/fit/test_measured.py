"""The formulas of serving memory against what a forward pass allocates."""

from __future__ import annotations

import pytest

from nemo_modelopt_dropin.fit import serving
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight import model_sizes
from test_code.support import allocations

# Hidden size, inner size, layers, heads, groups, batch and context.
CASES = [
    (256, 768, 4, 8, 4, 2, 256),
    (512, 1536, 4, 8, 4, 4, 128),
    (256, 1024, 6, 8, 1, 1, 1024),
    (512, 512, 2, 8, 2, 2, 512),
]


@pytest.mark.parametrize(("hidden", "inner", "layers", "heads", "groups", "batch", "context"), CASES)
def test_memory_is_what_a_forward_pass_allocates(hidden, inner, layers, heads, groups, batch, context):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=2048,
        attn_implementation="sdpa",
    )
    config.architectures = ["LlamaForCausalLM"]
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    ids = torch.randint(0, 2048, (batch, context))
    with torch.no_grad(), allocations.Allocated() as allocated:
        output = model(ids, use_cache=True, logits_to_keep=1)
    cache = sum(one.nbytes for layer in output.past_key_values for one in layer[:2])
    shape = model_sizes._from_hugging_face(config.to_dict())
    found = serving.memory(shape, Format(), Load(context, batch))
    assert found.parts["weights"] == weights
    assert found.parts["KV cache"] == cache
    # The peak is in the last layer, when the cache is full. The formula counts all tensors of a layer's MLP and
    # attention at once, and not all of them live at a time: it is too high by up to a fifth.
    activations = allocated.peak - cache
    assert activations <= found.parts["activations"] + found.parts["logits"] <= 1.25 * activations
    assert found.total == pytest.approx(weights + allocated.peak, rel=0.1)
