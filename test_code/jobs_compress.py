"""Jobs of the compression tests, run on live ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from nemo_modelopt_dropin.compress import heldout, tokens, training
from nemo_modelopt_dropin.compress.settings import Layout
from test_code import tiny


def make_teacher(folder: str) -> None:
    """Write a tiny trained checkpoint, training and held-out texts, and the held-out tokens."""
    here = Path(folder)
    texts = tiny.texts(120)
    for name, rows in (("train", texts[:100]), ("heldout", texts[100:])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    np.save(here / "heldout.npy", tokens.encode(here / "heldout.jsonl", tiny.tokenizer()))
    tiny.fit(tiny.model(vocab_size=tiny.VOCABULARY), max_steps=4, save_to=here / "checkpoint")
    training.release()


def measure(folder: str, layout: dict) -> dict:
    """Return what `heldout.measure` finds under a layout."""
    here = Path(folder)
    return heldout.measure(here / "checkpoint", here / "heldout.npy", Layout(cpu=True, **layout), 32, 4)
