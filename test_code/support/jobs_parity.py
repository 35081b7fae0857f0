"""What ranks execute to compare stock's numbers with ours: every job runs with either subpackage.

The pools have four ranks. `first` lets fewer of them form a world of their own, so that one pool serves all layouts.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from test_code.support import devices, installed, jobs_distill, ranks, tiny


@contextlib.contextmanager
def first(size: int):
    """Make a world of the first ranks of a pool; yields False on the others, which have nothing to do in it."""
    rank = int(os.environ["RANK"])
    if rank >= size:
        yield False
        return
    with ranks.world(rank, size, f"first{size}"):
        yield True


# --- quantization ---


def llama(tp: int = 1, **overrides):
    """Return a configured ``llm.LlamaModel``, its weights drawn from a seed."""
    from nemo.collections import llm

    settings = tiny.config(tensor_model_parallel_size=tp, **overrides)
    fields = {n: getattr(settings, n) for n in llm.LlamaConfig.__dataclass_fields__ if hasattr(settings, n)}
    model = llm.LlamaModel(llm.LlamaConfig(**fields), optim=tiny.optim(), tokenizer=tiny.tokenizer())
    torch.manual_seed(7)
    model.configure_model()
    return model


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, tiny.VOCABULARY, (3, 32), generator=generator) for _ in range(2)]


def forward(core, tokens) -> torch.Tensor:
    return tiny.run(core, tokens)


def calibrate(core) -> None:
    for tokens in batches():
        forward(core, tokens)


def quantizer_state(core) -> dict[str, torch.Tensor]:
    """Return amax and pre_quant_scale of every quantizer."""
    found = {}
    for name, module in core.named_modules():
        for attribute in ("_amax", "_pre_quant_scale"):
            value = getattr(module, attribute, None)
            if isinstance(value, torch.Tensor):
                found[f"{name}.{attribute}"] = value.detach().clone()
    return found


def quantized(tp: int, cases: dict[str, dict]) -> dict[str, dict]:
    """Quantize a model of its own for each case; return the quantizers' tensors, weights and outputs.

    A case is the settings of a QuantizationConfig; "data" among them calibrates with the subpackage's own loop.
    """
    from nemo.collections.llm.modelopt.quantization import quantizer as module

    results = {}
    with first(tp) as member:
        if not member:
            return {}
        tiny.init_parallel(tp=tp)
        for label, settings in cases.items():
            model = llama(tp)
            known = module.QuantizationConfig.__dataclass_fields__
            config = module.QuantizationConfig(**{n: v for n, v in settings.items() if n in known})
            quantizer = module.Quantizer(config, module.ExportConfig(path="unused", export_format="nemo"))
            loop = None if "calibration_dataset" in settings else calibrate
            quantizer.quantize(model, loop)
            core = tiny.core(model).eval()
            with torch.no_grad():
                output = forward(core, batches()[0])
            kinds = [n for n, m in core.named_modules() if n.endswith("bmm_quantizer") and m.is_enabled]
            results[label] = {
                "state": quantizer_state(core),
                "weights": {n: p.detach().clone() for n, p in core.named_parameters()},
                "output": output,
                "kv_cache": len(kinds),
            }
    return results


def dataset(path, rows: int = 10) -> str:
    """Write texts so long that every row fills its sequence: stock pads shorter ones, and counts the padding."""
    # Digits: about a token each, so that stock's four characters a token are enough.
    lines = [json.dumps({"text": " ".join(str((i + 3) ** n) for n in range(2, 60))}) for i in range(rows)]
    Path(path).write_text("\n".join(lines))
    return str(path)


# --- pruning ---


@contextlib.contextmanager
def known_norms():
    """Register PyTorch's RMSNorm with modelopt inside the context; without Transformer Engine it stops there.

    modelopt 0.43 hands the shared hidden size to a norm's set-up; its class for ``nn.LayerNorm`` does not take it.
    """
    from modelopt.torch.nas.modules import _DynamicLayerNorm
    from modelopt.torch.nas.registry import DMRegistry
    from modelopt.torch.nas.traced_hp import TracedHp

    class Norm(_DynamicLayerNorm):
        def _setup(self, *, num_features=None):
            if num_features is None:  # modelopt 0.37 needs each norm to make its own, and joins them later
                num_features = TracedHp(list(range(1, self.normalized_shape[-1] + 1)))
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("normalized_shape", self._get_normalized_shape)

    DMRegistry.register({torch.nn.RMSNorm: "nn.RMSNorm"})(Norm)
    try:
        yield
    finally:
        DMRegistry.unregister(torch.nn.RMSNorm)


def prune_as_stock(pruner, model, config, data, run) -> None:
    """Call stock's function so that modelopt 0.43 takes it: norms known, and modelopt's model not in NeMo's wrapper.

    Stock passes the wrapper to modelopt, and what modelopt returns to NeMo; each needs the other.
    """
    from unittest import mock

    validate = pruner.llm.validate

    def validate_wrapped(core, **settings):
        with torch.enable_grad():  # the set-up of a trainer builds Megatron's DDP
            return validate(model, **settings)

    with known_norms(), mock.patch.object(pruner.llm, "validate", validate_wrapped):
        pruner.prune_language_model(tiny.core(model), config, data, run)


def pruned(path: str, request: dict, **sizes):
    """Prune a model on one rank, save it, and return its weights and sizes.

    Args:
        path: Where to save it, with "-ours" or "-stock" behind it.
        request: Settings of a PruningConfig.
        **sizes: Sizes of the model.
    """
    from nemo.collections.llm.modelopt.prune import PruningConfig, pruner
    from test_code.support import jobs_prune

    with first(1) as member:
        if not member:
            return None
        # Stock counts tokens that the loss mask leaves out; ours does not.
        model, data, run = jobs_prune.build(data={"masked": False}, **sizes)
        config = PruningConfig(**request)
        who = "stock" if installed.is_stock(pruner.__file__) else "ours"
        if who == "stock" and not config.drop_layers:
            prune_as_stock(pruner, model, config, data, run)
        else:
            pruner.prune_language_model(model, config, data, run)
        pruner.save_pruned_model(run, f"{path}-{who}")
        return jobs_prune.weights(model), jobs_prune.sizes(model)


def pruning_errors(request: dict, **sizes) -> list[str]:
    """Return what stops stock without help, and what does if the norms are registered."""
    from nemo.collections.llm.modelopt.prune import PruningConfig, pruner
    from test_code.support import jobs_prune

    found: list[str] = []
    for help_ in (contextlib.nullcontext, known_norms):
        with first(1) as member:
            if not member:
                continue
            model, data, run = jobs_prune.build(**sizes)
            try:
                with help_():
                    pruner.prune_language_model(model, PruningConfig(**request), data, run)
            except (KeyError, AssertionError) as error:
                found.append(str(error))
    return found


def pruned_weights(path: str):
    """Load a checkpoint on one rank; return its weights and validation losses."""
    from test_code.support import jobs_prune

    with first(1) as member:
        return jobs_prune.loaded_weights(path) if member else None


# --- distillation ---


def losses_and_gradients(tp: int) -> dict[str, tuple]:
    """Return, by loss, its values `[b, s]`, flags, the gradient of the student's tensor and of the projection."""
    from nemo.collections.llm.modelopt.distill import loss as module

    results = {}
    with first(tp) as member:
        if not member:
            return {}
        tiny.init_parallel(tp=tp)
        config = tiny.config(tensor_model_parallel_size=tp, hidden_size=32)
        wide = tiny.config(tensor_model_parallel_size=tp, hidden_size=64)
        rank = torch.distributed.get_rank()
        generator = torch.Generator().manual_seed(11)
        vocabulary = 48 // tp
        logits = [3 * torch.randn(6, 3, 48, generator=generator) for _ in range(2)]
        logits = devices.place(*(t[..., vocabulary * rank :][..., :vocabulary].contiguous() for t in logits))
        narrow, equal, target = devices.place(*(torch.randn(6, 3, h, generator=generator) for h in (32, 64, 64)))
        torch.manual_seed(3)
        projection = devices.place(module.ProjectionLayer(config, wide))
        weigh = devices.place(torch.rand(3, 6, generator=generator))
        cases = {
            "kl": (module.LogitsKLLoss(config), *logits),
            "kl, temperature 2": (module.LogitsKLLoss(config, temperature=2.0), *logits),
            "reverse kl": (module.LogitsKLLoss(config, reverse=True), *logits),
            "cosine": (module.HiddenStateCosineLoss(wide), equal, target),
            "projected cosine": (module.HiddenStateCosineLoss(config, projection_layer=projection), narrow, target),
            "mse": (module.MSELoss(wide), equal, target),
            "projected mse": (module.MSELoss(config, projection_layer=projection), narrow, target),
        }
        for label, (loss, student, teacher) in cases.items():
            projection.zero_grad(set_to_none=True)
            leaf = student.clone().requires_grad_()
            value, tp_reduce, sequence_parallel = loss(leaf, teacher)
            (value * weigh).sum().backward()
            if tp_reduce and tp > 1:
                # What the caller does: the parts of the vocabulary's shards are added.
                value = value.detach().clone()
                torch.distributed.all_reduce(value)
            grads = [p.grad.clone() for p in projection.parameters() if p.grad is not None]
            results[label] = (value.detach(), bool(sequence_parallel), leaf.grad, grads)
    return results


def balanced() -> dict[str, tuple]:
    """Return totals and gradients of the balancer, over scales, with and without the language-model loss."""
    import modelopt.torch.distill as mtd

    from nemo.collections.llm.modelopt.distill import loss as module

    results = {}
    for skip in (True, False):
        for scale in (0.5, 1.0, 3.0):
            for pairs in (0, 1, 2):
                names = [mtd.loss_balancers.STUDENT_LOSS_KEY, "LogitsKLLoss_0"]
                names += [f"HiddenStateCosineLoss_{i}" for i in range(pairs)]
                leaves = [torch.tensor(0.7 + i, requires_grad=True) for i in range(len(names))]
                balancer = module.LogitsAndIntermediatesLossBalancer(scale, skip_original_loss=skip)
                out = balancer(dict(zip(names, leaves, strict=True)))
                out["kd_loss"].backward()
                gradients = [0.0 if leaf.grad is None else float(leaf.grad) for leaf in leaves]
                values = {name: float(value) for name, value in out.items()}
                results[f"skip={skip} scale={scale} pairs={pairs}"] = (values, gradients)
    return results


def pipeline_shapes() -> dict[str, tuple]:
    """Return what the shape hook makes of Megatron's shapes, over layouts, lengths, micro-batches and hidden sizes."""
    import modelopt.torch.distill as mtd
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_tensor_shapes

    from nemo.collections.llm.modelopt.distill.utils import (
        adjust_distillation_model_for_mcore,
        get_tensor_shapes_adjust_fn_for_distillation,
        load_distillation_config,
    )

    results = {}
    settings = [(1, 1, False), (2, 1, False), (2, 1, True), (1, 2, False)]
    for tp, cp, sp in settings:
        tiny.init_parallel(tp=tp, pp=2, cp=cp)
        for hidden in ((32, 64), (64, 32), (32, 32)):
            layout = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": 2, "sequence_parallel": sp}
            configs = [tiny.config(hidden_size=h, **layout) for h in hidden]
            student, teacher = (c.configure_model(tiny.tokenizer()) for c in configs)
            kd = load_distillation_config(None, *configs)
            wrapped = {"teacher_model": teacher, "criterion": kd.criterion, "loss_balancer": kd.loss_balancer}
            model = mtd.convert(student, mode=[("kd_loss", wrapped)])
            adjust_distillation_model_for_mcore(model, kd)
            for seq in (16, 64):
                for micro_batch in (1, 3):
                    for forward_only in (False, True):
                        hook = get_tensor_shapes_adjust_fn_for_distillation(
                            [SimpleNamespace(module=model)], seq, micro_batch, None, forward_only
                        )
                        own = get_tensor_shapes(
                            seq_length=seq,
                            micro_batch_size=micro_batch,
                            decoder_seq_length=None,
                            config=configs[0],
                            tp_group=parallel_state.get_tensor_model_parallel_group(),
                            cp_group=parallel_state.get_context_parallel_group(),
                        )
                        shapes = None if hook is None else (*hook(list(own), list(own)), model._tensor_split_idx)
                        results[f"{tp=} {cp=} {sp=} {hidden=} {seq=} {micro_batch=} {forward_only=}"] = shapes
        ranks.reset()
    return results


def trajectories(teacher_path, settings_path) -> dict[str, list[float]]:
    """Distil six steps at TP=2 x PP=2 and return the losses by objective."""
    results = {}
    data = {"masked": False}
    for objective, settings in (("logits", None), ("pair", settings_path)):
        for sp in (False, True):
            results[f"{objective}, SP={sp}"] = jobs_distill.distill(
                teacher_path, settings, steps=6, data=data, tp=2, pp=2, sp=sp
            )
            ranks.reset()
    return results
