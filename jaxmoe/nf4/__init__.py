"""Weights in NF4: the codec, stacks that are decoded where they are indexed, and whole checkpoints that are recoded."""
