"""Quantize a Hugging Face Llama to FP8 and write it as a Hugging Face checkpoint."""

import torch

if not torch.cuda.is_available():
    from nemo_modelopt_dropin import cpu_backend

    cpu_backend.enable()

from nemo.collections import llm
from nemo.collections.llm.modelopt import ExportConfig, QuantizationConfig

if __name__ == "__main__":  # saving a checkpoint starts processes
    llm.import_ckpt(llm.LlamaModel(llm.Llama32Config1B()), "hf://my_hf_llama", output_path="my_llama", overwrite=True)
    llm.ptq(
        model_path="my_llama",
        export_config=ExportConfig(path="my_llama_fp8", export_format="hf"),
        quantization_config=QuantizationConfig(algorithm="fp8", calibration_dataset="texts.jsonl"),
    )
