"""What the scripts do, compared with a recording: flags, plans, settings, files and exit codes."""
