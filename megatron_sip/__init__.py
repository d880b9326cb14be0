"""Self-Improving Pretraining (arXiv 2601.21343) on megatron-core."""
