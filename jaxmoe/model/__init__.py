"""The model: the forward pass, the loop over layers, the KV cache, and the object around them."""
