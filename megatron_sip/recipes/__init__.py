"""Functions that return a configuration."""
