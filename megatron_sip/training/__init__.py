"""One optimizer step and what guards it."""
