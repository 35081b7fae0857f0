"""The flags of ptq, prune and distill: a dataclass for each command, one field for each flag.

The names that NeMo's scripts use are aliases of the same flag. `shared` holds what several commands have.
"""
