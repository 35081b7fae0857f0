"""The whole job, from a teacher checkpoint to a quantized student, as resumable steps over NeMo's public API.

``settings`` holds the checked inputs, ``plan`` the steps and their order, ``jobs`` the work of each step, and
``stages`` the state machine, which is independent of models. Only ``jobs``, ``training``, ``heldout``,
``exported`` and ``recipe`` import NeMo, and the first four only when a step runs.
"""
