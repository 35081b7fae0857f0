"""Build one small random model of each family with `transformers`, and name NeMo's classes for it.

`FAMILIES` is the table of families; everything that differs between them is data there.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

# The window of the models with sliding-window attention; the compared sequence is longer.
WINDOW = 8
# Released models of these families have more rows in their embedding than the tokenizer has entries.
PADDED = 320


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        config: Name of the configuration class of `transformers`.
        nemo: Names of NeMo's model and configuration class in ``nemo.collections.llm``.
        settings: Entries of the configuration that differ from `_SMALL`; None removes an entry of it.
        width: Width targets of pruning.
        depth: Settings of a pruning of whole layers.
        experts: Whether the family has experts.
        block: Size of AWQ's blocks, which divides all sizes of layers.
    """

    config: str
    nemo: tuple[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    width: Mapping[str, int] = field(default_factory=lambda: {"hidden_size": 96, "ffn_hidden_size": 192})
    depth: Mapping[str, Any] = field(default_factory=lambda: {"target_num_layers": 1})
    experts: bool = False
    block: int = 32

    @property
    def query_groups(self) -> int:
        """The number of key and value heads."""
        groups = self.settings.get("num_key_value_heads", _SMALL["num_key_value_heads"])
        return 1 if self.settings.get("multi_query") else groups

    def request(self, kind: str) -> dict[str, Any]:
        """Return the settings of a pruning of ``width`` or ``depth``."""
        if kind == "depth":
            return dict(self.depth)
        return {f"target_{name}": size for name, size in self.width.items()}


_SMALL: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ROPE_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "vocab_size": PADDED,
    "routed_scaling_factor": 1.5,
}
_MOE_WIDTH = {"hidden_size": 96, "moe_ffn_hidden_size": 64, "num_moe_experts": 3}
_HEADS = {"ffn_hidden_size": 192, "num_attention_heads": 2}
_GEMMA: dict[str, Any] = {"tie_word_embeddings": True, "head_dim": 256}

FAMILIES: dict[str, Family] = {
    "llama-2": Family("LlamaConfig", ("LlamaModel", "Llama2Config7B"), {"num_key_value_heads": 4}),
    "llama-3.2": Family(
        "LlamaConfig",
        ("LlamaModel", "Llama32Config1B"),
        {"tie_word_embeddings": True, "rope_scaling": ROPE_SCALING, "rope_theta": 500000.0},
    ),
    "qwen2.5": Family("Qwen2Config", ("Qwen2Model", "Qwen2Config500M"), {"vocab_size": PADDED}),
    "qwen2.5-tied": Family(
        "Qwen2Config", ("Qwen2Model", "Qwen2Config500M"), {"vocab_size": PADDED, "tie_word_embeddings": True}
    ),
    "qwen3": Family("Qwen3Config", ("Qwen3Model", "Qwen3Config600M"), {"head_dim": 128, "vocab_size": PADDED}),
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        ("Qwen3Model", "Qwen3Config30B_A3B"),
        {
            "head_dim": 128,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "vocab_size": PADDED,
        },
        width=_MOE_WIDTH,
        experts=True,
    ),
    "mistral": Family("MistralConfig", ("MistralModel", "MistralConfig7B"), {"sliding_window": None}),
    "mistral-window": Family("MistralConfig", ("MistralModel", "MistralConfig7B"), {"sliding_window": WINDOW}),
    "mixtral": Family(
        "MixtralConfig",
        ("MixtralModel", "MixtralConfig8x7B"),
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        width=_MOE_WIDTH,
        experts=True,
    ),
    "gemma": Family("GemmaConfig", ("GemmaModel", "GemmaConfig2B"), {**_GEMMA, "num_key_value_heads": 1}),
    "gemma-2": Family(
        "Gemma2Config",
        ("Gemma2Model", "Gemma2Config2B"),
        {**_GEMMA, "query_pre_attn_scalar": 224, "sliding_window": WINDOW},
        width=_HEADS,
        depth={"drop_layers": [2]},
    ),
    "gemma-3": Family(
        "Gemma3TextConfig",
        ("Gemma3Model", "Gemma3Config1B"),
        {**_GEMMA, "query_pre_attn_scalar": 256, "sliding_window": WINDOW, "num_hidden_layers": 7},
        width=_HEADS,
        depth={"drop_layers": [7]},
    ),
    "phi-3": Family(
        "Phi3Config",
        ("Phi3Model", "Phi3ConfigMini"),
        {"vocab_size": PADDED, "num_key_value_heads": 4, "sliding_window": WINDOW},
    ),
    "nemotron": Family("NemotronConfig", ("NemotronModel", "Nemotron3Config4B"), {"head_dim": 32}),
    "starcoder": Family(
        "GPTBigCodeConfig",
        ("StarcoderModel", "StarcoderConfig15B"),
        {
            **dict.fromkeys(_SMALL),
            "n_embd": 128,
            "n_inner": 256,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 256,
            **{name: _SMALL[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
            "multi_query": True,
            "tie_word_embeddings": True,
        },
        # Its files have no size of heads: it is the hidden size over the number of heads.
        width={"hidden_size": 96, "num_attention_heads": 3, "ffn_hidden_size": 192},
    ),
    "starcoder-2": Family(
        "Starcoder2Config", ("Starcoder2Model", "Starcoder2Config3B"), {"sliding_window": WINDOW, "use_bias": True}
    ),
    "deepseek-2": Family(
        "DeepseekV2Config",
        ("DeepSeekModel", "DeepSeekV2Config"),
        {**_MLA, "topk_method": "greedy", "scoring_func": "softmax", "n_group": 1, "topk_group": 1},
        width={"ffn_hidden_size": 192, "moe_ffn_hidden_size": 32, "num_moe_experts": 2},
        experts=True,
        block=16,
    ),
    "deepseek-3": Family(
        "DeepseekV3Config",
        ("DeepSeekModel", "DeepSeekV3Config"),
        {
            **_MLA,
            "scoring_func": "sigmoid",
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "rope_scaling": _YARN,
            "n_routed_experts": 8,
        },
        width={"ffn_hidden_size": 192, "moe_ffn_hidden_size": 32, "num_moe_experts": 6},
        experts=True,
        block=16,
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        ("GPTOSSModel", "GPTOSSConfig20B"),
        {
            "head_dim": 32,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "intermediate_size": 96,
        },
        width={"hidden_size": 96},
        experts=True,
    ),
}


def hf_config(name: str, entries: Mapping[str, Any] | None = None) -> Any:
    """Return the small configuration of a family, with some entries changed."""
    import transformers

    family = FAMILIES[name]
    entries = {**_SMALL, **copy.deepcopy(dict(family.settings)), **(entries or {})}
    dropped = [key for key, value in entries.items() if value is None and key != "sliding_window"]
    return getattr(transformers, family.config)(
        **{key: value for key, value in entries.items() if key not in dropped}, torch_dtype="bfloat16"
    )


def hf_model(name: str, seed: int = 0, entries: Mapping[str, Any] | None = None) -> Any:
    """Return a random model of a family with weights in bf16; norms, biases and sinks are random too.

    A tensor that is lost on the way changes the logits, because none keeps its initial value.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(name, entries))
    zero_centred = name.startswith(("gemma", "nemotron"))
    for key, weight in model.named_parameters():
        if "norm" in key or ".ln_" in key:
            low = -0.5 if zero_centred and key.endswith("weight") else 0.5
            torch.nn.init.uniform_(weight, low, low + 1.0)
        elif key.endswith(("bias", "sinks")):
            torch.nn.init.normal_(weight, std=0.1)
        elif weight.dim() == 3:  # experts in one tensor, which transformers does not initialise
            torch.nn.init.normal_(weight, std=0.05)
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            torch.nn.init.normal_(buffer, std=0.1)
    return model.to(torch.bfloat16).eval()


def save_hf(name: str, folder: str | Path, seed: int = 0, entries: Mapping[str, Any] | None = None) -> Path:
    """Write the random model of a family and its tokenizer; return the folder."""
    from test_code.support import tiny

    folder = Path(folder)
    hf_model(name, seed, entries).save_pretrained(folder)
    tiny.tokenizer().tokenizer.save_pretrained(folder)
    return folder


def tokens(rows: int = 2, length: int = 32) -> torch.Tensor:
    """Return the token ids `[rows, length]` on which models are compared; each family has these entries."""
    return torch.randint(0, 256, (rows, length), generator=torch.Generator().manual_seed(0))


def hf_logits(folder: str | Path) -> torch.Tensor:
    """Return the logits `[rows, length, 256]` that `transformers` computes in fp32 from a folder."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(tokens()).logits[..., :256].float()
