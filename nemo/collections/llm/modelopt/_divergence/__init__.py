"""Divergences between two sets of logits: values and gradients, over a split vocabulary or not."""
