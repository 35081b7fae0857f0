"""Tests, in folders like those of the packages; `support` has the live ranks, tiny real models and shared rank jobs."""
