"""The whole job, teacher checkpoint to quantized student, as resumable stages over NeMo's public API.

``stages`` is the state machine and knows nothing of models, ``settings`` are the checked inputs, ``jobs`` are the
stages themselves. Only ``jobs``, ``training``, ``heldout`` and ``tokens`` import NeMo, and only when a stage runs.
"""
