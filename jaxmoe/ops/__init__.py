"""One operation per file: its oracle first, then its implementations."""
