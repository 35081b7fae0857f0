"""Inserting quantizers, and choosing what is quantized in which format."""
