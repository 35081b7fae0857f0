"""Serve ``nemo.collections.llm.modelopt`` from this distribution instead of from nemo-toolkit.

nemo-toolkit owns ``nemo/__init__.py``, so a second ``nemo/`` folder can neither extend nor shadow it, and overwriting
its files would break its uninstallation. Therefore a finder at the front of ``sys.meta_path`` serves exactly one name;
submodules are imported as usual from the package's ``__path__``. ``NEMO_MODELOPT=stock`` turns it off.

This module runs at every interpreter start: it imports only modules that the interpreter has already loaded.
"""

import os
import sys

PACKAGE = "nemo.collections.llm.modelopt"
SWITCH = "NEMO_MODELOPT"
_HERE = os.path.dirname(os.path.abspath(__file__))


def package_dir():
    """Return the folder of our subpackage, in the wheel's private folder or in the source tree."""
    installed = os.path.join(_HERE, "_overlay", "modelopt")
    if os.path.isdir(installed):
        return installed
    return os.path.join(os.path.dirname(_HERE), *PACKAGE.split("."))


def is_enabled():
    """Return whether the drop-in serves the subpackage (``NEMO_MODELOPT`` is not ``stock``)."""
    return os.environ.get(SWITCH, "").strip().lower() != "stock"


class DropInFinder:
    """Meta path finder for ``nemo.collections.llm.modelopt`` only."""

    @staticmethod
    def find_spec(fullname, path=None, target=None):
        """Return the spec of our package, or None for any other name and if the finder is turned off."""
        if fullname != PACKAGE or not is_enabled():
            return None
        from importlib.util import spec_from_file_location

        folder = package_dir()
        return spec_from_file_location(
            fullname, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


def install():
    """Insert the finder at the front of ``sys.meta_path``; a second call changes nothing."""
    if DropInFinder not in sys.meta_path:
        sys.meta_path.insert(0, DropInFinder)


def uninstall():
    """Remove the finder; modules that are already imported do not change."""
    if DropInFinder in sys.meta_path:
        sys.meta_path.remove(DropInFinder)
