"""Shapes and formats for the tests of the formulas."""

from __future__ import annotations

from hypothesis import strategies as st

from nemo_modelopt_dropin.fit import formats
from nemo_modelopt_dropin.preflight.model_sizes import Shape

NAMES = ("no_quant", "fp8", "int8_wo", "int4", "int4_awq", "w4a8_awq", "nvfp4", "mxfp8")


def shape(**changed) -> Shape:
    """Return a Llama of about 30 million parameters."""
    sizes = {
        "num_layers": 8,
        "hidden_size": 512,
        "ffn_hidden_size": 1536,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 64,
        "vocab_size": 8192,
    }
    return Shape(name="Llama", gated=True, **{**sizes, **changed})


@st.composite
def any_shape(draw) -> Shape:
    """Draw the sizes of a model whose inputs are multiples of 128."""
    groups = draw(st.integers(1, 8))
    return shape(
        num_layers=draw(st.integers(1, 100)),
        hidden_size=128 * draw(st.integers(1, 64)),
        ffn_hidden_size=128 * draw(st.integers(1, 128)),
        num_query_groups=groups,
        num_attention_heads=groups * draw(st.integers(1, 8)),
        kv_channels=128,
        vocab_size=8 * draw(st.integers(16, 20000)),
        experts=draw(st.sampled_from((0, 0, 4))),
        tied=draw(st.booleans()),
    )


def any_format() -> st.SearchStrategy[formats.Format]:
    """Draw a format that compress can produce."""
    return st.sampled_from(formats.mixtures(NAMES))
