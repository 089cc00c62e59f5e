"""Weights in FP8: the codec, stacks that are decoded where they are indexed, and whole checkpoints that are recoded."""
