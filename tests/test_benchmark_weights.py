"""The random weights of the benchmarks: what a model in NF4 stores, with the spread of the 16-bit ones."""

from __future__ import annotations

import numpy as np

from benchmarks import random_model
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.parameters import Quantization, quantizable, stored_specs
from jaxmoe.presets import PRESETS


def test_random_weights_in_nf4():
    config = PRESETS["qwen3-30b-a3b"].replace(
        num_hidden_layers=2, hidden_size=128, moe_intermediate_size=64, num_experts=16, vocab_size=512
    )
    params = random_model.jax_parameters(config, "nf4")
    specs = stored_specs(config, Quantization(quantizable(config)))
    found = {path: (array.shape, str(array.dtype)) for path, array in params.items()}
    assert found == {path: (spec.shape, spec.dtype or "bfloat16") for path, spec in specs.items()}
    for path, groups, std in (("sparse.gate_up_proj", 32, random_model.STD), ("sparse.down_proj", 32, 0.01)):
        spec = (groups, 128, 128 if path == "sparse.gate_up_proj" else 64)
        decoded = np.asarray(NF4Stack.of(params, path, spec, "bfloat16")[groups - 1], np.float32)
        assert 0.9 < decoded.std() / std < 1.1
