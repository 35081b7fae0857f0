"""Build small real models, data and trainers for the tests: NeMo's and Megatron's own classes in small sizes.

Import it after `devices.start_rank`, which the ranks call. Device, process group and layer spec are those of `devices`.
"""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path

import lightning.pytorch as pl
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from nemo.lightning.pytorch.plugins import MegatronDataSampler
from nemo.utils.model_utils import unwrap_model

from nemo import lightning as nl
from nemo.collections import llm
from test_code.support import devices

VOCABULARY = 256
SEQ_LENGTH = 32


@functools.cache
def tokenizer_folder() -> str:
    """Train a BPE tokenizer with `VOCABULARY` entries on a few sentences and return its Hugging Face folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # An alphabet of all 256 bytes would fill the vocabulary, so only the characters that occur are used.
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<pad>"],
        show_progress=False,
    )
    backend.train_from_iterator(texts(200), trainer)
    words = VOCABULARY - backend.get_vocab_size()
    backend.add_tokens([f"<extra_{i}>" for i in range(words)])
    folder = os.path.join(tempfile.gettempdir(), f"tiny-tokenizer-{os.getuid()}-{os.getpid()}")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return folder


def texts(count: int) -> list[str]:
    """Return ``count`` short deterministic English texts of unequal length."""
    subjects = ["the model", "a layer", "one head", "this token", "every rank", "the teacher", "a student"]
    verbs = ["learns", "forgets", "prunes", "measures", "keeps", "shares", "reads"]
    objects = ["its weights", "a scale", "the loss", "an expert", "two batches", "all numbers", "some text"]
    out = []
    for i in range(count):
        sentences = [
            f"{subjects[(i + j) % 7]} {verbs[(i * 3 + j) % 7]} {objects[(i * 5 + 2 * j) % 7]} {i * j % 11} times."
            for j in range(1 + i % 9)
        ]
        out.append(" ".join(sentences))
    return out


def tokenizer():
    """Return NeMo's AutoTokenizer with the tiny vocabulary."""
    from nemo.collections.common.tokenizers import AutoTokenizer

    return AutoTokenizer(tokenizer_folder())


def config(**overrides) -> llm.GPTConfig:
    """Return a Llama-style configuration: 4 layers, hidden 64, SwiGLU ffn 128, 4 heads in 2 groups, RMSNorm, rotary."""
    settings = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 128,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "seq_length": SEQ_LENGTH,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "make_vocab_size_divisible_by": 8,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": False,
        "params_dtype": torch.float32,
        "pipeline_dtype": torch.float32,
        "transformer_layer_spec": devices.layer_spec(),
        # Kernels of packages that need not be installed; the CPU backend switches them off, too.
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
    }
    return llm.GPTConfig(**{**settings, **overrides})


def model(model_config: llm.GPTConfig | None = None, optimizer=None, **overrides) -> llm.GPTModel:
    """Return an ``llm.GPTModel`` without weights; a trainer or a restore configures it and draws them."""
    return llm.GPTModel(model_config or config(**overrides), optim=optimizer or optim(), tokenizer=tokenizer())


def optim(lr: float = 1e-3, clip_grad: float = 1.0, distributed: bool = False) -> nl.MegatronOptimizerModule:
    """Return Megatron's Adam in fp32."""
    return nl.MegatronOptimizerModule(
        config=OptimizerConfig(
            optimizer="adam",
            lr=lr,
            clip_grad=clip_grad,
            use_distributed_optimizer=distributed,
            bf16=False,
            fp16=False,
            params_dtype=torch.float32,
        )
    )


def strategy(tp: int = 1, pp: int = 1, sp: bool = False, cp: int = 1, distributed: bool = False, **kwargs):
    """Return a MegatronStrategy for a layout."""
    settings = {
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        "pipeline_dtype": torch.float32,
        "ckpt_async_save": False,
        "ddp": DistributedDataParallelConfig(use_distributed_optimizer=distributed),
    }
    return nl.MegatronStrategy(**{**settings, **kwargs})


def trainer(
    tp: int = 1,
    pp: int = 1,
    sp: bool = False,
    cp: int = 1,
    max_steps: int = 4,
    callbacks=(),
    strategy_kwargs=None,
    **kw,
) -> nl.Trainer:
    """Return a trainer over all ranks of the process group that neither logs nor writes files."""
    settings = {
        "accelerator": devices.machine().accelerator,
        "devices": int(os.environ.get("WORLD_SIZE", 1)),
        "num_nodes": 1,
        "max_steps": max_steps,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "callbacks": list(callbacks),
        "strategy": strategy(tp, pp, sp, cp, **(strategy_kwargs or {})),
    }
    return nl.Trainer(**{**settings, **kw})


class TinyDataset(torch.utils.data.Dataset):
    """Generate deterministic token sequences that can be learned; in every third, the loss mask excludes a prompt."""

    def __init__(self, length: int, seq_length: int, seed: int, masked: bool):
        self.length, self.seq_length, self.seed, self.masked = length, seq_length, seed, masked

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.seed * 100_003 + int(index))
        start, step = torch.randint(3, VOCABULARY, (2,), generator=generator).tolist()
        ids = 3 + (start + step % 7 * torch.arange(self.seq_length + 1)) % (VOCABULARY - 3)
        noise = torch.rand(self.seq_length + 1, generator=generator) < 0.1
        ids[noise] = torch.randint(3, VOCABULARY, (int(noise.sum()),), generator=generator)
        loss_mask = torch.ones(self.seq_length)
        if self.masked and index % 3 == 0:
            loss_mask[: self.seq_length // 3] = 0.0
        causal = torch.ones(1, self.seq_length, self.seq_length, dtype=torch.bool).triu(1)
        return {
            "tokens": ids[:-1],
            "labels": ids[1:],
            "loss_mask": loss_mask,
            "position_ids": torch.arange(self.seq_length),
            "attention_mask": causal,
        }


class TinyData(pl.LightningDataModule):
    """Serve `TinyDataset` with Megatron's sampler; the global batch is the same in every layout."""

    def __init__(self, global_batch_size=4, micro_batch_size=2, seq_length=SEQ_LENGTH, samples=64, seed=1, masked=True):
        super().__init__()
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.seq_length, self.samples, self.seed, self.masked = seq_length, samples, seed, masked
        self.tokenizer = tokenizer()
        self.data_sampler = MegatronDataSampler(
            seq_len=seq_length, micro_batch_size=micro_batch_size, global_batch_size=global_batch_size
        )

    def _loader(self, seed: int):
        dataset = TinyDataset(self.samples, self.seq_length, seed, self.masked)
        return torch.utils.data.DataLoader(dataset, num_workers=0)

    def train_dataloader(self):
        return self._loader(self.seed)

    def val_dataloader(self):
        return self._loader(self.seed + 1)

    def test_dataloader(self):
        return self._loader(self.seed + 2)


def data(global_batch_size: int = 4, micro_batch_size: int = 2, seq_length: int = SEQ_LENGTH, **kw) -> TinyData:
    """Return the data module; ``samples``, ``seed`` and ``masked`` (loss mask with zeros) are passed on."""
    return TinyData(global_batch_size, micro_batch_size, seq_length, **kw)


def init_parallel(tp: int = 1, pp: int = 1, cp: int = 1, seed: int = 1234, **kw) -> None:
    """Initialise collectives, Megatron's groups and its random number trackers, for jobs without a trainer."""
    from megatron.core import parallel_state, tensor_parallel

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(devices.machine().backend)

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp, **kw
    )
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def run(model, tokens: torch.Tensor, mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """Run a Megatron model on tokens `[b, s]`, on the device of the tests, and return what it returns.

    Args:
        model: the model.
        tokens: token numbers; positions count from zero in each row.
        mask: attention mask, or None for the model's own.
        **kwargs: passed to the model.

    Returns:
        The logits, on the model's device; `devices.on_host` moves them.
    """
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    return model(*devices.place(tokens, positions, mask), **kwargs)


def core(wrapped) -> torch.nn.Module:
    """Return the Megatron-Core model inside NeMo's and DDP's wrappers."""
    return unwrap_model(wrapped)


class LossRecorder(pl.Callback):
    """Record the reduced training loss of every step and every validation loss; all ranks record the same numbers."""

    def __init__(self):
        self.losses: list[float] = []
        self.val_losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(trainer.callback_metrics["reduced_train_loss"]))

    def on_validation_end(self, trainer, pl_module):
        if "val_loss" in trainer.callback_metrics:
            self.val_losses.append(float(trainer.callback_metrics["val_loss"]))


class RoundAtEnd(pl.Callback):
    """Round the trained weights to bf16, the precision of most Hugging Face checkpoints."""

    def on_train_end(self, trainer, pl_module):
        round_weights(core(trainer.strategy.model))


def round_weights(model: torch.nn.Module) -> None:
    """Round the weights of a model to bf16 precision in place, without changing their dtype."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())


class SaveAtEnd(pl.Callback):
    """Write a full NeMo checkpoint at the end of ``fit`` (keys begin with ``module.``), as ModelCheckpoint does."""

    def __init__(self, path):
        self.path = path

    def on_train_end(self, trainer, pl_module):
        save(trainer, self.path)


def save(trainer: nl.Trainer, path) -> Path:
    """Write weights and context to ``path`` in the format of NeMo's checkpoints."""
    from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
    from nemo.lightning.io.pl import TrainerContext

    trainer.save_checkpoint(path)
    if torch.distributed.get_rank() == 0:
        TrainerContext.from_trainer(trainer).io_dump(ckpt_to_context_subdir(path), yaml_attrs=["model"])
    torch.distributed.barrier()
    return Path(path)


def fit(
    llm_model, data_module=None, save_to=None, restore=None, callbacks=(), bf16_weights=False, **layout
) -> list[float]:
    """Train and return the loss of each step.

    Args:
        llm_model: an ``llm.GPTModel``.
        data_module: data module; `data()` by default.
        save_to: folder of a full checkpoint that is written at the end of ``fit``.
        restore: checkpoint whose weights are loaded first.
        callbacks: additional callbacks.
        bf16_weights: whether to round the trained weights to bf16 before they are saved.
        **layout: arguments of `trainer`.

    Returns:
        The loss of each step.
    """
    recorder = LossRecorder()
    extra = [RoundAtEnd()] if bf16_weights else []
    extra += [SaveAtEnd(save_to)] if save_to else []
    run = trainer(callbacks=[recorder, *extra, *callbacks], **layout)
    if restore:
        run.strategy.restore_config = nl.RestoreConfig(path=str(restore), load_optim_state=False)
    torch.manual_seed(1234)
    run.fit(llm_model, data_module or data())
    return recorder.losses


def peak_bytes(function) -> int:
    """Return the peak of the bytes that a function allocates on the device of the tests."""
    if devices.machine().on_gpus:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
