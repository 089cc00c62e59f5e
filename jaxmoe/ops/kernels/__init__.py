"""GPU kernels, each beside a pure-JAX twin of the same signature."""
