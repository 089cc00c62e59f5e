"""What this package stores on disk: converted checkpoints, converted adapters, training checkpoints."""
