"""jaxmoe's forward pass under jit, for parity tests that run in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.model import decoder
from jaxmoe.model.interface import DecoderOutput, Options, Tokens, control_specs
from jaxmoe.ops.router import load_balancing_loss
from tests import oracle
from tests.parity.batches import Batch

# On a CPU nearly all of the suite's time goes to LLVM. Less optimisation halves it and reorders no sum.
COMPILER_OPTIONS = (
    {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    if jax.default_backend() == "cpu"
    else {}
)


class ProductOutput(NamedTuple):
    """As `oracle.OracleOutput`, with the counts that jaxmoe made while routing."""

    logits: np.ndarray
    hidden: np.ndarray
    router_logits: np.ndarray
    selected: np.ndarray
    counts: np.ndarray
    aux_loss: float


def product(
    config: Qwen3MoeConfig,
    params: Mapping[str, np.ndarray],
    batch: Batch,
    *,
    dtype: str = "float32",
    lora: LoraConfig | None = None,
    adapters: Mapping[str, np.ndarray] | None = None,
    fresh: bool = False,
) -> ProductOutput:
    """Runs `jaxmoe`; `fresh` compiles again, which a test that patches jaxmoe needs."""
    step = _compiled.__wrapped__(config, lora) if fresh else _compiled(config, lora)
    cast = {path: jnp.asarray(array, dtype) for path, array in params.items()}
    logits, out, aux = step(cast, {k: jnp.asarray(v) for k, v in (adapters or {}).items()}, *map(jnp.asarray, batch))
    logits, out = jax.tree.map(lambda x: np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else None), (logits, out))
    hidden = np.concatenate([out.layer_inputs, out.hidden[None]])
    # The choice is made from float32 probabilities; ties go to the lowest index.
    probabilities = np.asarray(jax.nn.softmax(out.router_logits, axis=-1))
    selected = oracle.top_k(probabilities, config.num_experts_per_tok)
    return ProductOutput(logits, hidden, out.router_logits, selected, out.stats.counts, float(aux))


def compiled_forward(
    config: Qwen3MoeConfig,
    lora: LoraConfig | None,
    compiler_options: dict[str, Any],
    mesh: MeshShape = ONE_DEVICE,
    keep_logits: int = 0,
) -> Any:
    """A fresh jitted function (params, adapters, *batch, routing control) -> (logits, `DecoderOutput`, aux loss)."""
    options = Options(lora=lora, router_logits=True, layer_inputs=True, keep_logits=keep_logits, mesh=mesh)
    placement = Placement(mesh, config, lora)
    of_tokens, of_layers = placement.spec("batch", "sequence"), placement.spec(None, "batch", "sequence")
    results = of_tokens, DecoderOutput._make([of_tokens, PartitionSpec(), of_layers, of_layers, of_layers, None])

    def on_a_device(params, adapters, tokens, control):
        out = decoder.forward(params, adapters, tokens, config=config, options=options, control=control)
        logits = decoder.logits_of(out.hidden, decoder.head_weight(params))
        return logits, out._replace(stats=sum_over_devices(out.stats, mesh))

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def run(params, adapters, input_ids, position_ids, segment_ids, control=None):
        held = placement.specs(params), placement.specs(adapters)
        spread = placement.run_in_order(on_a_device, (*held, of_tokens, control_specs(control, placement)), results)
        logits, out = spread(params, adapters, Tokens(input_ids, position_ids, segment_ids), control)
        stats, aux = out.stats, jnp.zeros(())
        if config.sparse_layers:
            aux = load_balancing_loss(stats.counts, stats.prob_sums, stats.tokens)
        return logits, out, aux

    return run


@functools.cache
def _compiled(config: Qwen3MoeConfig, lora: LoraConfig | None) -> Any:
    return compiled_forward(config, lora, COMPILER_OPTIONS)
