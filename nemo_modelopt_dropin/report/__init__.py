"""Report pages: figures, tables and their JSON."""
