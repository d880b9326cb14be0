"""Judges and rewriter behind OpenAI-compatible servers."""
