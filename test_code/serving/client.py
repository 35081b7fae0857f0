"""The process that serves folders with vLLM, and the comparison of log probabilities."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from test_code.support import jobs_serving

ROOT = Path(__file__).parents[2]
# Built by `make test-serving`; the variable is for an environment elsewhere.
PYTHON = Path(os.environ.get("SERVING_PYTHON") or ROOT / "build" / "serving" / "bin" / "python")
# Sequences that the engine serves at a time.
TOGETHER = 4
RESULTS = ROOT / "build" / "serving" / "results.json"


class Engine:
    """One process of vLLM that serves folders one after the other, because importing vLLM takes long."""

    def __init__(self, log: Path):
        """Start the process; its log is the file."""
        self.log = log
        self.logprobs = log.with_suffix(".pt")
        command = [str(PYTHON), str(Path(__file__).parent / "engine.py")]
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True
            )

    def serve(self, folder: Path, new_tokens: int = 4, memory: bool = False) -> dict:
        """Return the engine's answer for a folder; `logprobs` is `[p, s - 1, v]`.

        Args:
            folder: The folder.
            new_tokens: Tokens that are generated after each prompt.
            memory: Whether the answer has the memory as well.

        Raises:
            ServingError: If vLLM raised an error.
        """
        request = {
            "folder": str(folder),
            "tokens": jobs_serving.prompts().tolist(),
            "logprobs": str(self.logprobs),
            "new_tokens": new_tokens,
            "memory": memory,
            "together": TOGETHER,
        }
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise ServingError(f"vLLM's process ended; the end of its log:\n{self.log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise ServingError(answer["error"])
        return answer | {"logprobs": torch.load(self.logprobs)}

    def close(self) -> None:
        """End the process."""
        with self.process:
            self.process.stdin.close()
            self.process.wait(60)


class ServingError(RuntimeError):
    """vLLM could not serve a folder."""


def bound(noise: float) -> float:
    """Return the largest mean KL divergence of vLLM from the model in memory that arithmetic in bf16 can cause.

    vLLM computes in bf16, the model in memory in fp32. `noise` is what bf16 costs the same model in memory: codes of
    inputs that flip, and other experts that are chosen, included. Its results are rounded up or down by chance, which
    has twice the variance of the rounding to the nearest that vLLM does. The divergence grows with the variance. Twice
    the noise is allowed, because vLLM rounds in other places, too: between the two sums of a layer, and inside
    attention. Nothing that vLLM computed is in the bound.

    Args:
        noise: Of `jobs_serving.InMemory`.
    """
    return 2 * noise


# --- wrong folders ----------------------------------------------------------------------------------------------------


def double_scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Double the scale of the last layer's ``down_proj``, or its experts' ``w2``, or else of the last quantized one.

    If there are scales of a KV cache, change these: divide them, because keys and values are quantized and decoded with
    the same scale, and twice the scale changes next to nothing in FP8. They are then cut off at 0.44.
    """
    cache = {name: value / 1024 for name, value in tensors.items() if name.endswith((".k_scale", ".v_scale"))}
    if cache:
        return tensors | cache
    quantized = sorted(name.removesuffix("weight_scale") for name in tensors if name.endswith(".weight_scale"))
    assert quantized, "no scale to double"
    last = quantized[-1].split(".")[2]
    outer = [name for name in quantized if name.split(".")[2] == last and name.endswith(("down_proj.", "w2."))]
    return tensors | dict(_doubled(layer, tensors) for layer in outer or quantized[-1:])


def _doubled(layer: str, tensors: dict[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    """Return the name of a scale of a layer, and its value for weights that are twice as large."""
    # The scale of a whole layer in NVFP4; compressed-tensors stores its reciprocal.
    for leaf, factor in (("weight_scale_2", 2.0), ("weight_global_scale", 0.5)):
        if layer + leaf in tensors:
            return layer + leaf, tensors[layer + leaf] * factor
    scale = tensors[f"{layer}weight_scale"]
    # E8M0 is an exponent.
    return f"{layer}weight_scale", scale + 1 if scale.dtype == torch.uint8 else scale * 2


def shrink_input_scale(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Divide the stored scale of the inputs of the last layer's ``down_proj``, so that large inputs are cut off."""
    name = max(name for name in tensors if "down_proj.input_" in name)
    # compressed-tensors stores the reciprocal for NVFP4.
    return tensors | {name: tensors[name] * (64 if name.endswith("global_scale") else 1 / 64)}


def swap(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Exchange ``k_proj`` and ``v_proj`` of the first layer, or two of its experts."""
    experts = any(".experts." in name for name in tensors)
    a, b = (".0.block_sparse_moe.experts.0.", ".0.block_sparse_moe.experts.1.") if experts else (
        ".0.self_attn.k_proj.", ".0.self_attn.v_proj.",
    )  # fmt: skip
    return {
        name.replace(a, b) if a in name else name.replace(b, a) if b in name else name: value
        for name, value in tensors.items()
    }


def changed(folder: Path, target: Path, change) -> Path:
    """Copy a folder with other tensors, in one file.

    Args:
        folder: The folder.
        target: The copy.
        change: Returns the tensors by name from those of the folder.
    """
    shutil.copytree(folder, target)
    tensors: dict[str, torch.Tensor] = {}
    for file in target.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (target / "model.safetensors.index.json").unlink(missing_ok=True)
    result = {name: value.contiguous().clone() for name, value in change(tensors).items()}
    save_file(result, target / "model.safetensors", metadata={"format": "pt"})
    return target
