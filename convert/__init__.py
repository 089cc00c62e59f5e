"""Converts checkpoints and adapters between HF or PEFT and JAX, bit for bit. It needs neither a model nor a GPU."""
