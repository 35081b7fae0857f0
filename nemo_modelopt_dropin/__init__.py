"""What the drop-in needs and NeMo does not own: the import finder, the version check and the CPU backend.

Nothing is imported here: this package is loaded at every interpreter start by ``activate.pth``.
"""
