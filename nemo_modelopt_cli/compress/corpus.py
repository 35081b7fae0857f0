"""The demo's text, tokenizer and teacher: English text that CPython includes, and a small Llama-style GPT.

``pydoc_data.topics`` holds the topics of Python's help, about 80 documents and half a megabyte.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TextIO

from nemo_modelopt_cli.compress.settings import Layout, Training
from nemo_modelopt_dropin import ranks

END_OF_TEXT = "<|endoftext|>"


def documents() -> dict[str, str]:
    """Return the topics that are not empty, in the order of their names."""
    from pydoc_data.topics import topics

    return {name: text for name, text in sorted(topics.items()) if text.strip()}


def split(texts: dict[str, str], one_in: int = 8) -> tuple[list[str], list[str]]:
    """Split documents into training and held-out texts by the hash of their names.

    Some topics repeat paragraphs of others. A paragraph of a held-out document is removed from the training documents,
    so that the held-out text is not seen in training.
    """

    def is_held_out(name: str) -> bool:
        return int(hashlib.sha256(name.encode()).hexdigest(), 16) % one_in == 0

    held_out = [text for name, text in texts.items() if is_held_out(name)]
    seen = {paragraph.strip() for text in held_out for paragraph in text.split("\n\n")}
    training = []
    for name, text in texts.items():
        if not is_held_out(name):
            kept = [paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in seen]
            if kept:
                training.append("\n\n".join(kept))
    return training, held_out


def write_jsonl(path: Path, texts: list[str]) -> None:
    """Write one document per line, as ``{"text": ...}``."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def train_tokenizer(texts: list[str], vocabulary: int, folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a folder that Hugging Face and NeMo load."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    fast.save_pretrained(str(folder))


def make(folder: Path, vocabulary: int) -> dict[str, Any]:
    """Write ``train.jsonl``, ``heldout.jsonl`` and ``tokenizer/`` into the step's folder."""
    training, held_out = split(documents())
    if ranks.number() == 0:
        write_jsonl(folder / "train.jsonl", training)
        write_jsonl(folder / "heldout.jsonl", held_out)
        train_tokenizer(training, vocabulary, folder / "tokenizer")
    return {"train_documents": len(training), "heldout_documents": len(held_out), "vocabulary": vocabulary}


def pretrain(
    folder: Path,
    text_folder: Path,
    model_settings: dict[str, int],
    settings: Training,
    layout: Layout,
    seq_length: int,
    out: TextIO | None,
) -> dict[str, Any]:
    """Train the teacher, an ``llm.LlamaModel`` with these sizes, with llm.train."""
    import numpy as np
    import torch
    from nemo.collections.common.tokenizers import AutoTokenizer

    from nemo.collections import llm
    from nemo_modelopt_cli import intermediate, tokens
    from nemo_modelopt_cli.compress import jobs, training

    training.release()
    torch.manual_seed(settings.seed)
    tokenizer = AutoTokenizer(str(text_folder / "tokenizer"))
    if ranks.number() == 0:
        for name in ("train", "heldout"):
            np.save(folder / f"{name}.npy", tokens.encode(text_folder / f"{name}.jsonl", tokenizer))
    precision = torch.float32 if layout.cpu else torch.bfloat16
    config = llm.LlamaConfig(
        **model_settings,
        seq_length=seq_length,
        make_vocab_size_divisible_by=8,
        bf16=not layout.cpu,
        params_dtype=precision,
        pipeline_dtype=precision,
    )
    run = jobs.fit_trainer(folder, "pretrain", settings, layout, out)
    llm.train(
        model=llm.LlamaModel(config, tokenizer=tokenizer),
        data=jobs.fit_data(folder, tokenizer, settings, seq_length),
        trainer=run,
        log=jobs.logger(folder),
        resume=jobs.resume(run),
        optim=training.optimizer(settings, layout),
    )
    intermediate.Steps(folder / training.STEPS).remove()
    training.release()
    return {"curve": training.read_curve(folder / "losses.jsonl")}
