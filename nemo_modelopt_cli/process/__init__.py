"""Processes of a command: start, end, signals, ranks and their rendezvous."""
