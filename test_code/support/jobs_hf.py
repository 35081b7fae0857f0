"""What ranks execute for the tests of Hugging Face exports of models that came from Hugging Face."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from test_code.support import jobs_quant, jobs_state, ranks, tiny
from test_code.support.other_sums import assert_equal_but_for_sums

FAMILIES = ("llama", "llama-tied", "qwen2", "qwen3")
ALGORITHMS = ("fp8", "int8", "int4", "int4_awq", "w4a8_awq")


def assert_same_logits(theirs, ours) -> None:
    """Compare the logits of a file with those of the model in memory; the weights are numbers of bf16 in both."""
    assert_equal_but_for_sums(theirs.exact, ours.exact)
    # Another order of sums moves inputs across the edge between two codes, on each processor others. Were all roundings
    # independent, the difference would be sqrt(2) times what rounding changes.
    changed = (ours.rounded - ours.exact).norm()
    assert (theirs.rounded - ours.rounded).norm() <= 1.5 * changed + 1e-5 * ours.exact.norm()


def hf_model(family: str, seed: int, **sizes):
    """Return a small random model of ``transformers`` with weights in bf16, norms and biases included.

    Args:
        family: One of `FAMILIES`.
        seed: Of the weights.
        **sizes: Entries of the configuration that differ.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

    classes = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    settings = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tiny.VOCABULARY,
        "max_position_embeddings": 64,
        "initializer_range": 0.05,
        "tie_word_embeddings": family.endswith("-tied"),
    }
    # NeMo's Qwen3 has heads of this size.
    settings |= {"head_dim": 128} if family == "qwen3" else {}
    config = classes[family.partition("-")[0]](**settings | sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
        elif name.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.1)
    return model


def import_hf(model, folder) -> str:
    """Write a model of ``transformers`` and import it into a NeMo checkpoint; return the checkpoint's path."""
    from nemo.collections import llm

    hf, nemo = Path(folder) / "original", Path(folder) / "nemo"
    model.save_pretrained(hf)
    tiny.tokenizer().tokenizer.save_pretrained(hf)
    kinds = {
        "LlamaForCausalLM": (llm.LlamaModel, llm.Llama32Config1B),
        "Qwen2ForCausalLM": (llm.Qwen2Model, llm.Qwen2Config500M),
        "Qwen3ForCausalLM": (llm.Qwen3Model, llm.Qwen3Config600M),
    }
    # Sizes come from the files, whatever the configuration says.
    model_class, config_class = kinds[type(model).__name__]
    llm.import_ckpt(model_class(config_class()), f"hf://{hf}", output_path=str(nemo), overwrite=True)
    return str(nemo)


def export_random(
    family: str, seeds: list[int], folder, algorithms=ALGORITHMS, edit=lambda model: None
) -> dict[tuple[int, str], float | str]:
    """Export random models of a family with each algorithm; return the relative error of the logits, or the refusal.

    Args:
        family: One of `FAMILIES`.
        seeds: Of the weights.
        folder: For the checkpoints.
        algorithms: To quantize with.
        edit: Changes each model of ``transformers`` first.
    """
    from nemo.collections.llm.modelopt.quantization.export import hf_verify, support

    found: dict[tuple[int, str], float | str] = {}
    errors: list[float] = []
    compare = hf_verify.compare
    hf_verify.compare = lambda *args: errors.append(compare(*args))
    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    quant = {"calibration_dataset": data, "calibration_dataset_size": 8, "enable_kv_cache": False}
    try:
        for seed in seeds:
            own = Path(folder) / f"{family}-{seed}"
            model = hf_model(family, seed)
            with torch.no_grad():
                edit(model)
            checkpoint = import_hf(model, own)
            ranks.reset()
            for algorithm in algorithms:
                try:
                    jobs_quant.ptq(checkpoint, own / algorithm, algorithm, "hf", quant=quant)
                    found[seed, algorithm] = errors.pop()
                except support.ExportError as error:
                    found[seed, algorithm] = str(error)
                ranks.reset()
            shutil.rmtree(own)
    finally:
        hf_verify.compare = compare
    return found


def zeros(model) -> None:
    """Put zeros into a whole matrix, a row and a block of a Llama's weights, and let one layer see only zeros."""
    first, second = model.model.layers
    first.self_attn.o_proj.weight.zero_()
    first.self_attn.q_proj.weight[3].zero_()
    first.mlp.down_proj.weight[5, :128].zero_()
    # The input of `down_proj` is a product with this one's output.
    second.mlp.up_proj.weight.zero_()


def export_with_zeros(folder, algorithm: str) -> float | str:
    """Export a random Llama with zeros; return the relative error of the logits, or the refusal."""
    return export_random("llama", [0], folder, (algorithm,), zeros)[0, algorithm]


def check_corrupted(folder, algorithm: str) -> dict[str, str]:
    """Export a random Qwen2, then spoil a copy of the files in each way; return what the full check says of each.

    The names are those of `CORRUPTIONS`, and "nothing" for the files as they are.
    """
    from nemo.collections.llm.modelopt.quantization.export import hf_verify, support

    data = jobs_quant.corpus(Path(folder) / "text.jsonl")
    # As many keys as queries, or q and k could not be mixed up.
    checkpoint = import_hf(hf_model("qwen2", 0, num_key_value_heads=4), folder)
    ranks.reset()
    target = Path(folder) / "hf"
    settings = {"algorithm": algorithm, "enable_kv_cache": False}
    quantizer = jobs_state.quantizer_for(data, export={"path": str(target), "export_format": "hf"}, **settings)
    model, trainer = jobs_state.restored(checkpoint)
    quantizer.quantize(model)
    quantizer.export(model, checkpoint, trainer)
    found = {}
    for name in ("nothing", *CORRUPTIONS):
        spoiled = Path(folder) / "spoiled"
        shutil.copytree(target, spoiled)
        if name != "nothing" and not spoil(spoiled, CORRUPTIONS[name]):
            found[name] = "does not apply"
        else:
            try:
                hf_verify.check_logits(tiny.core(model), spoiled, torch.bfloat16)
                found[name] = ""
            except support.ExportError as error:
                found[name] = str(error)
        shutil.rmtree(spoiled)
    return found


def spoil(folder, change) -> bool:
    """Change the tensors of a checkpoint's files; return whether there was anything to change.

    Args:
        folder: The checkpoint.
        change: Changes a dictionary of tensors by name in place; returns whether it did.
    """
    from safetensors.torch import load_file, save_file

    changed = False
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors = load_file(file)
        if change(tensors):
            changed = True
            save_file(tensors, file, metadata={"format": "pt"})
    return changed


def _scaled(suffix: str, layer: int = 1, factor: float = 1.01):
    """Return a change of one scale, or one of its elements, of one matrix."""

    def change(tensors) -> bool:
        for name in [n for n in tensors if f"layers.{layer}." in n and n.endswith(suffix)]:
            value = tensors[name].clone()
            value.view(-1)[0] *= factor
            tensors[name] = value
            return True
        return False

    return change


def _one_code(tensors) -> bool:
    """Change one code of one matrix by the smallest amount."""
    name = "model.layers.1.mlp.up_proj.weight"
    if name not in tensors:
        return False
    codes = tensors[name].clone()
    codes.view(torch.uint8)[3, 5] ^= 1
    tensors[name] = codes
    return True


def _swapped(tensors) -> bool:
    """Swap the queries and the keys of one layer."""
    names = [name for name in tensors if "layers.0.self_attn.q_proj." in name]
    for name in names:
        other = name.replace("q_proj", "k_proj")
        tensors[name], tensors[other] = tensors[other], tensors[name]
    return bool(names)


def _set(suffix: str, value: float, layer: int = 1):
    """Return a change that fills one tensor."""

    def change(tensors) -> bool:
        names = [name for name in tensors if f"layers.{layer}." in name and name.endswith(suffix)]
        for name in names[:1]:
            tensors[name] = torch.full_like(tensors[name], value)
        return bool(names)

    return change


CORRUPTIONS = {
    "one code": _one_code,
    "one weight scale": _scaled("o_proj.weight_scale"),
    "one second scale": _scaled("o_proj.weight_scale_2"),
    "one input scale": _scaled("o_proj.input_scale"),
    "one scale of the inputs": _scaled("o_proj.pre_quant_scale", factor=1.1),
    "q and k swapped": _swapped,
    "a norm without what was folded into it": _set("input_layernorm.weight", 1.0),
    "one element of a norm": _scaled("post_attention_layernorm.weight", factor=1.1),
    "a bias lost": _set("q_proj.bias", 0.0),
}
