"""GPU kernels, each with a pure-JAX twin of the same signature in `jaxmoe.dispatch`."""
