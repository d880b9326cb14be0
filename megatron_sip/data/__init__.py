"""Corpus, cuts, the seeded stream and the tokenizer."""
