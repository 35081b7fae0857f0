"""Recorded teachers: their top-k logits, written once and replayed."""
