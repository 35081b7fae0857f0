"""Transformer Engine's real classes on CPU ranks: how the tests of its layer specs run without a GPU.

On GPUs, NeMo builds models from the classes of Transformer Engine (TE): norms that are fused into linear layers,
grouped linear layers for experts, an attention of its own, and an ``_extra_state`` in every state dict. The CPU backend
uses Megatron's local layers instead, so the other tests never meet these names, parameters and checkpoints.

The package ``transformer-engine`` is pure Python; its kernels are in an extension module, ``transformer_engine_torch``,
and in Triton. `extension.py`, `permutation.py` and `cross_entropy.py` are references for those kernels in PyTorch,
forward and backward.
Everything else is TE's own code: modules, initialisation, autograd functions, collectives, Adam, state dicts.

How it starts:

- ``make test-te`` installs the package into ``build/te_on_cpu``, which is not in the environment of the other tests,
  and sets ``PYTHONPATH`` to that folder and to ``startup/``.
- ``startup/sitecustomize.py`` runs in every process with this path: pytest, its ranks, commands. It costs nothing until
  something imports ``transformer_engine``; then `importing.py` provides the extension module and adapts what only works
  with a GPU.
- The tests are marked ``te`` and deselected otherwise. `test_*.py` compare numbers with the local layer spec, from the
  same weights, which a checkpoint carries from one spec to the other.
- With the same path and ``TEST_SPEC=te``, other tests of the suite build their models from TE's layers, as on GPUs:
  ``make test-te SUITE=test_code/test_pruner.py``.
- ``make test`` runs those that are marked ``main`` as well: about a third, of each of training, saving, quantization,
  export, pruning and distillation.

Not covered: FP8 training, user buffers (communication overlapped with matrix products), CUDA graphs, cuDNN and flash
attention (TE's unfused attention runs, which is PyTorch) and with them context parallelism, which TE's unfused
attention does not support; bf16 kernels bit for bit.
"""
