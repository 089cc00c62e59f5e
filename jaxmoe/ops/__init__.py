"""One operation a file: its oracle first, then its implementations."""
