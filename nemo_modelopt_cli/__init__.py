"""The commands of ``nemo-modelopt``, with their arguments, ranks and run files."""
