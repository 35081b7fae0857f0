"""Post-training quantization: the configuration, the Quantizer, and the functions NeMo imports from here.

The steps are: check the settings, read calibration text, measure the original model, insert and calibrate quantizers,
post-process, measure again, report, export. Each lives in its own module; collaborators that the stock module had as
attributes are attributes here too and are looked up when they are used.
"""

from __future__ import annotations

import copy  # noqa: F401
import os  # noqa: F401
import pprint
import shutil
import tempfile  # noqa: F401
from dataclasses import dataclass  # noqa: F401
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union  # noqa: F401

import torch
from datasets import load_dataset
from megatron.core.inference.common_inference_params import CommonInferenceParams
from nemo.collections.llm.inference import MCoreTokenizerWrappper, generate
from nemo.collections.llm.utils import barrier, torch_dtype_from_precision
from nemo.lightning.ckpt_utils import ckpt_to_context_subdir
from nemo.lightning.io.api import load_connector_from_trainer_ckpt
from nemo.lightning.io.pl import TrainerContext, ckpt_to_weights_subdir
from nemo.utils import logging
from nemo.utils.get_rank import is_global_rank_zero
from nemo.utils.model_utils import unwrap_model
from tqdm import tqdm  # noqa: F401
from transformers import PreTrainedTokenizerBase

import modelopt.torch.export as mte
import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
from nemo.collections import llm
from nemo.collections.llm.modelopt.errors import ModelOptConfigError
from nemo.collections.llm.modelopt.quantization import calibration, export, hf_auto, kv_cache, report, settings
from nemo.collections.llm.modelopt.quantization import quant_cfg_choices as choices
from nemo.collections.llm.modelopt.quantization.config import ExportConfig, QuantizationConfig
from nemo.collections.llm.modelopt.quantization.quant_cfg_choices import get_quant_cfg_choices
from nemo.collections.llm.modelopt.quantization.utils import load_quant_cfg

if TYPE_CHECKING:
    import lightning.pytorch as pl
    from nemo.lightning import Trainer
    from nemo.lightning.megatron_parallel import MegatronParallel

QUANT_CFG_CHOICES = get_quant_cfg_choices()
SUPPORTED_DTYPE = [16, "16", "bf16"]
SUPPORTED_EXPORT_FMT = ["trtllm", "nemo", "hf"]
KV_QUANT_CFG_CHOICES = {"fp8": "FP8_KV_CFG", "nvfp4": "NVFP4_KV_CFG"}
AnyPath = Union[Path, str]  # noqa: UP007

# Largest value of the formats whose input amax is kept from becoming too small, see `Quantizer._postprocess`.
_MAXBOUND = {"fp8": 448, "int8_sq": 127}
_MIN_AMAX_SHARE = 0.01
# Long enough for `seq_len` tokens of any language's text; the rest of a document would be tokenized in vain.
_CHARACTERS_PER_TOKEN = 16


class Quantizer:
    """Quantizes a NeMo model after training and exports it.

    Attributes:
        report: What the last `quantize` did (losses before and after, relative output error, quantizers of each kind,
            sizes, calibration data), a plain dictionary; empty before and for stand-ins.
    """

    def __init__(self, quantization_config: QuantizationConfig, export_config: ExportConfig):
        """Check the settings.

        Args:
            quantization_config: How to quantize.
            export_config: Where to export to; None when only `quantize` is used.

        Raises:
            EnvironmentError: Without a GPU, unless the CPU backend is enabled and the algorithm needs no CUDA kernel.
            ModelOptConfigError: For a value or combination that cannot work.
        """
        from nemo_modelopt_dropin import cpu_backend

        has_gpu = torch.cuda.is_available()
        if not has_gpu and not cpu_backend.is_enabled():
            raise OSError(
                "GPU is required for the quantization. On a CPU, call nemo_modelopt_dropin.cpu_backend.enable() first."
            )
        self.quantization_config = quantization_config
        self.export_config = export_config
        self.report: dict[str, Any] = {}
        settings.check_quantization(quantization_config, KV_QUANT_CFG_CHOICES)
        base = None
        if quantization_config.algorithm is not None:
            base, _ = settings.base_quant_cfg(quantization_config.algorithm, QUANT_CFG_CHOICES, load_quant_cfg)
            if not has_gpu and choices.needs_cuda(base):
                raise OSError(
                    f"GPU is required for the quantization with {quantization_config.algorithm}: CUDA kernels."
                )
        if export_config is not None:
            settings.check_export(export_config, SUPPORTED_EXPORT_FMT, SUPPORTED_DTYPE)
            # Where NeMo can wrap transformers' models, `quantize` checks: modelopt writes those by other means.
            if not hf_auto.exists():
                export.check_format(base, quantization_config.algorithm, export_config.export_format)
        self.torch_dtype = torch_dtype_from_precision("bf16" if export_config is None else export_config.dtype)

    @staticmethod
    def _setup(model) -> None:
        """Freeze the model; exporters read the vocabulary without padding from its configuration."""
        if hf_auto.is_wrapped(model):
            return
        model.config.vocab_size = model.tokenizer.vocab_size
        model.freeze()

    def _get_decoder_type(self, model, optional: bool = False) -> str | None:
        """Return modelopt's name of the decoder: as configured, or by the class of the model.

        Args:
            model: The model, wrapped or not.
            optional: Return None where it cannot be told.

        Raises:
            ModelOptConfigError: If it cannot be told and is not optional.
        """
        if self.export_config is not None and self.export_config.decoder_type is not None:
            return self.export_config.decoder_type
        inner = _find_gpt_model(model)
        if type(inner).__name__ == "Llama4OmniModel":
            return "llama"
        decoder_type = None if inner is None else get_modelopt_decoder_type(inner)
        if decoder_type is None and not optional:
            raise ModelOptConfigError(
                f"Could not infer the decoder type for a {type(inner or model).__name__}. "
                "Please provide the decoder type explicitly in the ExportConfig (decoder_type)."
            )
        return decoder_type

    @staticmethod
    def _generate_sample(model) -> None:
        """Let the quantized model continue two prompts and log what it says."""
        prompts = ["Born in north-east France, Soyer trained as a", "Born in California, Soyer trained as a"]
        if hf_auto.is_wrapped(model):
            logging.info(f"Sample generation after PTQ (with prompts): {hf_auto.generate_sample(model, prompts)}")
            return
        dtype = getattr(model.config, "params_dtype", None)
        wrapper = model.get_inference_wrapper(
            params_dtype=dtype if isinstance(dtype, torch.dtype) else torch.bfloat16,
            inference_batch_times_seqlen_threshold=30,
        )
        greedy = CommonInferenceParams(top_k=1, num_tokens_to_generate=30)
        results = generate(wrapper, MCoreTokenizerWrappper(model.tokenizer), prompts, inference_params=greedy)
        texts = [prompt + result.generated_text for prompt, result in zip(prompts, results, strict=False)]
        logging.info(f"Sample generation after PTQ (with prompts): {texts}")

    def _get_forward_loop(self, model, rows: list[str] | None = None):
        """Return the loop that feeds this rank's share of the calibration data.

        Args:
            model: The ``llm.GPTModel``.
            rows: Texts to use in place of the configured dataset.
        """
        config = self.quantization_config
        batches = create_data_iterator_getter(
            model,
            dataset=config.calibration_dataset if rows is None else rows,
            seq_len=config.calibration_seq_len,
            batch_size=config.calibration_batch_size,
            calibration_size=config.calibration_dataset_size if rows is None else len(rows),
            packed=config.packed,
            shard=choices.statistics_merge_over_ranks(self._get_quant_cfg(model)),
        )
        if hf_auto.is_wrapped(model):
            return hf_auto.forward_loop(model, batches)
        return self.create_megatron_forward_loop(batches, num_batches=None)

    def _get_quant_cfg(self, model) -> dict[str, Any]:
        """Return modelopt's quant_cfg for the configured algorithm and the model, a copy of its own."""
        config = self.quantization_config
        assert config.algorithm is not None, "a model that is not quantized has no quant_cfg"
        decoder_type = self._get_decoder_type(model, optional=True)
        quant_cfg, from_file = settings.base_quant_cfg(config.algorithm, QUANT_CFG_CHOICES, load_quant_cfg)
        settings.apply_method_options(
            quant_cfg, config.algorithm, from_file, decoder_type, config.awq_block_size, config.sq_alpha
        )
        kv_wanted = settings.wants_kv_cache(config.enable_kv_cache, config.algorithm, from_file, decoder_type)
        settings.apply_kv_cache(quant_cfg, kv_wanted, KV_QUANT_CFG_CHOICES[config.kv_cache_qformat])
        if not from_file:
            # Llama 4's projection of image features stays as it is.
            quant_cfg["quant_cfg"]["vision_projection.*"] = {"enable": False}
        return quant_cfg

    def quantize(self, model: MegatronParallel, forward_loop=None):
        """Insert quantizers into the model, calibrate them, and compare the result with the original.

        Precision and method come from the algorithm. Without ``forward_loop`` the configured dataset calibrates: every
        data-parallel rank feeds its share and modelopt combines the statistics. Held-out rows of it are then used to
        compare loss and outputs before and after; see the attribute `report`.

        Args:
            model: The ``llm.GPTModel`` (or Mamba model), restored by a trainer.
            forward_loop: Function of the Megatron-Core model that runs calibration data through it.

        Returns:
            The same model, quantized.

        Raises:
            ModelOptConfigError: If the model is of another kind, the data is unusable or the export cannot work.
        """
        algorithm = self.quantization_config.algorithm
        if algorithm is None:
            logging.info("Quantization algorithm set to None, returning the non-quantized model")
            return model

        logging.info(f"Quantizing model to {algorithm}...")
        self._check_model(model)
        self._setup(model)
        decoder_type = self._get_decoder_type(model, optional=True)
        quant_cfg = self._get_quant_cfg(model)
        core = unwrap_for_modelopt_operations(model)
        is_stand_in = not isinstance(core, torch.nn.Module)

        calibrates = forward_loop is None and mtq.config.need_calibration(quant_cfg)
        rows, evaluation = None, None
        if forward_loop is not None:
            logging.info("A forward_loop was given: without calibration data there is no comparison with the original")
        elif report.is_comparable(core):
            rows, evaluation = self._read_rows(model)
        if calibrates:
            forward_loop = self._get_forward_loop(model) if rows is None else self._get_forward_loop(model, rows)
        before = report.evaluate(core, evaluation, title="Original model") if evaluation else None

        with kv_cache.attention_support(not is_stand_in and choices.has_kv_cache(quant_cfg)):
            if not is_stand_in:
                kv_cache.settle(core, quant_cfg, self.quantization_config.enable_kv_cache)
            logging.info(f"Using quant_cfg:\n{pprint.pformat(quant_cfg)}")
            quantized = mtq.quantize(core, quant_cfg, forward_loop)
        if decoder_type == "gpt":
            quantized = self._postprocess(quantized)

        if is_global_rank_zero():
            mtq.print_quant_summary(quantized)
        if not is_stand_in:
            after = report.evaluate(core, evaluation, before, "Quantized model") if evaluation else None
            self.report.update(report.describe(core, before, after))
            report.log(self.report)
        if self.export_config is not None and self.export_config.generate_sample:
            logging.info("Generating a sample output after model quantization.")
            self._generate_sample(model)
        return model

    def _postprocess(self, quantized):
        """Keep the amax of inputs from becoming so small that later values overflow the format.

        Squared ReLU gives activations that are near zero on calibration data and large on others: amax is at least 1 %
        of the format's largest value.
        """
        lowest = _MIN_AMAX_SHARE * _MAXBOUND.get(self.quantization_config.algorithm or "", 0)
        return mtq.postprocess_amax(quantized, "*input_quantizer", lambda amax: torch.clamp(amax, min=lowest))

    def _check_model(self, model) -> None:
        """Raise before any work for a model that cannot be quantized or exported as configured."""
        if not isinstance(model, torch.nn.Module):
            return
        if hf_auto.is_wrapped(model):
            hf_auto.check(model, self.export_config, self._get_quant_cfg(model))
            return
        hf_auto.check_plain(model)
        inner = _find_gpt_model(model)
        if inner is None:
            raise ModelOptConfigError(
                f"Quantizer.quantize expects an llm.GPTModel or llm.MambaModel (or NeMo's wrapper of one), not a "
                f"{type(model).__name__}."
            )
        if self.export_config is not None:
            if hf_auto.exists():
                algorithm, fmt = self.quantization_config.algorithm, self.export_config.export_format
                export.check_format(self._get_quant_cfg(model), algorithm, fmt)
            export.check_layout(self.export_config.export_format, inner.config.tensor_model_parallel_size)
            export.check_model(self.export_config.export_format, inner)

    def _read_rows(self, model) -> tuple[list[str], list[torch.Tensor]]:
        """Read the texts: those that calibrate, and the comparison's microbatches `[b, s]` of this rank."""
        config = self.quantization_config
        batches = get_calib_data_iter(
            data=config.calibration_dataset,
            batch_size=config.calibration_batch_size,
            calib_size=config.calibration_dataset_size + config.comparison_size,
            max_sequence_length=_CHARACTERS_PER_TOKEN * config.calibration_seq_len,
        )
        texts = calibration.collect(batches, config.calibration_dataset, config.calibration_dataset_size)
        used, compared, held_out = calibration.split_rows(
            len(texts), config.calibration_dataset_size, config.comparison_size
        )
        self.report = {"algorithm": config.algorithm, "calibration_rows": len(texts[used]), "held_out": held_out}
        evaluation = create_data_iterator_getter(
            model,
            dataset=texts[compared],
            seq_len=config.calibration_seq_len,
            batch_size=config.calibration_batch_size,
            calibration_size=len(texts[compared]),
            shard=True,
        )
        # A single token has no next one to predict.
        return texts[used], [batch for batch in evaluation() if batch.shape[1] > 1]

    def create_megatron_forward_loop(
        self, get_dataloader, num_batches, seq_length=None, micro_batch_size=None, decoder_seq_length=None
    ):
        """Return a function of the model that runs all microbatches through Megatron's pipeline schedule.

        Args:
            get_dataloader: Returns an iterator over microbatches `[b, s]`; called each time the loop runs.
            num_batches: Microbatches to run; None runs what the iterator has, in runs of equal shape.
            seq_length: Sequence length of the microbatches (with ``num_batches``).
            micro_batch_size: Sequences in a microbatch (with ``num_batches``).
            decoder_seq_length: Decoder's sequence length, for encoder-decoder models (with ``num_batches``).
        """
        fixed = None
        if num_batches is not None:
            fixed = {
                "num_microbatches": num_batches,
                "seq_length": seq_length,
                "micro_batch_size": micro_batch_size,
                "decoder_seq_length": decoder_seq_length,
            }
        return lambda model: calibration.run_loader(model, get_dataloader, fixed)

    @staticmethod
    def _validate_quantized_checkpoint(checkpoint_dir: Path, tensor_parallelism_size: int) -> bool:
        """Return whether a TensorRT-LLM checkpoint has its configuration and one file for each inference rank."""
        names = ["config.json", *(f"rank{rank}.safetensors" for rank in range(tensor_parallelism_size))]
        missing = [name for name in names if not (checkpoint_dir / name).exists()]
        if missing:
            logging.error(f"Failed to export the quantized model: {missing} not written.")
        return not missing

    def _save_tokenizer(self, model, model_dir: str, export_dir: Path, export_fmt: str) -> None:
        """Put the tokenizer beside an exported model: Hugging Face's own files, or NeMo's context."""
        if export_fmt == "nemo" or not is_global_rank_zero():
            return
        if hf_auto.is_wrapped(model):
            hf_auto.save_tokenizer(model, export_dir, export_fmt)
            return
        tokenizer = getattr(getattr(model, "tokenizer", None), "tokenizer", None)
        if export_fmt == "hf" and isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer.save_pretrained(str(export_dir))
            return
        # nemo.export looks for the tokenizer under this name.
        shutil.copytree(ckpt_to_context_subdir(model_dir), Path(export_dir) / "nemo_context", dirs_exist_ok=True)

    def export(self, model, model_dir: str, trainer: Trainer | None = None) -> None:
        """Write the model in the configured format; a failed export leaves nothing behind.

        Args:
            model: What `quantize` returned.
            model_dir: The checkpoint the model came from, for its context and tokenizer.
            trainer: The model's trainer, needed for the NeMo format.

        Raises:
            ModelOptConfigError: If there is no export configuration, or no trainer for the NeMo format.
            ExportError: If the written checkpoint is not what it should be.
        """
        if self.export_config is None:
            raise ModelOptConfigError("Quantizer.export needs an ExportConfig, but export_config is None.")
        target, fmt = Path(self.export_config.path), self.export_config.export_format
        if fmt not in SUPPORTED_EXPORT_FMT:
            raise ModelOptConfigError(f"Unsupported export format: {fmt}; allowed: {SUPPORTED_EXPORT_FMT}.")
        if hf_auto.is_wrapped(model):
            hf_auto.check_format(fmt)
        if fmt == "nemo" and trainer is None:
            raise ModelOptConfigError("Trainer required for NeMo export.")
        with export.staged(target, beside=isinstance(model, torch.nn.Module)) as folder:
            if fmt == "nemo":
                self._export_nemo(model, trainer, folder)
            elif fmt == "hf":
                self._export_hf(model, model_dir, folder)
            else:
                self._export_trtllm(model, folder)
            if is_global_rank_zero():
                self._save_tokenizer(model, model_dir, folder, fmt)
        export.log_success(target)

    def _export_nemo(self, model, trainer, folder: Path) -> None:
        export.write_nemo(model, trainer, folder, TrainerContext.from_trainer, ckpt_to_context_subdir)
        state = Path(ckpt_to_weights_subdir(folder, False)) / "modelopt_state"
        if is_global_rank_zero() and self.quantization_config.algorithm is not None and not state.exists():
            raise export.ExportError(f"The checkpoint was written without Model Optimizer's state ({state}).")

    def _export_hf(self, model, model_dir: str, folder: Path) -> None:
        keywords = {} if self.torch_dtype == torch.bfloat16 else {"dtype": self.torch_dtype}
        if export_hf_checkpoint(model_dir, folder, model=model, **keywords) is None:
            # Nothing was quantized: a plain model.
            if hf_auto.is_wrapped(model):
                hf_auto.write_plain_hf(model, folder, self.torch_dtype)
                return
            exporter = load_connector_from_trainer_ckpt(model_dir, "hf")
            core = unwrap_for_modelopt_operations(model)
            tokenizer = export.hf_tokenizer(model)
            export.write_plain_hf(core, exporter, tokenizer, folder, mte.export_mcore_gpt_to_hf, self.torch_dtype)

    def _export_trtllm(self, model, folder: Path) -> None:
        config = self.export_config
        export.write_trtllm(
            model,
            mte.export_tensorrt_llm_checkpoint,
            model=unwrap_for_modelopt_operations(model),
            decoder_type=self._get_decoder_type(model),
            dtype=self.torch_dtype,
            export_dir=folder,
            inference_tensor_parallel=config.inference_tp,
            inference_pipeline_parallel=config.inference_pp,
        )
        barrier()
        if is_global_rank_zero() and not self._validate_quantized_checkpoint(folder, config.inference_tp):
            raise export.ExportError(f"The TensorRT-LLM checkpoint for {config.path} is not complete.")


def export_hf_checkpoint(
    model_dir: AnyPath, export_dir: AnyPath, model: pl.LightningModule | None = None, **kwargs
) -> Path | None:
    """Write a model that Model Optimizer converted as a Hugging Face checkpoint, and verify it.

    NeMo's ``export_ckpt`` tries this first and falls back to its own exporter where it returns None.

    Args:
        model_dir: The NeMo checkpoint.
        export_dir: Where to write to.
        model: The model in memory; read from ``model_dir`` by default.
        **kwargs: Arguments of ``modelopt.torch.export.export_mcore_gpt_to_hf``.

    Returns:
        The folder, or None where the model was not converted.

    Raises:
        ModelOptConfigError: If this quantization or layout cannot be written correctly.
    """
    if hf_auto.is_wrapped(model):
        return hf_auto.write_hf(model, Path(export_dir), mte.export_hf_checkpoint, **kwargs)
    exporter = load_connector_from_trainer_ckpt(model_dir, "hf")
    if model is None:
        model, _ = exporter.nemo_load(model_dir)
    core = unwrap_for_modelopt_operations(model)
    if not mto.ModeloptStateManager.is_converted(core):
        return None
    real = isinstance(core, torch.nn.Module)
    if real:
        export.check_converted(core)
    with export.staged(Path(export_dir), beside=real) as folder:
        tokenizer = export.hf_tokenizer(model)
        export.write_hf(core, exporter.config, tokenizer, folder, mte.export_mcore_gpt_to_hf, **kwargs)
        if real and is_global_rank_zero():
            export.verify_hf(folder)
    return Path(export_dir)


def unwrap_for_modelopt_operations(model):
    """Return the Megatron-Core model inside of NeMo's wrappers, or a Hugging Face model itself."""
    return model.model if hf_auto.is_wrapped(model) else unwrap_model(model)


def get_calib_data_iter(
    data: str = "cnn_dailymail", batch_size: int = 64, calib_size: int = 512, max_sequence_length: int = 512
):
    """Yield lists of calibration texts; the last may be shorter, and rows without text are left out.

    Args:
        data: "cnn_dailymail", "wikitext", a JSON or JSON-lines file with a column "text", a dataset or list of texts.
        batch_size: Texts in a list.
        calib_size: Rows to read.
        max_sequence_length: Characters after which a text is cut.

    Raises:
        ModelOptConfigError: If the data cannot be read.
    """
    dataset, column = calibration.open_dataset(data, load_dataset)
    yield from calibration.text_batches(dataset, column, batch_size, calib_size, max_sequence_length)


def create_data_iterator_getter(
    model, dataset, seq_len, batch_size, calibration_size, *, packed: bool = True, shard: bool = False
):
    """Return a function that gives an iterator over token microbatches `[b, s]` on the model's device.

    The text is read and tokenized once, when the first iterator is made.

    Args:
        model: The ``llm.GPTModel``: its tokenizer and device are used.
        dataset: See `get_calib_data_iter`.
        seq_len: Tokens in a sequence; each row contributes as many at most.
        batch_size: Sequences in a microbatch; what remains makes smaller ones.
        calibration_size: Rows to read.
        packed: Join rows into full sequences; False pads each row with the end-of-sequence token.
        shard: Give this data-parallel rank its part only.
    """
    cache: list[torch.Tensor] = []

    def _get_iterator():
        if not cache:
            batches = get_calib_data_iter(
                data=dataset,
                max_sequence_length=_CHARACTERS_PER_TOKEN * seq_len,
                batch_size=batch_size,
                calib_size=calibration_size,
            )
            texts = (text for batch in batches for text in batch)
            rows = calibration.tokenize(texts, model.tokenizer, seq_len)
            cache.extend(calibration.arrange(rows, seq_len, batch_size, model.tokenizer, packed, shard))
        return iter([batch.to(model.device) for batch in cache])

    return _get_iterator


_DECODERS = (
    ("baichuan", "Baichuan2"),
    ("chatglm", "ChatGLM"),
    ("gemma2", "Gemma2"),
    ("gemma3", "Gemma3"),
    ("gemma", "Gemma"),
    ("llama", "Llama Mistral Mixtral"),
    ("gpt", "Nemotron"),
    ("qwen", "Qwen2"),
    ("gpt", "Starcoder Starcoder2"),
    ("phi3", "Phi3"),
)
# (class of NeMo, modelopt's name of its decoder): the first that fits counts.
gpt_model_type = [(getattr(llm, f"{name}Model"), decoder) for decoder, names in _DECODERS for name in names.split()]


def get_modelopt_decoder_type(model: llm.GPTModel) -> str | None:
    """Return modelopt's name of a model's decoder, or None.

    By the first class in ``gpt_model_type`` that fits; modelopt itself names that of a Hugging Face model.
    """
    if hf_auto.is_wrapped(model):
        return mte.model_utils.get_model_type(model.model)
    return next((name for model_class, name in gpt_model_type if isinstance(model, model_class)), None)


def _find_gpt_model(model) -> Any:
    """Return the ``llm.GPTModel`` (or ``Llama4OmniModel``) inside of wrappers, or None."""
    # NeMo wraps at most a few times; stand-ins answer any attribute with another stand-in, without end.
    for _ in range(8):
        is_known = isinstance(model, llm.GPTModel) or hf_auto.is_wrapped(model)
        if is_known or type(model).__name__ == "Llama4OmniModel":
            return model
        model = getattr(model, "module", None)
        if model is None:
            return None
    return None
