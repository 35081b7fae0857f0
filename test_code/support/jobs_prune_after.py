"""What ranks execute for the tests of what a pruned checkpoint is good for."""

from __future__ import annotations

from test_code.support import jobs_quant, ranks


def make(folder: str, request: dict) -> None:
    """Write a tiny Llama checkpoint and one that llm.prune has made of it."""
    from test_code.support import jobs_prune, tiny

    jobs_quant.make_checkpoint(f"{folder}/original", llama=True, steps=2, kv_channels=16, vocab_size=tiny.VOCABULARY)
    ranks.reset()
    jobs_prune.prune_checkpoint(f"{folder}/original", f"{folder}/pruned", request)
