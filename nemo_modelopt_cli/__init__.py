"""The commands: ptq, prune, distill, compress and demo, with their arguments, ranks and run files."""
