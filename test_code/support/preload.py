"""What the server that ranks are forked from imports once, so that a rank is there in seconds and not in twenty.

Everything heavy but ``nemo.collections.llm``: which subpackage serves a rank, stock's or ours, is decided there by the
rank's own environment. Likewise the JavaScript of the reports is put together once, and not in every command.
"""

import functools
import subprocess
import sys
import warnings

from nemo_modelopt_cli.process import imports
from nemo_modelopt_dropin.report import page

with warnings.catch_warnings(), imports.uncollected():
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

# In a process of its own: the library that does it starts threads, and a process with threads cannot be forked safely.
_SCRIPT = "from nemo_modelopt_dropin.report import page; print(page.library(), end='')"
_LIBRARY = subprocess.run([sys.executable, "-c", _SCRIPT], check=True, capture_output=True, text=True).stdout
assert _LIBRARY
page.library = functools.cache(lambda: _LIBRARY)
