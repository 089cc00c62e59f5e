"""Routing that a caller imposes on the model: replayed, forced, removed and biased experts."""
