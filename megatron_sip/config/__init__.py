"""Settings: dataclasses, command line, YAML, validation, presets."""
