"""Formulas for the peak memory of logits and loss in a distillation step. Standard library only.

The losses take their chunk sizes from here, so that formula and code stay in step. ``benchmarks/kd_memory.py`` compares
the formulas with measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one fp32 chunk of the divergence: several fit into a CPU's L3 cache; on a GPU it hides kernel launches.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 64 << 20}
# Bytes of one chunk of logits in the fused form: large enough for efficient matrix products, small next to the models.
LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Rows of a weight whose gradient is converted at a time.
WEIGHT_ROWS = 8192
_BUFFERS = 3
_FP32 = 4


def chunk_rows(tokens: int, vocabulary: int, width: int, device: str) -> int:
    """Return the number of tokens whose logits the divergence processes at a time.

    The three buffers of a chunk take at most a seventh of the logits, unless chunks would be too small to be efficient.

    Args:
        tokens: Tokens of the micro-batch.
        vocabulary: Entries of the vocabulary on this rank.
        width: Bytes of a logit.
        device: Type of the device.
    """
    largest = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (_FP32 * max(1, vocabulary))
    lean = tokens * width // (_BUFFERS * _FP32 * 7)
    return max(1, min(largest, max(largest // 4, lean)))


def logits_rows(tokens: int, vocabulary: int, width: int, device: str) -> int:
    """Return the number of tokens whose logits the fused form computes at a time."""
    rows = max(16, LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) // (width * max(1, vocabulary)))
    return min(rows, max(1, tokens))


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the memory of logits and loss on one rank.

    Attributes:
        tokens: Tokens of a micro-batch.
        vocabulary: Entries of the vocabulary on this rank.
        hidden: Hidden size of the student.
        teacher_hidden: Hidden size of the teacher.
        width: Bytes of a logit.
        tensor_parallel: Ranks that share the vocabulary.
        device: Type of the device.
        lm_loss: Whether a language-model loss is added.
        trained: Whether the student's output weight is trained.
    """

    tokens: int
    vocabulary: int
    hidden: int
    teacher_hidden: int
    width: int
    tensor_parallel: int = 1
    device: str = "cuda"
    lm_loss: bool = False
    trained: bool = True

    @property
    def logits(self) -> int:
        """Bytes of one model's logits."""
        return self.tokens * self.vocabulary * self.width

    def _chunk(self, tokens: int) -> int:
        rows = min(tokens, chunk_rows(tokens, self.vocabulary, self.width, self.device))
        return _BUFFERS * _FP32 * self.vocabulary * rows

    def stock(self) -> int:
        """Return the bytes of NeMo's own loss: both logits, and 7 (TP=1) or 8 fp32 tensors of their size."""
        copies = 7 if self.tensor_parallel == 1 else 8
        return 2 * self.logits + copies * _FP32 * self.tokens * self.vocabulary

    def chunked(self) -> int:
        """Return the bytes of the chunked loss.

        In the forward pass: both logits, one of which becomes the gradient, and the buffers of a chunk. In the backward
        pass: this gradient and that of the output weight. Megatron's cross entropy keeps another fp32 tensor of the
        size of the logits.
        """
        forward = 2 * self.logits + self._chunk(self.tokens)
        backward = self.logits + self.trained * self.hidden * self.vocabulary * self.width
        lm_loss = _FP32 * self.tokens * self.vocabulary if self.lm_loss else 0
        return max(forward, backward) + lm_loss

    def fused(self) -> int:
        """Return the bytes of the loss fused with the output layers.

        It is the sum of: a chunk of each model's logits (and of a gradient, if there is a language-model loss), the
        fp32 gradient of the output weight, the gradient of the hidden states, the hidden states of both models over the
        whole sequence, and the larger of a chunk's buffers and a converted part of the weight's gradient.
        """
        rows = logits_rows(self.tokens, self.vocabulary, self.width, self.device)
        converted = 0
        if self.trained and self.width < _FP32:
            converted = min(WEIGHT_ROWS, self.vocabulary) * self.hidden * self.width
        kept = self.tokens * (self.teacher_hidden + (self.hidden if self.tensor_parallel > 1 else 0)) * self.width
        weight = _FP32 * self.vocabulary * self.hidden if self.trained else 0
        chunks = (3 if self.lm_loss else 2) * rows * self.vocabulary * self.width
        own = self.tokens * self.hidden * self.width
        return chunks + weight + own + kept + max(self._chunk(rows), converted)
