"""Calibration: data, micro-batches, forward passes, and the state that is kept of them."""
