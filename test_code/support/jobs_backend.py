"""What ranks execute for the tests of the CPU backend and of the pool itself."""

from __future__ import annotations

import os
import time

import torch


def rank_and_sum(value: int) -> tuple[int, int]:
    torch.distributed.init_process_group("gloo")
    total = torch.tensor(value + int(os.environ["RANK"]))
    torch.distributed.all_reduce(total)
    return int(os.environ["RANK"]), int(total)


def fail_on(rank: int) -> None:
    torch.distributed.init_process_group("gloo")
    if int(os.environ["RANK"]) == rank:
        raise KeyError(f"rank {rank} fails on purpose")
    torch.distributed.barrier()


def hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(60)


def train(steps: int = 4, distributed: bool = False, save_to=None, restore=None, data=None, overrides=None, **layout):
    from test_code.support import tiny

    model = tiny.model(optimizer=tiny.optim(distributed=distributed), **(overrides or {}))
    layout.setdefault("strategy_kwargs", {})["distributed"] = distributed
    return tiny.fit(model, tiny.data(**(data or {})), save_to, restore, max_steps=steps, **layout)


def clipped_norms(restore: str, **layout) -> tuple[float, float]:
    """Return the gradient norm that the optimizer saw in one step, and the norm that it left after clipping at 0.1."""
    import lightning.pytorch as pl

    from test_code.support import tiny

    seen = {}

    class Norms(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            seen["reported"] = float(trainer.callback_metrics["grad_norm"])
            grads = [p.main_grad.float() for p in tiny.core(pl_module).parameters()]
            # Gradients of sharded weights differ by rank, those of norms are the same on all: count these once.
            shared = [not getattr(p, "tensor_model_parallel", False) for p in tiny.core(pl_module).parameters()]
            once = int(os.environ["RANK"]) == 0
            total = sum(g.pow(2).sum() for g, s in zip(grads, shared, strict=True) if once or not s)
            torch.distributed.all_reduce(total)
            seen["clipped"] = float(total.sqrt())

    model = tiny.model(optimizer=tiny.optim(clip_grad=0.1))
    tiny.fit(model, restore=restore, callbacks=[Norms()], max_steps=1, **layout)
    return seen["reported"], seen["clipped"]


def through_nemo_and_back(folder: str, dtype_name: str) -> tuple[int, dict[str, float]]:
    """Import a Hugging Face Llama with random norms and export it again; return how many weights, and which differ."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    from nemo.collections import llm
    from test_code.support import tiny

    dtype = getattr(torch, dtype_name)
    settings = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": tiny.VOCABULARY}
    torch.manual_seed(0)
    original = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **settings)).to(dtype)
    for name, weight in original.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    original.save_pretrained(f"{folder}/hf")
    tiny.tokenizer().tokenizer.save_pretrained(f"{folder}/hf")

    config = llm.LlamaConfig(
        num_layers=2, hidden_size=64, ffn_hidden_size=128, num_attention_heads=4, num_query_groups=2, seq_length=32
    )
    llm.import_ckpt(llm.LlamaModel(config), f"hf://{folder}/hf", output_path=f"{folder}/nemo")
    llm.export_ckpt(f"{folder}/nemo", "hf", output_path=f"{folder}/back")
    back = AutoModelForCausalLM.from_pretrained(f"{folder}/back").state_dict()
    wanted = original.state_dict()
    assert back.keys() == wanted.keys()
    distances = {name: float((weight.float() - back[name].float()).abs().max()) for name, weight in wanted.items()}
    return len(wanted), {name: distance for name, distance in distances.items() if distance > 0}
