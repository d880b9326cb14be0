"""Start of the process groups, CPU support, the leader of a model-parallel group."""
