"""What the server that ranks are forked from imports once, so that a rank is there in seconds and not in twenty.

Everything heavy but ``nemo.collections.llm``: which subpackage serves a rank, stock's or ours, is decided there by the
rank's own environment.
"""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets  # noqa: F401
    import lightning.pytorch  # noqa: F401
    import megatron.core  # noqa: F401
    import modelopt.torch.distill.plugins.megatron
    import modelopt.torch.export
    import modelopt.torch.opt
    import modelopt.torch.prune
    import modelopt.torch.quantization  # noqa: F401
    import nemo.lightning  # noqa: F401
    import transformers  # noqa: F401
