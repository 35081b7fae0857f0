"""Checks and sizes that need nothing but files: standard library, YAML and pyarrow only."""
