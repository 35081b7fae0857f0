"""The tests: one file a room, `ranks` the pool of live ranks, `tiny` small real models, `jobs_*` what ranks execute."""
