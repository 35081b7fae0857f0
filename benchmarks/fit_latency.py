"""Check the roofline of `nemo_modelopt_dropin.fit.latency` on this processor: decoding steps of small models in fp32.

Bandwidth and arithmetic of one thread are measured with the matrix products of the models, the overhead of a layer with
a model that is too small to take any other time. Steps of one sequence are then predicted and measured. Larger batches
are not compared: PyTorch's kernels for a few rows reach neither the bandwidth nor the arithmetic of the device.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from nemo_modelopt_dropin.fit import latency
from nemo_modelopt_dropin.fit.devices import BF16, Device
from nemo_modelopt_dropin.fit.formats import Format
from nemo_modelopt_dropin.fit.serving import Load
from nemo_modelopt_dropin.preflight.model_sizes import Shape

# Hidden size, inner size, layers, heads, groups, context.
CASES = (
    (1024, 2816, 8, 16, 4, 64),
    (768, 2048, 12, 12, 12, 64),
    (1280, 3456, 6, 20, 5, 64),
    (1024, 2816, 4, 16, 2, 512),
)
VOCABULARY = 8192
WITHIN = 0.25


def seconds(run: Callable[[Any], Any], given: Any = None) -> float:
    """Return the time of one call."""
    started = time.perf_counter()
    run(given)
    return time.perf_counter() - started


def model(hidden: int, inner: int, layers: int, heads: int, groups: int, vocabulary: int = VOCABULARY) -> Any:
    """Return a random Llama in fp32."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


def step(net: Any, context: int) -> float:
    """Return the seconds of one decoding step."""
    config = net.config
    shape = (1, config.num_key_value_heads, context, config.hidden_size // config.num_attention_heads)
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(shape), torch.zeros(shape), layer)
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        return seconds(lambda found: net(token, past_key_values=found), cache)


class Processor:
    """The numbers of this processor for one thread, as they are at a moment."""

    def __init__(self):
        self._weights = [torch.randn(6144, 1536) for _ in range(8)]
        self._small = model(64, 128, 16, 1, 1, 64)
        self._flops = max(self._rate() for _ in range(3))

    def _products(self, rows: torch.Tensor) -> None:
        for weight in self._weights:
            torch.nn.functional.linear(rows, weight)

    def _rate(self) -> float:
        rows = torch.randn(256, 1536)
        return 2 * len(rows) * sum(weight.numel() for weight in self._weights) / seconds(self._products, rows)

    def now(self) -> Device:
        """Measure bandwidth and overhead."""
        bandwidth = sum(weight.nbytes for weight in self._weights) / seconds(self._products, torch.randn(1, 1536))
        overhead = step(self._small, 1) / self._small.config.num_hidden_layers
        return Device("this processor", bandwidth, {BF16: self._flops}, overhead, "measured")


def compare(repeats: int) -> dict[str, Any]:
    """Return for each case the predicted and the measured time of a step.

    Other processes take a changing part of the bandwidth. So the processor is measured right before each step, and the
    median of the quotients counts.

    Args:
        repeats: How many pairs to measure of each case.
    """
    processor, rows = Processor(), []
    for hidden, inner, layers, heads, groups, context in CASES:
        net = model(hidden, inner, layers, heads, groups)
        shape = Shape("Llama", layers, hidden, inner, heads, groups, hidden // heads, VOCABULARY, gated=True)
        pairs = []
        for _ in range(repeats + 2):
            numbers = processor.now()
            # The weights are in fp32: twice the bytes of 16 bits.
            predicted = latency.step_seconds(shape, Format(), Load(context, 1), numbers, width=2.0)
            pairs.append((predicted, step(net, context)))
        pairs = pairs[2:]  # the first passes allocate memory
        rows.append(
            {
                "case": f"hidden {hidden}, inner {inner}, {layers} layers, context {context}",
                "predicted ms": round(statistics.median(one for one, _ in pairs) * 1e3, 3),
                "measured ms": round(statistics.median(one for _, one in pairs) * 1e3, 3),
                "predicted / measured": round(statistics.median(one / other for one, other in pairs), 3),
            }
        )
    return {
        "machine": f"{platform.machine()}, one thread",
        "rows": rows,
        "within": WITHIN,
        "holds": all(abs(row["predicted / measured"] - 1) <= WITHIN for row in rows),
    }


def main() -> int:
    """Measure, write the results, and return 0 if all predictions are near enough."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "fit_latency.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = compare(given.repeats)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    sys.stdout.write(json.dumps(found, indent=1) + "\n")
    return 0 if found["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
