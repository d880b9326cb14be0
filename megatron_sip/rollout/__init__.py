"""The policy writes its continuations."""
