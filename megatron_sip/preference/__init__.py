"""From candidates and verdicts to preference pairs and batches."""
