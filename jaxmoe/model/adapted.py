"""An adapter's two shares: the weights that it holds in full, and the low-rank factors that it adds to others.

Both lie in one dictionary (`jaxmoe.parameters.lora_specs`), so that optimizer, checkpoints and exports treat them
alike. Only the forward pass takes them apart, with the two functions below.
"""

from __future__ import annotations

from jaxmoe.lora import LoraConfig
from jaxmoe.model.interface import Params


def weights_of(params: Params, adapters: Params, lora: LoraConfig | None) -> Params:
    """The base's weights, with those that the adapter holds in full in their place, rounded to the base's dtype.

    If the adapter separates a tied head from the embedding, the result has an `lm_head` of its own.
    """
    if lora is None or not lora.saved_paths:
        return params
    embedding = params["embed_tokens"]
    saved = {path: adapters[path].astype(params.get(path, embedding).dtype) for path in lora.saved_paths}
    if lora.modules_to_save and not lora.ensure_weight_tying:
        saved = {"lm_head": params.get("lm_head", embedding)} | saved
    return params | saved


def low_rank_factors(adapters: Params) -> Params:
    """The adapter's arrays without the weights that it holds in full."""
    return {path: array for path, array in adapters.items() if path.endswith((".lora_A", ".lora_B"))}
