"""What NeMo's model classes add to the network that a configuration builds; a distillation builds it without them."""

from __future__ import annotations

from typing import Any


def completed(core: Any, config: Any) -> Any:
    """Add the scaled embedding of Gemma 1 and 2 and the capped logits of Gemma 2 to a Megatron model.

    Args:
        core: the model that ``config.configure_model`` returned, changed in place.
        config: its configuration.

    Returns:
        The model.
    """
    from nemo.collections.common.parts.utils import extend_instance
    from nemo.collections.llm.gpt.model import gemma, gemma2

    capped = isinstance(config, gemma2.Gemma2Config)
    if not capped and not isinstance(config, gemma.GemmaConfig):
        return core
    if hasattr(core, "embedding"):
        extend_instance(core.embedding, gemma2.EmbeddingScalingMixin)
    if capped and getattr(core, "output_layer", None) is not None:
        extend_instance(core.output_layer, gemma2.Gemma2OutputLayer)
    return core
