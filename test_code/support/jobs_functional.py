"""What ranks execute for the functional tests: our scripts on live ranks, which have the environment of torchrun."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from test_code.support import command_lines, jobs_checkpoints, jobs_quant, tiny

SEQ_LENGTH = 64


def prepare(folder: str) -> None:
    """Write Megatron's tokenized files, texts, and a trained Llama of 4 layers, hidden 128, ffn 256, 8 heads."""
    import os

    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    here = Path(folder)
    if os.environ["RANK"] == "0":
        builder = IndexedDatasetBuilder(str(here / "corpus.bin"), dtype=np.uint16)
        tokenizer = tiny.tokenizer()
        for text in tiny.texts(300):
            ids = [*tokenizer.text_to_ids(text), tokenizer.eos_id]
            builder.add_document(np.asarray(ids, dtype=np.uint16), [len(ids)])
        builder.finalize(str(here / "corpus.idx"))
        jobs_quant.corpus(here / "texts.jsonl", rows=40)
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 8, "num_query_groups": 8}
    for name, more in (("teacher", {}), ("student", {"ffn_hidden_size": 128})):
        jobs_quant.make_checkpoint(here / name, llama=True, vocab_size=tiny.VOCABULARY, **{**sizes, **more})
        jobs_checkpoints.ranks.reset()


def run_script(name: str, layout: str, *arguments: str) -> int:
    """Run a script as a rank that torchrun started; return its exit code."""
    with jobs_checkpoints.world_of(layout):
        return command_lines.script_of(name).main(["--cpu", *arguments])


def quantized_logits(hf: str, nemo: str):
    """Return the logits of a quantized Hugging Face checkpoint and of the NeMo checkpoint, on one rank."""
    with jobs_checkpoints.world_of("1 rank"):
        return jobs_quant.hf_logits(hf, nemo)
