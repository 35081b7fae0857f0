"""Calibration: data, micro-batches, forward passes, and the calibrated state."""
