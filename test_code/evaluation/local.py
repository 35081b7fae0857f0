"""Tasks of lm-eval that need no network, and what they must find, computed with transformers directly."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

ROWS = [
    {"question": f"the model {verb}", "choices": [" its weights", " a scale", " the loss"], "answer": number % 3}
    for number, verb in enumerate(("learns", "forgets", "prunes", "measures", "keeps", "shares", "reads"))
]
TEXTS = [f"{row['question']}{row['choices'][row['answer']]} 7 times." for row in ROWS]
# Where `make test-eval` put lm-eval; on the path of its own process only.
PATH = os.environ.get("EVAL_PATH", "")

_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: {kind}
{more}
metadata: {{version: 1.0}}
"""
_KINDS = {
    "tiny_choice": (
        "multiple_choice",
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}",
    ),
    "tiny_target": (
        "loglikelihood",
        'doc_to_text: "{{question}}"\ndoc_to_target: "{{choices[answer]}}"\ntarget_delimiter: ""\n'
        "metric_list:\n  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}",
    ),
    "tiny_text": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list:\n'
        "  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}\n"
        "  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}",
    ),
}


def write(folder: Path) -> Path:
    """Write three tasks and their data below a folder; return the folder of the tasks."""
    data, tasks = folder / "questions.jsonl", folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "text": text} for row, text in zip(ROWS, TEXTS, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, (kind, more) in _KINDS.items():
        (tasks / f"{name}.yaml").write_text(_TASK.format(name=name, data=data, kind=kind, more=more))
    return tasks


def directly(folder: Path, dtype: str = "float32") -> dict[tuple[str, str], float]:
    """Return what lm-eval must find for the model in a folder, from one forward pass for each text.

    Args:
        folder: the model.
        dtype: in which it computes; log probabilities are computed in fp32.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def likelihood(context: list[int], continuation: list[int]) -> float:
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
        return float(torch.log_softmax(logits.float(), -1)[range(len(continuation)), continuation].sum())

    def of_pair(question: str, choice: str) -> float:
        context, whole = tokenizer.encode(question), tokenizer.encode(question + choice)
        return likelihood(context, whole[len(context) :])

    found = [[of_pair(row["question"], choice) for choice in row["choices"]] for row in ROWS]
    right = [values.index(max(values)) == row["answer"] for values, row in zip(found, ROWS, strict=True)]
    targets = [values[row["answer"]] for values, row in zip(found, ROWS, strict=True)]
    # A text begins with the token that begins or else ends texts.
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    texts = sum(likelihood([first], tokenizer.encode(text)) for text in TEXTS)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    length = sum(len(text.encode()) for text in TEXTS)
    return {
        ("tiny_choice", "acc"): sum(right) / len(right),
        ("tiny_target", "perplexity"): math.exp(-sum(targets) / len(targets)),
        ("tiny_text", "word_perplexity"): math.exp(-texts / words),
        ("tiny_text", "byte_perplexity"): math.exp(-texts / length),
    }
