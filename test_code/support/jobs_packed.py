"""What ranks execute for the tests of packed sequences."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch

from test_code.support import chats, jobs_distill, ranks, tiny


class Gradients(pl.Callback):
    """Keep the gradients of the last step, before the optimizer's state is all that is left of them."""

    def __init__(self):
        self.found: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        core = tiny.core(pl_module)
        self.found = {
            name: weight.main_grad.float().clone() for name, weight in core.named_parameters() if weight.requires_grad
        }


class Given(tiny.TinyData):
    """Serve one data set."""

    def __init__(self, dataset, **sizes):
        super().__init__(**sizes)
        self.dataset = dataset

    def _loader(self, seed):
        return torch.utils.data.DataLoader(self.dataset, num_workers=0)


class Padded(torch.utils.data.Dataset):
    """Rows as samples of their own, padded to one length."""

    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        ids, counted = self.rows[index]
        rest = [0] * (self.length + 1 - len(ids))
        ids = torch.tensor([*ids, *rest])
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": torch.tensor([float(one) for one in counted] + [0.0] * len(rest))[1:],
            "position_ids": torch.arange(self.length),
            "attention_mask": torch.ones(1, self.length, self.length, dtype=torch.bool).triu(1),
        }


def some_rows(count: int = 12) -> list:
    """Return rows of 4 to 23 random tokens, of which about half count."""
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return [
        (
            torch.randint(3, tiny.VOCABULARY, (length,), generator=generator).tolist(),
            [True, *(torch.rand(length - 1, generator=generator) < 0.5).tolist()],
        )
        for length in lengths
    ]


def step(teacher_path, settings, packed: bool, layout=None):
    """Train one step on all rows; return what is logged, and the gradients."""
    from nemo_modelopt_cli.packed import PackedRows

    rows = some_rows()
    dataset = PackedRows(rows, 40, 0) if packed else Padded(rows, 24)
    data = Given(dataset, global_batch_size=len(dataset), micro_batch_size=1, seq_length=40 if packed else 24)
    if packed:
        assert 1 < len(dataset) < len(rows), "several rows share a sequence, and there are several sequences"
        data.packed_sequence_size = 40
    model = jobs_distill.distillation_model(teacher_path, settings, {"calculate_per_token_loss": True})
    gradients, recorder = Gradients(), jobs_distill.Metrics()
    tiny.fit(model, data, max_steps=1, callbacks=[gradients, recorder], **(layout or {}))
    return recorder.steps[-1], gradients.found


def packed_and_padded(teacher_path, settings, layout=None):
    """Return the metrics of both forms, and the largest difference of a gradient relative to the largest gradient."""
    padded, expected = step(teacher_path, settings, False, layout)
    ranks.reset()
    packed, found = step(teacher_path, settings, True, layout)
    largest = max(gradient.abs().max() for gradient in expected.values())
    assert expected.keys() == found.keys() and largest > 0
    return padded, packed, float(max((found[name] - expected[name]).abs().max() for name in expected) / largest)


def nemos_modules(teacher_path, folder):
    """Return the metrics of one step on all conversations of a folder with NeMo's modules, each alone and packed."""
    from nemo.collections.llm.gpt.data.chat import ChatDataModule
    from nemo.collections.llm.gpt.data.fine_tuning import FineTuningDataModule
    from nemo.collections.llm.gpt.data.packed_sequence import PackedSequenceSpecs

    common = {"dataset_root": folder, "tokenizer": chats.tokenizer(), "num_workers": 0, "pin_memory": False}
    count = len(Path(folder, "training.jsonl").read_text().splitlines())
    alone = ChatDataModule(
        seq_length=128, micro_batch_size=1, global_batch_size=count, use_hf_tokenizer_chat_template=True, **common
    )
    packed = FineTuningDataModule(
        seq_length=128,
        micro_batch_size=1,
        packed_sequence_specs=PackedSequenceSpecs(256, tokenizer_model_name="tiny"),
        dataset_kwargs={"chat": True, "use_hf_tokenizer_chat_template": True},
        **common,
    )
    packed.prepare_data()
    packed.global_batch_size = len(np.load(packed.train_path_packed, allow_pickle=True))
    assert packed.global_batch_size < count
    found = []
    for data in (alone, packed):
        longer = {"seq_length": 256}
        model = jobs_distill.distillation_model(
            teacher_path, None, {"calculate_per_token_loss": True, **longer}, longer
        )
        recorder = jobs_distill.Metrics()
        tiny.fit(model, data, max_steps=1, callbacks=[recorder])
        found.append(recorder.steps[-1])
        ranks.reset()
    return found


def attention(**overrides):
    """Return the outputs of a model [t, v] for rows that are packed, and for each row alone; and both gradients."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from nemo_modelopt_dropin.cpu_backend import is_enabled

    assert is_enabled()
    tiny.init_parallel()
    model = tiny.config(**overrides).configure_model(tiny.tokenizer())
    lengths = [7, 1, 12, 4]
    ids = torch.randint(3, tiny.VOCABULARY, (1, sum(lengths)), generator=torch.Generator().manual_seed(2))
    ends = [0, *np.cumsum(lengths).tolist()]
    # A part without tokens, as data sets pad the list of ends.
    cu_seqlens = torch.tensor([*ends, ends[-1]], dtype=torch.int32)
    parameters = PackedSeqParams("thd", cu_seqlens, cu_seqlens, None, None, torch.tensor(12), torch.tensor(12))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, positions, None, packed_seq_params=parameters)
    alone = []
    for first, end in zip(ends, ends[1:], strict=False):
        length = end - first
        mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
        alone.append(model(ids[:, first:end], torch.arange(length)[None], mask))
    outputs, gradients = (packed, torch.cat(alone, 1)), []
    for logits in outputs:
        model.zero_grad()
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]))
    return [one.detach() for one in (*outputs, *gradients)]


def run_distill(line: str) -> dict[str, str]:
    """Run the distillation command in this process; return the rows of its result."""
    from nemo_modelopt_cli import distill

    found = dict(distill.work(distill.resolve(line.split())))
    ranks.reset()
    return found


def checkpoints(folder: str) -> None:
    """Write a teacher, a student, and a tokenizer with a chat template."""
    chats.tokenizer().tokenizer.save_pretrained(f"{folder}/tokenizer")
    for name, size in (("teacher", 128), ("student", 64)):
        tiny.fit(tiny.model(ffn_hidden_size=size), save_to=f"{folder}/{name}", max_steps=1)
        ranks.reset()
