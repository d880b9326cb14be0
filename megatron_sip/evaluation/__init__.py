"""Comparison of policies on held-out prefixes."""
