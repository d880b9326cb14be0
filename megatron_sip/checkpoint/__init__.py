"""Save, load, import and export."""
