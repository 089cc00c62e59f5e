"""What lies on disk: converted folders, adapters, the state of a training run."""
