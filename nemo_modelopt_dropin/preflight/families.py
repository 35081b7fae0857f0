"""The families of models that NeMo imports, and what cannot be done with each: one table. Nothing heavy is imported.

The checks of pruning requests and of exports, and the table in ``docs/families.md`` are made from it: ``python -m
nemo_modelopt_dropin.preflight.families`` prints the latter.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_modelopt_dropin.preflight import algorithms

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
class FileLimit:
    """Quantized models that cannot be written as Hugging Face files.

    Attributes:
        name: What the models have.
        reason: Why they cannot be written.
        scaled_only: Whether this is so only for algorithms that scale inputs, AWQ and SmoothQuant.
    """

    name: str
    reason: str
    scaled_only: bool = False

    def applies(self, algorithm: str | None) -> bool:
        """Return whether an algorithm cannot be written; None and ``no_quant`` are a model that is not quantized."""
        if algorithm is None or algorithm == algorithms.NO_QUANT:
            return False
        return not self.scaled_only or algorithms.scales_inputs(algorithm)


LATENT_SCALES = FileLimit(
    "multi-latent attention",
    "AWQ and SmoothQuant scale the two projections after one norm of multi-latent attention differently",
    scaled_only=True,
)
STACKED = FileLimit(
    "GPT-OSS experts",
    "the files hold all experts of a layer in one tensor, and no reader takes scales for it",
)
PLAIN_NORMS = FileLimit(
    "norms without zero-centred weights",
    "its Hugging Face class adds one to the weights of norms, and this model was trained without "
    "(layernorm_zero_centered_gamma=False)",
)
# Families whose Hugging Face classes do so: packages of NeMo, and `model_type`.
ADD_ONE = {"nemotron": "nemotron", "gemma": "gemma", "gemma2": "gemma2", "gemma3": "gemma3_text"}
_REMOTE = (
    "transformers has no class for this family, whose code is in the repository of the model (trust_remote_code); "
    "NeMo's llm.export_ckpt writes plain files with target_model_name"
)
_REMOTE_FAMILIES = ("baichuan", "chatglm", "ssm")
# Packages of NeMo's models that are neither GPT nor Mamba models.
_OTHER_KINDS = ("t5", "bert")
# Sizes that can be changed in a model with multi-token prediction.
_WITH_HEADS = ("num_layers",)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: Name for people.
        models: Classes of `transformers` that NeMo imports.
        limit: Sizes that cannot be pruned.
        depth: How layers are removed.
        note: What else to know.
        files: What cannot be written as Hugging Face files.
    """

    name: str
    models: str
    limit: Limit | None = None
    depth: str = "by importance or number"
    note: str = ""
    files: FileLimit | None = None


_BY_NUMBER = "by number, if the other layers keep their kind of attention"
FAMILIES: dict[str, Family] = {
    "llama-2": Family("Llama 2", "`LlamaForCausalLM`"),
    "llama-3.2": Family(
        "Llama 3.x", "`LlamaForCausalLM`", note="`rope_scaling` other than Llama 3's is an error at import on a CPU"
    ),
    "qwen2.5": Family("Qwen2, Qwen2.5", "`Qwen2ForCausalLM`"),
    "qwen2.5-tied": Family("Qwen2.5 with tied embeddings", "`Qwen2ForCausalLM`"),
    "qwen3": Family(
        "Qwen3", "`Qwen3ForCausalLM`", note="on a GPU, NeMo imports 40960 positions, whatever `config.json` contains"
    ),
    "qwen3-moe": Family(
        "Qwen3-MoE",
        "`Qwen3MoeForCausalLM`",
        note="on a GPU, NeMo imports 128 experts with 8 per token and 40960 positions, whatever `config.json` contains",
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
    "starcoder": Family(
        "Starcoder",
        "`GPTBigCodeForCausalLM`",
        note="for Hugging Face files, prune `hidden_size` and `num_attention_heads` by the same factor: they have no "
        "size of heads, which is the hidden size over their number",
    ),
    "starcoder-2": Family("Starcoder2", "`Starcoder2ForCausalLM`"),
    "deepseek-2": Family(
        "DeepSeek V2",
        "`DeepseekV2ForCausalLM`",
        LATENT,
        note="on a GPU, NeMo imports V2 with V3's rotary scaling; groups of experts (`group_limited_greedy`, as in "
        "DeepSeek-V2, not in V2-Lite) are an error at import on a CPU and for Hugging Face files, because Megatron "
        "chooses other groups than transformers",
        files=LATENT_SCALES,
    ),
    "deepseek-3": Family("DeepSeek V3, R1", "`DeepseekV3ForCausalLM`", LATENT, files=LATENT_SCALES),
    "gpt-oss": Family(
        "GPT-OSS",
        "`GptOssForCausalLM`",
        note="files in bf16 and MXFP4 are read on a CPU, in MXFP4 on a GPU, where rotary embeddings lack YaRN's factor",
        files=STACKED,
    ),
}


def kind_problem(target: Any) -> str | None:
    """Return why a kind of model is not supported, None if it is.

    Args:
        target: Name of NeMo's class of the model, as in a checkpoint's ``model.yaml``.
    """
    if not any(f".llm.{kind}." in str(target) for kind in _OTHER_KINDS):
        return None
    name = str(target).rpartition(".")[2]
    return f"a {name} is not supported: modelopt converts NeMo's GPT and Mamba models (llm.GPTModel, llm.MambaModel)"


def class_problem(name: str) -> str | None:
    """Return why models of a class of NeMo cannot be written as Hugging Face files, None if they can.

    Args:
        name: Its name with the module.
    """
    return _REMOTE if any(f".model.{family}." in name for family in _REMOTE_FAMILIES) else None


def _features(config: Any) -> tuple[bool, list[str]]:
    """Return whether a model has multi-latent attention, and the names of the classes of its configuration."""
    if isinstance(config, Mapping):
        latent, names = config.get("multi_latent_attention"), [str(config.get("_target_", ""))]
    else:
        latent = getattr(config, "multi_latent_attention", False)
        names = [f"{kind.__module__}.{kind.__name__}" for kind in type(config).__mro__]
    return latent is True or any(".model.deepseek." in name for name in names), names


def limits(config: Any) -> list[Limit]:
    """Return what cannot be pruned of a model.

    Args:
        config: Its configuration: an object, or the mapping in a checkpoint's ``model.yaml``.
    """
    latent, names = _features(config)
    found = [LATENT] if latent else []
    if any(f".model.{family}." in name for name in names for family in ("gemma2", "gemma3")):
        found.append(POST_NORMS)
    return found


def _field(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def mtp_layers(config: Any) -> int:
    """Return the number of layers of a model's multi-token-prediction block; see `limits`."""
    found = _field(config, "mtp_num_layers")
    return found if isinstance(found, int) else 0


def kept_by_mtp(config: Any, targets: Collection[str], by_budget: bool) -> list[str]:
    """Return the targets that would leave a model's multi-token-prediction block at its old sizes.

    modelopt measures and cuts only the decoder; whole layers of it can be removed. The arguments are those of
    `prune_problems`.
    """
    if mtp_layers(config) < 1:
        return []
    names = [name.removeprefix("target_") for name in targets]
    found = [f"target_{name}" for name in names if name not in _WITH_HEADS]
    return found + (["target_params, target_active_params"] if by_budget else [])


def routing_problem(config: Any) -> str | None:
    """Return why `transformers` would send tokens of a DeepSeek to other experts, None if it would not.

    Both choose groups of experts first. Megatron adds up the best scores of each group, as many as a token has experts
    in one group; ``transformers`` takes the best score for V2 and the two best for V3.

    Args:
        config: See `limits`.
    """
    _, names = _features(config)
    if not any(".model.deepseek." in name for name in names):
        return None
    groups, chosen = _field(config, "moe_router_num_groups") or 1, _field(config, "moe_router_group_topk") or 1
    if groups == chosen:
        return None
    version, theirs = ("V3", 2) if _field(config, "moe_router_enable_expert_bias") else ("V2", 1)
    ours = (_field(config, "moe_router_topk") or 1) // chosen
    if ours == theirs:
        return None
    return (
        f"NeMo and transformers would choose other experts: to choose {chosen} of {groups} groups, Megatron adds up "
        f"the best {ours} scores of a group, and transformers the best {theirs} for DeepSeek {version} "
        "(moe_router_topk, moe_router_group_topk)"
    )


def file_problem(config: Any, algorithm: str | None) -> str | None:
    """Return why a model cannot be written as Hugging Face files, None if it can.

    Args:
        config: See `limits`.
        algorithm: A name in `algorithms.TABLE`; None and ``no_quant`` are a model that is not quantized.
    """
    latent, names = _features(config)
    if layers := mtp_layers(config):
        return (
            f"Hugging Face classes have no multi-token-prediction block (mtp_num_layers={layers}), it would be lost; "
            "restore the model without it (mtp_num_layers=None)"
        )
    if problem := next((one for name in names if (one := class_problem(name))), None):
        return problem
    adds_one = any(f".model.{family}." in name for name in names for family in ADD_ONE)
    if adds_one and _field(config, "layernorm_zero_centered_gamma") is False:
        return PLAIN_NORMS.reason
    if problem := routing_problem(config):
        return problem
    found = [LATENT_SCALES] if latent else []
    found += [STACKED] if any(".model.gpt_oss." in name for name in names) else []
    return next((limit.reason for limit in found if limit.applies(algorithm)), None)


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
        "| Family | Class in transformers | Width | Depth | Quantized Hugging Face files | Remarks |",
        "|---|---|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        width = "all sizes"
        if family.limit is not None:
            width = "all but " + ", ".join(f"`{name}`" for name in family.limit.targets)
        written = "all algorithms"
        if family.files is not None:
            which = "without AWQ and SmoothQuant" if family.files.scaled_only else "none"
            written = f"{which}: {family.files.reason}"
        rows.append(f"| {family.name} | {family.models} | {width} | {family.depth} | {written} | {family.note} |")
    return "\n".join(rows)


if __name__ == "__main__":
    import sys

    sys.stdout.write(table() + "\n")
