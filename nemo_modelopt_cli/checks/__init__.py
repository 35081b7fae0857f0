"""Checks of a command's arguments, before NeMo is imported."""
