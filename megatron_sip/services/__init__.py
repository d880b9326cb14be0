"""Judges, rewriter and the client that talks to their servers."""
