"""Weigh every token of a global batch equally, for data whose micro-batches count different numbers of tokens."""

from __future__ import annotations

import argparse

import lightning.pytorch as pl


def wanted(given: argparse.Namespace) -> bool:
    """Return whether the data of a training masks tokens or packs samples, so that micro-batches count differently."""
    return bool(given.use_chat_data or given.answer_only_loss or given.packed_sequence_size)


class PerTokenLoss(pl.Callback):
    """Set Megatron's ``calculate_per_token_loss`` before the model is built.

    Otherwise Megatron averages the means of the micro-batches, in which the tokens of a short one weigh more.
    """

    def setup(self, trainer, pl_module, stage):
        """Set it on the configuration that the model is built from."""
        pl_module.config.calculate_per_token_loss = True
