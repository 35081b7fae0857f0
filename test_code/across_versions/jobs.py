"""What a process executes on the versions that are first on its path: it writes something, or reads what others wrote.

``python -m test_code.across_versions.jobs CALLS ANSWERS`` runs the calls of one pickle, and rank zero writes their
results, or the texts of the errors that users would see, into another. torchrun can start several ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

# An answer that begins with it is the text of an error for users.
ERROR = "error: "
ATTENTION_AND_MLP = "mixture"


def main(calls: str, answers: str) -> None:
    """Run the calls one after another; with several ranks, one."""
    from test_code.support import devices, ranks

    alone, rank = "RANK" not in os.environ, int(os.environ.get("RANK", "0"))
    devices.start_rank(rank)
    from nemo.collections.llm.modelopt import ModelOptConfigError

    found = []
    for name, arguments in pickle.loads(Path(calls).read_bytes()):
        if alone:  # a trainer removes some of them at its end
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
            os.environ["MASTER_PORT"] = str(_free_port())
        try:
            found.append(globals()[name](**arguments))
        except ModelOptConfigError as error:
            found.append(f"{ERROR}{error}")
        except Exception:
            found.append(traceback.format_exc()[-40000:])
        ranks.reset()
    if rank == 0:
        Path(answers).write_bytes(pickle.dumps(found))


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def imported(family: str, folder: str) -> str:
    """Write a small model of a family, or "tiny", and texts to calibrate on; return the checkpoint."""
    from test_code.families import jobs
    from test_code.support import jobs_quant

    jobs_quant.corpus(Path(folder, "texts.jsonl"))
    settings = {"num_bits": 8, "axis": 0}
    rounding = {
        "default": {"enable": False},
        "*mlp*weight_quantizer": settings,
        "*self_attention*weight_quantizer": {"num_bits": [4, 3]},
        "*self_attention*input_quantizer": {"num_bits": [4, 3]},
        "*layers.1.*": {"enable": False},
    }
    Path(folder, "mixture.json").write_text(json.dumps({"quant_cfg": rounding, "algorithm": "max"}))
    if family == "tiny":
        return jobs_quant.make_checkpoint(Path(folder, "nemo"), llama=True)
    return str(jobs.import_hf(family, folder))


def quantized(source: str, target: str, algorithm: str, **settings: Any) -> dict[str, Any]:
    """Run ``llm.ptq``, and return what the checkpoint is in this version."""
    from test_code.support import jobs_quant, ranks

    folder = Path(source).parent
    if algorithm == ATTENTION_AND_MLP:
        algorithm = str(folder / "mixture.json")
    data = {"calibration_dataset": str(folder / "texts.jsonl"), "calibration_dataset_size": 16, "awq_block_size": 16}
    jobs_quant.ptq(source, target, algorithm, quant={**data, **settings})
    ranks.reset()
    return restored(target)


def restored(path: str, tp: int = 1, pp: int = 1, by_ours: bool = True) -> dict[str, Any]:
    """Restore a checkpoint, and return its logits and the amax of this rank's quantizers.

    Args:
        path: The checkpoint.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size.
        by_ours: False: as if the installed modelopt had written it.
    """
    from modelopt.torch.quantization.nn import TensorQuantizer

    from nemo.collections.llm.modelopt.quantization.export import hf_verify
    from nemo.collections.llm.modelopt.quantization.insert import other_versions
    from test_code.support import jobs_state, tiny

    with contextlib.nullcontext() if by_ours else patch.object(other_versions, "restored", contextlib.nullcontext):
        model, _ = jobs_state.restored(path, tp, pp)
    core = tiny.core(model)
    amax = {
        name: quantizer.amax.detach()
        for name, quantizer in core.named_modules()
        if isinstance(quantizer, TensorQuantizer) and quantizer.is_enabled and quantizer.amax is not None
    }
    return {"logits": hf_verify.quantized_logits(core, tiny.VOCABULARY).rounded, "amax": amax}


def exported(path: str, target: str) -> dict[str, Any]:
    """Restore a checkpoint, write it for Hugging Face, and return the tensors of the files."""
    import torch
    from safetensors.torch import load_file

    from test_code.support import jobs_quant

    jobs_quant.export_loaded(path, target)
    found = [item for file in sorted(Path(target).glob("*.safetensors")) for item in load_file(file).items()]
    # FP8 has no pickles.
    return {name: value.view(torch.uint8) if value.element_size() == 1 else value for name, value in found}


def trained_on(path: str, target: str) -> list[float]:
    """Train a restored checkpoint for three steps, save it, and return its losses."""
    from test_code.support import jobs_prune

    return jobs_prune.train_checkpoint(path, save_to=target)


# --- what belongs to one version -------------------------------------------------------------------------------------


def state_saved(source: str, folder: str, algorithm: str) -> None:
    """Calibrate, and store the calibrated state."""
    from test_code.support import jobs_state

    model, _ = jobs_state.restored(source)
    quantizer = jobs_state.quantizer_for(Path(source).parent / "texts.jsonl", algorithm)
    quantizer.quantize(model)
    quantizer.save_state(folder)


def state_loaded(source: str, folder: str, algorithm: str) -> None:
    """Load a calibrated state."""
    from test_code.support import jobs_state

    model, _ = jobs_state.restored(source)
    jobs_state.quantizer_for(Path(source).parent / "texts.jsonl", algorithm).load_state(folder, model)


def searched(source: str, folder: str) -> None:
    """Search for mixed precision, and store what it measured or use what is stored."""
    from test_code.support import jobs_state

    model, _ = jobs_state.restored(source)
    auto = {"auto_quantize_bits": 9.0, "auto_quantize_checkpoint": folder, "awq_block_size": 16}
    jobs_state.quantizer_for(Path(source).parent / "texts.jsonl", "auto", **auto).quantize(model)


if __name__ == "__main__":
    main(*sys.argv[1:])
