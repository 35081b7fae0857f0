"""Bytes that logits and loss of a distillation step take at their peak, by formula. Standard library only.

The sizes of chunks that the losses work with are here, too, so that formula and code cannot part.
``benchmarks/kd_memory.py`` compares the formulas with what models take.
"""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of one fp32 chunk of the divergence: a few fit the L3 cache of a CPU; on a GPU it hides the launches.
CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 64 << 20}
# Bytes of a chunk of logits of the fused form: matrix products are efficient, and it is little beside the models.
LOGITS_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
# Rows of a weight whose gradient is made at a time where it has to be converted.
WEIGHT_ROWS = 8192
_BUFFERS = 3
_FP32 = 4


def chunk_rows(tokens: int, vocabulary: int, width: int, device: str) -> int:
    """Return how many tokens of logits the divergence works on at a time.

    The three buffers of a chunk take an eighth of the logits at most, unless that would make chunks inefficient.

    Args:
        tokens: of the micro-batch.
        vocabulary: entries on this rank.
        width: bytes of a logit.
        device: its type.
    """
    largest = CHUNK_BYTES.get(device, CHUNK_BYTES["cuda"]) // (_FP32 * max(1, vocabulary))
    lean = tokens * width // (_BUFFERS * _FP32 * 8)
    return max(1, min(largest, max(largest // 4, lean)))


def logits_rows(tokens: int, vocabulary: int, width: int, device: str) -> int:
    """Return how many tokens' logits the fused form makes at a time."""
    rows = max(16, LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"]) // (width * max(1, vocabulary)))
    return min(rows, max(1, tokens))


@dataclass(frozen=True)
class Sizes:
    """What decides the memory of logits and loss on one rank.

    Attributes:
        tokens: of a micro-batch.
        vocabulary: entries on this rank.
        hidden: hidden size of the student.
        teacher_hidden: hidden size of the teacher.
        width: bytes of a logit.
        tensor_parallel: ranks that share the vocabulary.
        device: type of the device.
        lm_loss: whether a language-model loss is mixed in.
        trained: whether the student's output weight is.
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
        """Return the bytes of the chunked loss: the logits, one of which takes the gradient, and a chunk's buffers.

        Or, in the backward pass, this gradient and that of the output weight. Megatron's cross entropy keeps an fp32
        tensor of the logits' size.
        """
        forward = 2 * self.logits + self._chunk(self.tokens)
        backward = self.logits + self.trained * self.hidden * self.vocabulary * self.width
        lm_loss = _FP32 * self.tokens * self.vocabulary if self.lm_loss else 0
        return max(forward, backward) + lm_loss

    def fused(self) -> int:
        """Return the bytes of the loss fused with the output layers.

        A chunk of each model's logits (with a language-model loss, of a gradient, too), the output weight's gradient in
        fp32, the gradient of the hidden states, hidden states of both models over the whole sequence, a chunk's buffers
        or a part of the weight's gradient in its own type.
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
