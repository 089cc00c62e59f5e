"""What goes into a forward pass and what comes out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxmoe.config import LoraConfig
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.distributed.placement import Placement
from jaxmoe.memory import Remat
from jaxmoe.ops.router import CapturedRouting, RoutingControl
from jaxmoe.ops.saliency import ExpertSums

Params = dict[str, Array]  # dotted path -> array, the layers' arrays stacked (`jaxmoe.parameters`)
Trainable = Literal["none", "adapters", "all"]


class Tokens(NamedTuple):
    """Whole sequences of T tokens. `segment_ids` are 0 for padding and 1, 2, ... for the documents packed into a
    sequence; a token attends to earlier tokens of its own segment."""

    input_ids: Int[Any, "B T"]
    position_ids: Int[Any, "B T"]
    segment_ids: Int[Any, "B T"]


@dataclass(frozen=True)
class Options:
    """How a forward pass runs and what it saves and returns; static under jit.

    Attributes:
        lora: the adapters' config; None without adapters.
        trainable: which parameters will be differentiated: "none", "adapters", "all", or a set of paths of weights
            (then adapters as well). Asking for any other gradient is an error.
        remat: which results are saved for the backward pass; the rest is recomputed. "low-memory" saves one [B, T, D]
            per layer, "offload" saves it in the host's memory, "fast" saves all results that are expensive to
            recompute, "balanced" the same without the experts' products. No policy saves a copy of a frozen weight.
        unroll: compiles every layer separately instead of one for all, which avoids the copies that a scan makes. For a
            frozen model, whose weights need no slice.
        packed: a sequence may hold several documents. False promises one document per sequence, optionally followed by
            padding. Causality alone then keeps the two apart, and a GPU need not check at every layer.
        mesh: the devices that share the tokens. Several run the pass together, each with its share of every array.
        router_logits: also return all router logits.
        layer_inputs: also return each layer's input.
        keep_logits: also return the routing of each token with this many of its largest router logits (0: none).
        saliency: also return how much each expert contributes; without a gradient, and with k below E.
        until_last_router: only the routing is wanted: the pass ends at the router of the last MoE layer, and the hidden
            states are of no use.
        dense_router: the router's gradient also counts the experts that a token does not use (DenseMixer).
    """

    lora: LoraConfig | None = None
    trainable: Trainable | frozenset[str] = "none"
    remat: Remat = "low-memory"
    unroll: bool = False
    packed: bool = True
    mesh: MeshShape = ONE_DEVICE
    router_logits: bool = False
    layer_inputs: bool = False
    keep_logits: int = 0
    saliency: bool = False
    dense_router: bool = False
    until_last_router: bool = False

    def trains(self, path: str) -> bool:
        """Whether the weight `path` will be differentiated."""
        return self.trainable == "all" or (isinstance(self.trainable, frozenset) and path in self.trainable)


class RouterStats(NamedTuple):
    """Per MoE layer: routed rows per expert, and router probabilities summed over the valid (non-padding) tokens."""

    counts: Int[Array, "Ls E"]
    prob_sums: Float[Array, "Ls E"]
    tokens: Int[Array, ""]


class DecoderOutput(NamedTuple):
    """Hidden states after the final norm, router statistics, and what the options asked for."""

    hidden: Float[Array, "B T D"]
    stats: RouterStats
    router_logits: Float[Array, "Ls B T E"] | None
    layer_inputs: Float[Array, "L B T D"] | None  # float32
    routing: CapturedRouting | None  # [Ls, B, T, ...]
    saliency: ExpertSums | None = None  # [Ls, E]


def control_specs(control: RoutingControl | None, placement: Placement) -> Any:
    """How devices share what a caller imposes on the routing of whole sequences: the experts of their own tokens."""
    if control is None:
        return None
    return RoutingControl._make([placement.spec(None, "batch", "sequence"), *[PartitionSpec()] * 3])
