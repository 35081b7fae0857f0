"""Layouts of quantized layers in Hugging Face files."""
