"""Scores of models on tasks of EleutherAI's lm-eval, which runs in a process of its own."""
