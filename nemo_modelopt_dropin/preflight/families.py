"""The families of models that NeMo imports, and what cannot be done with each: one table. Nothing heavy is imported.

The checks of pruning requests and the table in ``docs/families.md`` are made from it: ``python -m
nemo_modelopt_dropin.preflight.families`` prints the latter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

_HEADS = ("num_attention_heads", "num_query_groups")


@dataclass(frozen=True)
class Limit:
    """Sizes that cannot be pruned in some families.

    Attributes:
        name: What the models have, such as ``multi-latent attention``.
        targets: Names of the sizes.
        advice: What to set instead.
    """

    name: str
    targets: tuple[str, ...]
    advice: str

    def message(self, targets: Collection[str], by_budget: bool) -> str | None:
        """Return why a request cannot be satisfied, None if it can.

        Args:
            targets: Names of the requested sizes.
            by_budget: Whether a search chooses other sizes to reach a number of parameters.
        """
        wrong = [f"target_{name}" for name in self.targets if name in targets]
        wrong += ["target_params"] if by_budget else []
        if not wrong:
            return None
        return f"{', '.join(wrong)} cannot be pruned in a model with {self.name}: modelopt leaves it out; {self.advice}"


LATENT = Limit(
    "multi-latent attention",
    ("hidden_size", *_HEADS),
    "set target_ffn_hidden_size, target_moe_ffn_hidden_size, target_num_moe_experts, target_num_layers or drop_layers",
)
POST_NORMS = Limit(
    "norms after attention and MLP",
    ("hidden_size",),
    "set target_ffn_hidden_size, target_num_attention_heads or drop_layers",
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: Name for people.
        models: Classes of `transformers` that NeMo imports.
        limit: Sizes that cannot be pruned.
        depth: How layers are removed.
        note: What else to know.
    """

    name: str
    models: str
    limit: Limit | None = None
    depth: str = "by importance or number"
    note: str = ""


_BY_NUMBER = "by number, if the other layers keep their kind of attention"
FAMILIES: dict[str, Family] = {
    "llama-2": Family("Llama 2", "`LlamaForCausalLM`"),
    "llama-3.2": Family(
        "Llama 3.x", "`LlamaForCausalLM`", note="`rope_scaling` other than Llama 3's is an error at import on a CPU"
    ),
    "qwen2.5": Family("Qwen2, Qwen2.5", "`Qwen2ForCausalLM`"),
    "qwen2.5-tied": Family("Qwen2.5 with tied embeddings", "`Qwen2ForCausalLM`"),
    "qwen3": Family("Qwen3", "`Qwen3ForCausalLM`"),
    "qwen3-moe": Family(
        "Qwen3-MoE",
        "`Qwen3MoeForCausalLM`",
        note="on a GPU, NeMo imports 128 experts with 8 per token, whatever `config.json` contains",
    ),
    "mistral": Family("Mistral without a window", "`MistralForCausalLM`"),
    "mistral-window": Family(
        "Mistral with a sliding window",
        "`MistralForCausalLM`",
        note="imported on a GPU, NeMo's window is one token longer than that of transformers",
    ),
    "mixtral": Family("Mixtral", "`MixtralForCausalLM`"),
    "gemma": Family("Gemma", "`GemmaForCausalLM`"),
    "gemma-2": Family(
        "Gemma 2",
        "`Gemma2ForCausalLM`",
        POST_NORMS,
        _BY_NUMBER,
        "on a GPU, NeMo has the windows in the other half of the layers, and modelopt prunes only by number",
    ),
    "gemma-3": Family(
        "Gemma 3 (text)",
        "`Gemma3ForCausalLM`",
        POST_NORMS,
        _BY_NUMBER,
        "on a GPU, NeMo 2.7.3's attention does not run with Megatron-Core 0.15",
    ),
    "phi-3": Family(
        "Phi-3",
        "`Phi3ForCausalLM`",
        note="long rotary scaling and partial rotary embeddings are an error at import on a CPU",
    ),
    "nemotron": Family("Nemotron 3, 4, Minitron", "`NemotronForCausalLM`"),
    "starcoder": Family("Starcoder", "`GPTBigCodeForCausalLM`"),
    "starcoder-2": Family("Starcoder2", "`Starcoder2ForCausalLM`"),
    "deepseek-2": Family(
        "DeepSeek V2", "`DeepseekV2ForCausalLM`", LATENT, note="on a GPU, NeMo imports V2 with V3's rotary scaling"
    ),
    "deepseek-3": Family("DeepSeek V3, R1", "`DeepseekV3ForCausalLM`", LATENT),
    "gpt-oss": Family(
        "GPT-OSS",
        "`GptOssForCausalLM`",
        note="files in bf16 and MXFP4 are read on a CPU, in MXFP4 on a GPU, where rotary embeddings lack YaRN's factor",
    ),
}


def limits(config: Any) -> list[Limit]:
    """Return what cannot be pruned of a model.

    Args:
        config: Its configuration: an object, or the mapping in a checkpoint's ``model.yaml``.
    """
    if isinstance(config, Mapping):
        latent, names = config.get("multi_latent_attention"), [str(config.get("_target_", ""))]
    else:
        latent = getattr(config, "multi_latent_attention", False)
        names = [f"{kind.__module__}.{kind.__name__}" for kind in type(config).__mro__]
    found = [LATENT] if latent is True or any(".model.deepseek." in name for name in names) else []
    if any(f".model.{family}." in name for name in names for family in ("gemma2", "gemma3")):
        found.append(POST_NORMS)
    return found


def prune_problems(config: Any, targets: Collection[str], by_budget: bool = False) -> list[str]:
    """Return why a model cannot be pruned to sizes by importance.

    Args:
        config: See `limits`.
        targets: Names of the requested sizes, with or without ``target_``.
        by_budget: Whether a search chooses other sizes to reach a number of parameters.
    """
    names = {name.removeprefix("target_") for name in targets}
    found = [limit.message(names, by_budget) for limit in limits(config)]
    return [message for message in found if message is not None]


def table() -> str:
    """Return the table of families in Markdown."""
    rows = [
        "| Family | Class in transformers | Width | Depth | Remarks |",
        "|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        width = "all sizes"
        if family.limit is not None:
            width = "all but " + ", ".join(f"`{name}`" for name in family.limit.targets)
        rows.append(f"| {family.name} | {family.models} | {width} | {family.depth} | {family.note} |")
    return "\n".join(rows)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
