"""Compare what the scripts do with a recording: flags, plans, settings, files and exit codes."""
