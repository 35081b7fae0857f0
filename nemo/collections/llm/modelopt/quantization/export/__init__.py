"""Export of quantized checkpoints: what can be written, how it is written, and the check of what was written."""
