"""One MoE block, router to output, forward and backward, beside transformers': `python -m benchmarks.moe_block`.

The shape is that of Qwen3-30B-A3B (128 experts, top-8, D 2048, F 768), in bfloat16, with frozen weights: the backward
pass computes the gradient of the input. Both sides get the same weights, input and cotangent in one process and are
timed in turn, over queued calls; their outputs and gradients are compared. Several values of --tokens, --experts and
--skew show how the block's cost grows with each.
"""

from __future__ import annotations

import itertools
import os
import pathlib
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs its share of the memory

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shapes import write_json
from benchmarks.timing import Side, seconds_in_turn
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.ops.experts import ExpertWeights, implementation, sorted_experts
from jaxmoe.ops.router import route
from jaxmoe.presets import PRESETS

PEERS = {"transformers": "grouped_mm", "transformers, loop": "eager"}


def router_weights(config: Qwen3MoeConfig, skew: float) -> np.ndarray:
    """Router weights [E, D]; the experts' vectors differ in length by up to 1 + skew: longer ones win more often."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((config.num_experts, config.hidden_size), dtype=np.float32) * config.hidden_size**-0.5
    return vectors * rng.permutation(np.geomspace(1, 1 + skew, config.num_experts, dtype=np.float32))[:, None]


def flops(config: Qwen3MoeConfig, tokens: int) -> float:
    """Operations of the experts' products, forward and for the gradient of the rows; padding is not counted."""
    return 2 * 2 * tokens * config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size


def measure(config: Qwen3MoeConfig, tokens: int, skew: float, peers: list[str]) -> dict[str, Any]:
    """Milliseconds of both passes and of the forward pass alone, and how much the sides' results differ."""
    D, F, E = config.hidden_size, config.moe_intermediate_size, config.num_experts
    keys = jax.random.split(jax.random.key(0), 4)
    draw = jax.jit(lambda key, shape: jax.random.normal(key, shape, jnp.bfloat16) * shape[-1] ** -0.5, static_argnums=1)
    gate_up, down = draw(keys[0], (E, 2 * F, D)), draw(keys[1], (E, D, F))
    x, cotangent = (draw(key, (tokens, D)) * D**0.5 for key in keys[2:])
    gate = jnp.asarray(router_weights(config, skew), jnp.bfloat16)

    def block(x: Any, gate: Any, gate_up: Any, down: Any) -> Any:
        routing = route(x, gate, num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=config.norm_topk_prob)
        out = sorted_experts(x, routing, ExpertWeights(gate_up, down, 0, False))
        return out.astype(x.dtype), routing.experts  # as transformers' block returns it

    @jax.jit
    def both(x: Any, gate: Any, gate_up: Any, down: Any, cotangent: Any) -> Any:
        out, pull, experts = jax.vjp(lambda x: block(x, gate, gate_up, down), x, has_aux=True)
        return out, pull(cotangent)[0], experts

    forward = jax.jit(lambda *arrays: block(*arrays)[0])
    weights = gate, gate_up, down
    out, d_x, experts = jax.device_get(both(x, *weights, cotangent))
    counts = np.bincount(experts.reshape(-1), minlength=E)
    passes = {"jaxmoe": Side(lambda: both(x, *weights, cotangent), jax.block_until_ready)}
    forwards = {"jaxmoe": Side(lambda: forward(x, *weights), jax.block_until_ready)}
    blocks = {peer: _torch(config, PEERS[peer], x, cotangent, weights) for peer in peers}
    for peer, theirs in blocks.items():
        passes[peer], forwards[peer] = theirs.both, theirs.forward
    seconds, forward_seconds = (seconds_in_turn(sides, rounds=5) for sides in (passes, forwards))
    record: dict[str, Any] = {
        "tokens": tokens,
        "experts": E,
        "load": float(counts.max() / counts.mean()),
        "ms": seconds["jaxmoe"] * 1e3,
        "forward_ms": forward_seconds["jaxmoe"] * 1e3,
        "tflops": flops(config, tokens) / seconds["jaxmoe"] / 1e12,
    }
    for peer, theirs in blocks.items():
        record |= {f"{peer}: ms": seconds[peer] * 1e3, f"{peer}: forward_ms": forward_seconds[peer] * 1e3}
        for name, ours in (("out", out), ("d_x", d_x)):
            expected = theirs.results[name][0].float().cpu().numpy()
            difference = ours.astype(np.float32) - expected
            record[f"{peer}: {name}"] = float(np.linalg.norm(difference) / np.linalg.norm(expected))
    return record


class _Block(NamedTuple):
    """Transformers' block: both passes, the forward pass alone, and the results of `both` (`out`, `d_x`)."""

    both: Side
    forward: Side
    results: dict[str, Any]


def _torch(config: Qwen3MoeConfig, experts: str, x: Any, cotangent: Any, weights: Any) -> _Block:
    """Transformers' block with the same arrays."""
    import torch
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from peers.reference import hf_config

    hf = hf_config(config.to_hf())
    hf._experts_implementation = experts
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(hf)
    arrays = dict(zip(("gate.weight", "experts.gate_up_proj", "experts.down_proj"), weights, strict=True))
    block.load_state_dict({name: torch.from_dlpack(array) for name, array in arrays.items()}, assign=True)
    block.requires_grad_(False)
    inputs = torch.from_dlpack(x)[None].requires_grad_()
    d_out = torch.from_dlpack(cotangent)[None]
    results: dict[str, Any] = {}

    def forward() -> Any:
        with torch.no_grad():
            return block(inputs)

    def both() -> Any:
        out = block(inputs)
        (results["d_x"],) = torch.autograd.grad(out, inputs, d_out)
        results["out"] = out.detach()

    wait = lambda _: torch.cuda.synchronize() if inputs.is_cuda else None
    return _Block(Side(both, wait), Side(forward, wait), results)


def main() -> None:
    """Measures and prints the table."""
    parser = ArgumentParser(description="One MoE block, forward and backward, beside transformers'.")
    add = parser.add_argument
    add("--preset", default="qwen3-30b-a3b", choices=sorted(PRESETS), metavar="NAME", help=f"of {', '.join(PRESETS)}")
    add("--tokens", default="8192,32768", metavar="N,...", help="tokens (default: 8192,32768)")
    add("--experts", default="128", metavar="N,...", help="numbers of experts (default: 128)")
    add("--skew", default="0.4", metavar="X,...", help="how uneven the routing is; 0: even (default: 0.4)")
    add("--width", type=int, metavar="N", help="use a tiny block, to try out the benchmark")
    add("--peers", default="transformers", metavar="NAME,...", help=f"of {', '.join(PEERS)}, or none")
    add("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers to this file")
    args = parser.parse_args()
    peers = [] if args.peers == "none" else args.peers.split(",")
    base = PRESETS[args.preset]
    if args.width:
        base = base.replace(hidden_size=args.width, moe_intermediate_size=64)
    chosen = implementation(jnp.bfloat16, base.hidden_size, base.moe_intermediate_size)
    print(f"{jax.devices()[0].device_kind}, grouped matmul: {chosen.name}; ms of both passes (forward pass alone)")
    print(
        f"{'tokens':>7}{'experts':>8}{'max/mean':>9}{'jaxmoe':>16}{'TFLOP/s':>8}  peer, ratio, error of output and dX"
    )
    records = []
    numbers = ([kind(part) for part in text.split(",")] for kind, text in _axes(args))
    for tokens, experts, skew in itertools.product(*numbers):
        r = measure(base.replace(num_experts=experts), tokens, skew, peers)
        records.append(r)
        ours = f"{r['ms']:.2f} ({r['forward_ms']:.2f})"
        line = f"{tokens:>7}{experts:>8}{r['load']:>9.2f}{ours:>16}{r['tflops']:>8.0f}"
        for peer in peers:
            ms, forward, out, d_x = (r[f"{peer}: {name}"] for name in ("ms", "forward_ms", "out", "d_x"))
            line += f"  {peer} {ms:.2f} ({forward:.2f}), {ms / r['ms']:.2f}x, {out:.1e} {d_x:.1e}"
        print(line, flush=True)
    write_json(args.json, {"device": jax.devices()[0].device_kind, "records": records})


def _axes(args: Any) -> list[tuple[Any, str]]:
    return [(int, args.tokens), (int, args.experts), (float, args.skew)]


if __name__ == "__main__":
    run(main)
