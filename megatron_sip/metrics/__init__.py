"""What one sees: log line, sinks, samples."""
