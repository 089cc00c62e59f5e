"""What every command shares: flags, one-line errors, progress, and what is set for XLA."""
