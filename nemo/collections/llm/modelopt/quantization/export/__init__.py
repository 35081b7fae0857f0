"""Check, write and verify exports of quantized models."""
