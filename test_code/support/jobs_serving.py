"""What ranks execute for the tests of exports that other programs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from test_code.support import bf16, jobs_hf, jobs_quant, ranks, tiny

# Sizes that the kernels of servers accept: widths are multiples of 128, and heads have 128 rows, so that blocks of 128
# rows of the fused q, k and v are rows of one of them.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "max_position_embeddings": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def prompts(count: int = 8, length: int = 64) -> torch.Tensor:
    """Return the token ids `[p, s]` of the comparison."""
    return torch.randint(3, tiny.VOCABULARY, (count, length), generator=torch.Generator().manual_seed(0))


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Return the mean KL divergence of log probabilities `[..., v]`, in nats."""
    return float((p.exp() * (p - q)).sum(-1).mean())


def make(family: str, folder, **sizes) -> tuple[str, torch.Tensor]:
    """Write a model of ``transformers`` and a NeMo checkpoint with its weights.

    Args:
        family: See `jobs_hf.hf_model`.
        folder: Gets ``original`` and ``nemo``.
        **sizes: Entries of the configuration other than `SIZES`.

    Returns:
        The NeMo checkpoint, and the log probabilities `[p, s - 1, v]` of the model in fp32.
    """
    model = jobs_hf.hf_model(family, 0, **SIZES | sizes)
    checkpoint = jobs_hf.import_hf(model, folder)
    with torch.no_grad():
        logits = model.float()(prompts()).logits
    ranks.reset()
    return checkpoint, logits.log_softmax(-1)[:, :-1]


@dataclass(frozen=True)
class InMemory:
    """What is known of a quantized model in memory.

    Attributes:
        logprobs: The log probabilities `[p, s - 1, v]` of the prompts, in fp32.
        noise: The mean KL divergence of the same model with results in bf16, see `bf16.imitated`, from `logprobs`.
    """

    logprobs: torch.Tensor
    noise: float


# Their mean is steady even if only a few tokens get other experts.
DRAWS = 4


def in_memory(core, draws: int) -> InMemory:
    """Run a quantized model.

    Args:
        core: The model.
        draws: How often its arithmetic in bf16 is imitated; the noise of none is NaN.
    """
    expected = log_probabilities(core)
    noise = []
    for seed in range(draws):
        with bf16.imitated(core, seed):
            noise.append(divergence(expected, log_probabilities(core)))
    return InMemory(expected, sum(noise) / draws if draws else float("nan"))


def export(checkpoint, target, algorithm, **settings) -> InMemory:
    """Quantize a checkpoint and write a Hugging Face folder.

    Args:
        checkpoint: The NeMo checkpoint.
        target: The folder.
        algorithm: Of ``QuantizationConfig``.
        **settings: ``quant`` and ``export``, of both configurations, and ``draws`` of `in_memory`; ``export`` names the
            layout.

    Returns:
        The quantized model in memory.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module
    from nemo.collections.llm.modelopt.quantization.export import hf_kv_cache
    from nemo.collections.llm.modelopt.quantization.export.layouts import LAYOUTS

    found = []
    layout = LAYOUTS[settings["export"]["hf_layout"]]
    quantize = module.Quantizer.quantize

    def keep(self, model, forward_loop=None):
        quantized = quantize(self, model, forward_loop)
        core = tiny.core(quantized)
        # Scales of packed integers are stored in bf16, and codes are chosen for these; those of a cache are at least 1.
        with layout.scales_as_stored(core, torch.bfloat16), hf_kv_cache.as_stored(core):
            found.append(in_memory(core, settings.get("draws", DRAWS)))
        return quantized

    module.Quantizer.quantize = keep
    data = jobs_quant.corpus(Path(target).parent / "text.jsonl")
    quant = {"calibration_dataset": data, "calibration_dataset_size": 16, "enable_kv_cache": False}
    try:
        jobs_quant.ptq(
            checkpoint,
            target,
            algorithm,
            "hf",
            quant=quant | settings.get("quant", {}),
            export={"verify": "files"} | settings.get("export", {}),
        )
    finally:
        module.Quantizer.quantize = quantize
        ranks.reset()
    return found[0]


def log_probabilities(core) -> torch.Tensor:
    """Return the log probabilities `[p, s - 1, v]` of the prompts; entry i belongs to token i + 1."""
    tokens = prompts()
    was_training = core.training
    core.eval()
    with torch.no_grad():
        logits = tiny.run(core, tokens).float()
    core.train(was_training)
    return logits[..., : tiny.VOCABULARY].log_softmax(-1)[:, :-1]


def modelopts_own(original, target, preset: str) -> None:
    """Quantize a model of ``transformers`` with modelopt, and write it with modelopt's own exporter.

    Args:
        original: The folder of the model.
        target: The folder that is written.
        preset: Name of a quant_cfg of modelopt.
    """
    import copy

    from modelopt.torch import quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(original, torch_dtype=torch.bfloat16)
    # Each expert sees tokens: modelopt cannot export one without calibrated inputs.
    tokens = torch.randint(3, tiny.VOCABULARY, (16, 48), generator=torch.Generator().manual_seed(1))
    mtq.quantize(model, copy.deepcopy(getattr(mtq, preset)), lambda model: model(tokens))
    export_hf_checkpoint(model, export_dir=target)


def transformers_logits(folder, dtype=torch.float32) -> torch.Tensor:
    """Return the log probabilities `[p, s - 1, v]` of a folder that ``transformers`` loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=dtype).eval()
    with torch.no_grad():
        logits = model(prompts()).logits.float()
    return logits.log_softmax(-1)[:, :-1]
