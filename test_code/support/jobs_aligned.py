"""What ranks execute for the tests of teachers with another tokenizer."""

from __future__ import annotations

import torch

from test_code.support import devices, jobs_distill, ranks, tiny


def other_tokenizer():
    """Return NeMo's tokenizer with another vocabulary: 320 entries, all bytes among them."""
    from nemo.collections.common.tokenizers import AutoTokenizer
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unused>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text.replace("the", "thee") for text in tiny.texts(60)], trainer)
    folder = f"{tiny.tokenizer_folder()}-other"
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<start>", eos_token="<end>")
    fast.save_pretrained(folder)
    return AutoTokenizer(folder)


def teacher(path: str) -> str:
    """Train a teacher with the other tokenizer for two steps and save it."""
    from nemo.collections import llm

    model = llm.GPTModel(tiny.config(hidden_size=48), optim=tiny.optim(), tokenizer=other_tokenizer())
    tiny.fit(model, save_to=path, max_steps=2)
    ranks.reset()
    return path


def student(path: str) -> str:
    """Train a student for two steps and save it."""
    tiny.fit(tiny.model(ffn_hidden_size=64), save_to=path, max_steps=2)
    ranks.reset()
    return path


def reference(student_logits, teacher_logits, pairs, temperature=1.0):
    """Return the distance [n] and its gradient [n, v] in fp64 by plain PyTorch; ``pairs`` are (student, teacher)."""
    leaf = student_logits.detach().double().requires_grad_()
    value = torch.zeros(len(leaf), dtype=torch.float64)
    for own, other in pairs:
        p = (leaf[own] / temperature).softmax(-1).sort(descending=True).values
        q = (teacher_logits[other].double() / temperature).softmax(-1).sort(descending=True).values
        size = max(len(p), len(q))
        p, q = (torch.cat([x, x.new_zeros(size - len(x))]) for x in (p, q))
        value[own] = (p - q).abs().sum()
    weights = torch.linspace(0.5, 1.5, len(leaf), dtype=torch.float64)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad


def sharded_distance(width, other):
    """Return value and gradient shard over two ranks, and those of the reference."""
    from nemo.collections.llm.modelopt._divergence.sorted_probabilities import sorted_distance

    tiny.init_parallel(tp=2)
    group, rank = torch.distributed.group.WORLD, torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(1)
    whole, teacher_logits = (torch.randn(6, size, generator=generator) * 3 for size in (width, other))
    pairs = [(0, 2), (1, 0), (3, 5), (5, 1)]
    counterparts = torch.full((6,), -1)
    for own, one in pairs:
        counterparts[own] = one
    shards = devices.place(*(x.chunk(2, -1)[rank].contiguous() for x in (whole, teacher_logits)))
    leaf = shards[0].requires_grad_()
    value = sorted_distance(leaf, shards[1], devices.place(counterparts), 1.5, group, chunk_rows=3)
    (value * torch.linspace(0.5, 1.5, 6, device=value.device)).sum().backward()
    expected, gradient = reference(whole, teacher_logits, pairs, 1.5)
    return value.detach().double(), expected, leaf.grad.double(), gradient.chunk(2, -1)[rank]


def distill(teacher_path, settings, text, layout=None):
    """Train two steps on texts; return the metrics of each step, and what the first loss was computed from."""
    from nemo_modelopt_cli.aligned import AlignedTextDataModule

    seen: list = []
    data = AlignedTextDataModule(
        text,
        "no checkpoint",
        tokenizer=tiny.tokenizer(),
        teacher_tokenizer=other_tokenizer(),
        seq_length=24,
        micro_batch_size=2,
        global_batch_size=4,
        train_samples=8,
    )
    model = jobs_distill.distillation_model(
        teacher_path, settings, {"calculate_per_token_loss": True}, {"hidden_size": 48}
    )

    class Seen(jobs_distill.Metrics):
        def on_train_start(self, trainer, pl_module):
            core = tiny.core(pl_module)
            (loss,) = core._layers_to_loss.values()
            loss.register_forward_hook(lambda module, args, out: seen.append((*args, module.counterparts, out[0])))
            teacher = core.teacher_model
            teacher.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)

    recorder = Seen()
    tiny.fit(model, data, max_steps=2, callbacks=[recorder], **(layout or {}))
    inputs, (predicted, targets, counterparts, loss) = seen[0], seen[1]
    first = [x[0] if isinstance(x, tuple) else x for x in (predicted, targets)]
    return {
        "metrics": recorder.steps,
        "student": first[0].detach(),
        "teacher": first[1].detach(),
        "teacher_tokens": inputs["input_ids"],
        "counterparts": counterparts,
        "loss": loss.detach(),
    }


def refusal(teacher_path, settings, layout=None, data=None):
    """Return the error that a training ends with."""
    model = jobs_distill.distillation_model(teacher_path, settings, None, {"hidden_size": 48})
    try:
        tiny.fit(model, data or tiny.data(), max_steps=1, **(layout or {}))
    except Exception as error:
        ranks.reset()
        return f"{type(error).__name__}: {error}"
    return None
