"""Carries checkpoints and adapters between the HF and JAX worlds, bit for bit: arrays and names, no model, no GPU."""
