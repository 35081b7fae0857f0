"""The CPU backend: real NeMo training, optimizers, layouts and checkpoints on gloo ranks; and the pool of ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
import torch

from nemo_modelopt_dropin import cpu_backend as backend_module
from test_code.support.ranks import RankError, RankPool

pytestmark = pytest.mark.cpu

# Layouts reorder fp32 sums: 4 steps of Adam at lr 1e-3 keep the losses together to this.
LAYOUT_TOLERANCE = 2e-5


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


@pytest.fixture(scope="module")
def start(ranks_factory, tmp_path_factory):
    """A checkpoint from one rank that every layout starts from, and the losses one rank gets from there."""
    path = tmp_path_factory.mktemp("backend") / "start"
    ranks_factory(1).run(train, steps=2, save_to=str(path))
    losses = ranks_factory(1).run(train, restore=str(path))[0]
    return str(path), losses


LAYOUTS = {
    "dp2": {},
    "dp2, distributed optimizer": {"distributed": True},
    "tp2": {"tp": 2},
    "tp2 sp": {"tp": 2, "sp": True},
    "tp2, distributed optimizer": {"tp": 2, "distributed": True},
    "pp2": {"pp": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_trains_as_one_rank(ranks, start, layout):
    path, expected = start
    for losses in ranks(2).run(train, restore=path, **layout):
        assert losses == pytest.approx(expected, abs=LAYOUT_TOLERANCE)
    assert expected[0] != pytest.approx(expected[-1], abs=1e-3), "the training must move the loss"


def test_clipping_changes_the_training(ranks, start):
    """The gradient norm is above one at the start, so clipping at 0.1 must show in SGD-like small steps."""
    path, _ = start
    norms = ranks(2).run(clipped_norms, restore=path, tp=2)
    for before, after in norms:
        assert before > 0.1
        assert after == pytest.approx(0.1, rel=1e-4)


def test_checkpoints_move_between_layouts(ranks, start, tmp_path):
    """Saved at TP=2 with the distributed optimizer, loaded at PP=2 and on one rank: the same loss curve."""
    path, _ = start
    saved = str(tmp_path / "tp2")
    ranks(2).run(train, restore=path, save_to=saved, tp=2, distributed=True)
    one = ranks(1).run(train, restore=saved)[0]
    two = ranks(2).run(train, restore=saved, pp=2)[0]
    assert two == pytest.approx(one, abs=LAYOUT_TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hugging_face_weights_go_through_nemo_and_back(ranks, tmp_path, dtype):
    """Norms included, which NeMo's converters lose without Transformer Engine: not one bit differs."""
    [(count, differing)] = ranks(1).run(through_nemo_and_back, str(tmp_path), dtype)
    assert count == 21
    assert differing == {}


def test_enable_refuses_where_cuda_is_available(monkeypatch):
    monkeypatch.setattr(backend_module.state, "_state", {"enabled": False})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(backend_module.CpuBackendError, match="machine with CUDA.*CUDA_VISIBLE_DEVICES"):
        backend_module.enable()


def test_nothing_is_patched_by_importing():
    script = (
        "import torch; before = (torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.all_gather_into_tensor)\n"
        "from nemo_modelopt_dropin import cpu_backend\n"
        "assert before == (torch.cuda.Stream, torch.Tensor.cuda, torch.distributed.all_gather_into_tensor)\n"
        "assert not cpu_backend.is_enabled()\n"
        "assert not torch.overrides._get_current_function_mode_stack()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_enable_twice_is_enable_once(cpu_backend):
    before = (torch.cuda.Stream, torch.Tensor.cuda)
    cpu_backend.enable()
    assert (torch.cuda.Stream, torch.Tensor.cuda) == before
    assert len(torch.overrides._get_current_function_mode_stack()) == 1


def test_devices_are_read_as_the_cpu(cpu_backend):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.zeros(2, device=0, pin_memory=True).device.type == "cpu"
    assert torch.ones(2).to("cuda", non_blocking=True).device.type == "cpu"
    assert torch.ones(2).to(torch.bfloat16).dtype == torch.bfloat16
    assert torch.ones(2).cuda().sum() == 2
    assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def fuse_without_a_compiler() -> tuple[int, torch.Tensor, int]:
    """Return how many functions Megatron's fused SwiGLU compiled, its value, and how many are compiled in the end."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl
    from torch._dynamo.utils import counters

    counters.clear()
    value = bias_swiglu_impl(torch.linspace(-2, 2, 32).reshape(4, 1, 8), None)
    compiled = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("default"):
        torch.compile(lambda x: x * 2 + 1, backend="eager")(torch.ones(3))
    return compiled, value, counters["stats"]["unique_graphs"]


def test_fused_functions_run_uncompiled_and_callers_can_compile_theirs(tmp_path):
    pool = RankPool(1, tmp_path)  # what torch has compiled is counted in each process
    [(compiled, value, own)] = pool.run(fuse_without_a_compiler)
    pool.close()
    gate, up = torch.linspace(-2, 2, 32).reshape(4, 1, 8).chunk(2, -1)
    assert (compiled, own) == (0, 1)
    torch.testing.assert_close(value, torch.nn.functional.silu(gate) * up)


def test_tensor_types_go_round(cpu_backend):
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).half().type(torch.ones(1).type()).dtype == torch.float32


def gloo_threads(groups: int) -> tuple[int, float]:
    """Return how many threads ``groups`` process groups add, and a sum over the ranks that one of them computed."""
    import os

    import torch

    torch.distributed.init_process_group("gloo")
    before = len(os.listdir("/proc/self/task"))
    ranks = list(range(torch.distributed.get_world_size()))
    made = [torch.distributed.new_group(ranks) for _ in range(groups)]
    number = torch.ones(1)
    torch.distributed.all_reduce(number, group=made[-1])
    return len(os.listdir("/proc/self/task")) - before, float(number)


def test_process_groups_share_the_thread_that_polls(ranks):
    """Each group has two threads that sleep until there is work; a third one of its own would poll all the time."""
    assert ranks(2).run(gloo_threads, 10) == [(20, 2.0)] * 2


def test_pool_returns_values_in_order_of_rank(ranks):
    assert ranks(2).run(rank_and_sum, 3) == [(0, 7), (1, 7)]


def test_pool_shows_the_traceback_of_the_rank_that_failed_and_recovers(tmp_path):
    pool = RankPool(2, tmp_path)
    with pytest.raises(RankError, match="(?s)rank 0: no answer.*rank 1: Traceback.*rank 1 fails on purpose"):
        pool.run(fail_on, 1)
    assert pool.run(rank_and_sum, 1) == [(0, 3), (1, 3)]
    with pytest.raises(RankError, match=r"(?s)rank 0: finished.*rank 1: no answer \(limit 2 s\).*in hang_on"):
        pool.run(hang_on, 1, timeout=2)
    pool.close()


def sums_of_many_worlds(count: int) -> list[float]:
    """Return what ``all_reduce`` gives in worlds of both ranks, of one rank and of both again, ``count`` times."""
    from test_code.support import jobs_distill, tiny
    from test_code.support import ranks as pool

    def total() -> float:
        tiny.init_parallel()
        number = torch.full((1,), float(os.environ["RANK"]) + 1)
        torch.distributed.all_reduce(number)
        return number.item()

    found = []
    for _ in range(count):
        found.append(total())
        pool.reset()
        with jobs_distill.alone():
            # Rank 1 makes more groups of its own than rank 0 does.
            for _ in range(1 + int(os.environ["TEST_POOL_WORLD"][-1])):
                found.append(total())
                pool.reset()
    return found


def test_ranks_meet_in_worlds_of_their_own_as_often_as_they_like(tmp_path):
    """Also where the ranks do not make equally many groups of their own."""
    pool = RankPool(2, tmp_path)
    assert pool.run(sums_of_many_worlds, 10) == [[3.0, 1.0] * 10, [3.0, 1.0, 1.0] * 10]
    pool.close()
