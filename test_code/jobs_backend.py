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
    from test_code import tiny

    model = tiny.model(**(overrides or {}))
    model.optim = tiny.optim(distributed=distributed)
    layout.setdefault("strategy_kwargs", {})["distributed"] = distributed
    return tiny.fit(model, tiny.data(**(data or {})), save_to, restore, max_steps=steps, **layout)
