"""Jobs of the tests of input scales, excluded layers and the KV cache in Hugging Face checkpoints."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch

from test_code.support import jobs_quant

_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def import_family(folder: str, family: str, seed: int = 0) -> str:
    """Write a Hugging Face model of a family with random bf16 weights, import it, and return the NeMo checkpoint.

    Args:
        folder: Where to write to.
        family: One of `FAMILIES`, or "llama-large", whose keys exceed the largest number of FP8.
        seed: Of the weights.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    from nemo.collections import llm
    from test_code.support import ranks, tiny

    classes = {
        "llama": (transformers.LlamaConfig, "LlamaModel", "Llama32Config1B"),
        "qwen2": (transformers.Qwen2Config, "Qwen2Model", "Qwen2Config500M"),
        "qwen3": (transformers.Qwen3Config, "Qwen3Model", "Qwen3Config600M"),
    }
    name, _, kind = family.partition("-")
    config_class, model_name, nemo_config = classes[name]
    more = {"head_dim": 128} if name == "qwen3" else {}  # NeMo's importer does not read it
    # NeMo's importer of Qwen2 unties the output layer.
    tied = kind == "tied" or name == "qwen3"
    config = config_class(vocab_size=tiny.VOCABULARY, tie_word_embeddings=tied, **_SIZES, **more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for parameter, weight in model.named_parameters():
        if "norm" in parameter:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        else:
            large = kind == "large" and "k_proj" in parameter
            torch.nn.init.normal_(weight, std=1000.0 if large else 0.1)
            if kind == "large" and "q_proj" in parameter:
                # Scores of attention stay what they would be.
                weight.data /= 10000
    model.save_pretrained(f"{folder}/{family}-hf")
    tiny.tokenizer().tokenizer.save_pretrained(f"{folder}/{family}-hf")
    target = f"{folder}/{family}"
    nemo_model = getattr(llm, model_name)(getattr(llm, nemo_config)())
    llm.import_ckpt(nemo_model, f"hf://{folder}/{family}-hf", output_path=target)
    ranks.reset()
    return target


def make_moe(path: str) -> str:
    """Write a NeMo checkpoint of a tiny mixture of experts of Qwen3."""
    return make(
        path,
        "Qwen3",
        qk_layernorm=True,
        kv_channels=16,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=48,
        moe_grouped_gemm=False,
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=0.0,
        moe_permute_fusion=False,
        moe_router_load_balancing_type="none",
    )


def make(path: str, family: str, **overrides) -> str:
    """Write a NeMo checkpoint of a tiny model of one of NeMo's classes, with weights that are numbers of bf16."""
    from nemo.collections import llm
    from test_code.support import jobs_prune, tiny

    config, config_class = tiny.config(num_layers=2), getattr(llm, f"{family}Config")
    fields = config_class.__dataclass_fields__
    settings = {name: getattr(config, name) for name in fields if hasattr(config, name)}
    settings |= {"vocab_size": tiny.VOCABULARY, **{name: v for name, v in overrides.items() if name in fields}}
    model = getattr(llm, f"{family}Model")(config_class(**settings), optim=tiny.optim(), tokenizer=tiny.tokenizer())
    trainer = tiny.trainer(max_steps=1)
    trainer.fit(model, tiny.data())
    jobs_prune.fill(model)
    for parameter in tiny.core(model).parameters():
        parameter.data = parameter.data.bfloat16().float()
    # Without the callbacks of our tests, which NeMo does not let its exporters load.
    return str(tiny.save(trainer, path))


def import_all(folder: str, families: tuple[str, ...]) -> None:
    """Import a model of each family, see `import_family`."""
    for family in families:
        import_family(folder, family)


def plain_int4(path: str) -> str:
    """Write a quant_cfg of plain INT4 in blocks of 16, which modelopt's preset has at 128, and return its path."""
    weights = {"num_bits": 4, "block_sizes": {"-1": 16}, "enable": True}
    content = {"*weight_quantizer": weights, "*input_quantizer": {"enable": False}, "*output_layer*": {"enable": False}}
    Path(path).write_text(json.dumps({"quant_cfg": {**content, "default": {"enable": False}}, "algorithm": "max"}))
    return path


@contextlib.contextmanager
def starved(expert: int | None):
    """Let the routers send no token to an expert inside the context."""
    from megatron.core.transformer.moe.router import TopKRouter

    gating = TopKRouter.gating

    def without(self, *args, **kwargs):
        logits = gating(self, *args, **kwargs)
        return logits.index_fill(-1, torch.tensor([expert], device=logits.device), -1e9)

    TopKRouter.gating = gating if expert is None else without
    try:
        yield
    finally:
        TopKRouter.gating = gating


def export_both(checkpoint: str, target: str, algorithm: str, quant: dict, unused: int | None = None) -> dict:
    """Calibrate once, export to ``target`` and to ``target``-nemo; return what the model in memory holds.

    Args:
        checkpoint: NeMo checkpoint.
        target: folder of the HF export.
        algorithm: what to quantize with.
        quant: further settings of the quantization.
        unused: number of an expert that no calibration token reaches.

    Returns:
        By layer: the norms before the fused layers, the scales of inputs, and the amax of keys and values.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module

    seen = {}
    quantize = module.Quantizer.quantize

    def keep(self, model, forward_loop=None):
        with starved(unused):
            found = quantize(self, model, forward_loop)
        seen.update(state_of(found))
        return found

    module.Quantizer.quantize = keep
    try:
        jobs_quant.ptq_twice(checkpoint, f"{target}-nemo", target, algorithm, quant)
    finally:
        module.Quantizer.quantize = quantize
    return seen


def state_of(model) -> dict[str, torch.Tensor]:
    """Return norms, scales of inputs, and amax of the KV cache of this rank's layers by name."""
    from test_code.support import tiny

    core = tiny.core(model)
    wanted = ("layernorm.weight", "layernorm.bias", "_pre_quant_scale", "_quantizer._amax")
    return {name: value.detach().clone() for name, value in core.state_dict().items() if name.endswith(wanted)}
