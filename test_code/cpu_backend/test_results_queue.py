"""The queue of checkpoint writers' results: what a forked process puts is there when it ends."""

from __future__ import annotations

import multiprocessing
import queue

import pytest

from nemo_modelopt_dropin.cpu_backend import results_queue
from test_code.support import jobs_quant

pytestmark = pytest.mark.cpu


def test_values_come_out_in_the_order_in_which_they_were_put():
    one = results_queue.ResultsQueue()
    # Larger than a pipe holds, in which a second put would wait for a reader.
    large = {0: b"x" * 200_000}
    for value in (large, RuntimeError("a writer failed"), {}):
        one.put(value)
    assert one.get_nowait() == large
    assert str(one.get_nowait()) == "a writer failed"
    assert one.get_nowait() == {}
    with pytest.raises(queue.Empty, match="^$"):
        one.get_nowait()
    one.put(1)
    assert one.get_nowait() == 1


def test_a_forked_process_puts_and_its_parent_takes():
    one = results_queue.ResultsQueue()
    for value in range(3):
        writer = multiprocessing.get_context("fork").Process(target=one.put, args=(value,))
        writer.start()
        writer.join()
    assert [one.get_nowait() for _ in range(3)] == [0, 1, 2]


def _children_after_a_checkpoint(folder: str) -> tuple[list[str], bool]:
    import psutil
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    jobs_quant.make_checkpoint(folder, steps=1)
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return lines, filesystem_async._get_write_results_queue() is results_queue.of_this_process()


def test_a_checkpoint_leaves_no_process(ranks, tmp_path):
    ((lines, ours),) = ranks(1).run(_children_after_a_checkpoint, str(tmp_path / "checkpoint"))
    assert lines == [] and ours
