"""Insertion of quantizers: what is quantized, and in which format."""
