"""Serve folders with vLLM on the CPU, one after the other, in a process of its own. It imports nothing of this project.

Each line of the standard input is a request, a JSON object: `folder`, `tokens` (a list of prompts, each a list of
token ids), `logprobs` (the file to write), `new_tokens`, `together` (sequences at a time), and `memory` (whether it is
measured). Each answer is one line of the standard output: `error`, or the `tokens` that were generated, the `kernels`
that computed, the bits of the KV `cache`, vLLM's `version`, and the `memory` in bytes: see `measured`; `positions` are
the tokens that the cache holds. The file holds the log probabilities of the whole vocabulary at each position of each
prompt, `[p, s - 1, v]` in fp32: entry i belongs to token i + 1. Everything that vLLM prints goes to the standard
error.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    # Without a second process for the engine, so that `references` also applies there.
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    # On a CPU with AMX, vLLM would round the inputs of INT4 weights to INT8.
    VLLM_CPU_INT4_W4A8="0",
    # A function is sent to the engine, which is in this process.
    VLLM_ALLOW_INSECURE_SERIALIZATION="1",
)


def serve(request: dict) -> dict:
    """Load a folder, generate, and write the log probabilities of the prompts.

    Args:
        request: See the module.

    Returns:
        The answer.
    """
    import measured
    import torch
    import vllm
    from references import cache_of, kernels_of
    from vllm import LLM, SamplingParams

    with measured.loading() as parameters:
        model = LLM(
            model=request["folder"],
            enforce_eager=True,
            max_model_len=128,
            max_logprobs=-1,
            max_num_seqs=request["together"],
            skip_tokenizer_init=True,
            disable_log_stats=True,
            # A cache of 1 GiB, the least that vLLM takes on a CPU, would be filled with zeros for each folder.
            num_gpu_blocks_override=16,
            enable_prefix_caching=False,
        )
    prompts = [{"prompt_token_ids": tokens} for tokens in request["tokens"]]
    settings = SamplingParams(
        max_tokens=request["new_tokens"], temperature=0, prompt_logprobs=-1, ignore_eos=True, detokenize=False
    )
    outputs = model.generate(prompts, settings, use_tqdm=False)
    rows = []
    for output in outputs:
        # The first position has no log probabilities, because nothing predicts it.
        for entries in output.prompt_logprobs[1:]:
            rows.append([entries[token].logprob for token in range(len(entries))])
    torch.save(torch.tensor(rows).reshape(len(outputs), -1, len(rows[0])), request["logprobs"])
    ((cache, kernels),) = model.apply_model(lambda module: (cache_of(module), kernels_of(module)))
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "kernels": kernels,
        "cache": cache,
        "version": vllm.__version__,
    }
    if request["memory"]:
        answer["memory"] = {"parameters": parameters[-1], **memory_of(model, prompts)}
    del model
    return answer


def memory_of(model, prompts: list) -> dict:
    """Return the bytes that a model keeps, and the most that a forward pass of prompts adds.

    Args:
        model: vLLM's ``LLM``.
        prompts: The prompts.
    """
    import measured
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)
    cache = model.llm_engine.vllm_config.cache_config
    (found,) = model.apply_model(measured.kept)
    return found | {
        "peak": measured.peak(model, prompts, settings),
        "positions": cache.num_gpu_blocks * cache.block_size,
    }


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import references

    references.enable()
    from vllm.distributed import cleanup_dist_env_and_memory

    for line in sys.stdin:
        try:
            answer = serve(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        gc.collect()
        # vLLM collects garbage several times for each folder: what is left now belongs to modules and stays.
        gc.freeze()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
