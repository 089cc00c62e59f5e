"""What every command shares: flags, one-line errors, progress, and settings for XLA."""
