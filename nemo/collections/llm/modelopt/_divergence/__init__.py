"""Divergences between two sets of logits: values and gradients, with a whole or a split vocabulary."""
