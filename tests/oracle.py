"""Qwen3-MoE in plain float64 NumPy: the slow oracle for every fast path.

It has no casts, no batching over experts, and no code shared with `jaxmoe` except the configuration: one loop over
sequences, one over tokens and their experts. Sources: transformers `modeling_qwen3_moe.py` for the model,
Su et al. 2021 (rotary embedding), Peng et al. 2023 (yarn), Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxmoe.config import LoraConfig, Qwen3MoeConfig, RopeParameters

Array = NDArray[np.float64]
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class OracleOutput:
    """The results of one forward pass; entries of padding (segment 0) are zero.

    Attributes:
        logits: [B, T, V].
        hidden: [L + 1, B, T, D]: the input of every layer, then the output of the final norm.
        router_logits: [Ls, B, T, E], one entry per sparse layer.
        selected: [Ls, B, T, k] expert indices, most probable first.
    """

    logits: Array
    hidden: Array
    router_logits: Array
    selected: NDArray[np.int64]


def forward(
    config: Qwen3MoeConfig,
    params: Arrays,
    input_ids: NDArray[np.integer],
    position_ids: NDArray[np.integer] | None = None,
    segment_ids: NDArray[np.integer] | None = None,
    *,
    adapters: Arrays | None = None,
    lora: LoraConfig | None = None,
    pinned: NDArray[np.integer] | None = None,
) -> OracleOutput:
    """The forward pass over `input_ids` [B, T]; `params` and `adapters` are flat dictionaries of stacked arrays.

    Segment 0 is padding; a token attends to earlier tokens of its own segment. `pinned` [Ls, B, T, k] replaces the
    choice of experts, not their weights, so that two runs can be compared even if they differ in a near-tie.
    """
    B, T = input_ids.shape
    positions = np.tile(np.arange(T), (B, 1)) if position_ids is None else position_ids
    segments = np.ones((B, T), np.int64) if segment_ids is None else segment_ids
    weights = {path: np.asarray(array, np.float64) for path, array in merge(params, adapters or {}, lora).items()}
    sparse, dense = config.sparse_layers, config.dense_layers
    L, E, k = config.num_hidden_layers, config.num_experts, config.num_experts_per_tok
    head = weights["embed_tokens"] if config.tie_word_embeddings else weights["lm_head"]
    out = OracleOutput(
        logits=np.zeros((B, T, config.vocab_size)),
        hidden=np.zeros((L + 1, B, T, config.hidden_size)),
        router_logits=np.zeros((len(sparse), B, T, E)),
        selected=np.zeros((len(sparse), B, T, k if sparse else 0), np.int64),
    )
    for b in range(B):
        for segment in sorted(set(segments[b].tolist()) - {0}):
            at = np.flatnonzero(segments[b] == segment)
            x = weights["embed_tokens"][input_ids[b, at]]
            angles = np.outer(positions[b, at], inverse_frequencies(config.rope_parameters, config.head_dim))
            for layer in range(L):
                out.hidden[layer, b, at] = x
                p = {name.split(".")[1]: w[layer] for name, w in weights.items() if name.startswith("attention.")}
                h = rms_norm(x, p["input_layernorm"], config.rms_norm_eps)
                x = x + attention(config, p, h, at, angles)
                h = rms_norm(x, p["post_attention_layernorm"], config.rms_norm_eps)
                if layer in dense:
                    slot = dense.index(layer)
                    x = x + swiglu(h, *(weights[f"dense.{name}_proj"][slot] for name in ("gate", "up", "down")))
                    continue
                slot = sparse.index(layer)
                logits = h @ weights["sparse.gate"][slot].T
                chosen = top_k(logits, k) if pinned is None else pinned[slot, b, at]
                out.router_logits[slot, b, at], out.selected[slot, b, at] = logits, chosen
                x = x + experts(config, weights, slot, h, softmax(logits), chosen)
            out.hidden[L, b, at] = rms_norm(x, weights["norm"], config.rms_norm_eps)
            out.logits[b, at] = out.hidden[L, b, at] @ head.T
    return out


def attention(
    config: Qwen3MoeConfig, p: Mapping[str, Array], h: Array, at: NDArray[np.integer], angles: Array
) -> Array:
    """Causal grouped-query attention of one document [T, D]; `at` are its columns in the batch, in which a sliding
    window is measured."""
    H, group = config.head_dim, config.num_attention_heads // config.num_key_value_heads

    def project(name: str) -> Array:
        return (h @ p[f"{name}_proj"].T + p.get(f"{name}_proj_bias", 0.0)).reshape(len(h), -1, H)

    factor = attention_factor(config.rope_parameters)
    query = rotate(rms_norm(project("q"), p["q_norm"], config.rms_norm_eps), angles, factor)
    key = rotate(rms_norm(project("k"), p["k_norm"], config.rms_norm_eps), angles, factor)
    value = project("v")
    distance = at[:, None] - at[None, :]
    visible = distance >= 0
    if config.sliding_window is not None:
        visible &= distance < config.sliding_window
    heads = np.zeros_like(query)
    for n in range(config.num_attention_heads):
        scores = query[:, n] @ key[:, n // group].T / math.sqrt(H)
        heads[:, n] = softmax(np.where(visible, scores, -np.inf)) @ value[:, n // group]
    return heads.reshape(len(h), -1) @ p["o_proj"].T + p.get("o_proj_bias", 0.0)


def experts(
    config: Qwen3MoeConfig,
    weights: Mapping[str, Array],
    slot: int,
    h: Array,
    probabilities: Array,
    chosen: NDArray[np.integer],
) -> Array:
    """Each token through each expert that it chose, weighted by the router's probabilities."""
    F = config.moe_intermediate_size
    out = np.zeros_like(h)
    for t in range(len(h)):
        weight = probabilities[t, chosen[t]]
        if config.norm_topk_prob:
            weight = weight / weight.sum()
        for e, w in zip(chosen[t], weight, strict=True):
            gate_up, down = weights["sparse.gate_up_proj"][slot, e], weights["sparse.down_proj"][slot, e]
            out[t] += w * swiglu(h[t], gate_up[:F], gate_up[F:], down)
    return out


def swiglu(h: Array, gate: Array, up: Array, down: Array) -> Array:
    """down(silu(gate(h)) * up(h)), Shazeer 2020."""
    g = h @ gate.T
    return (g / (1 + np.exp(-g)) * (h @ up.T)) @ down.T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm over the last axis, Zhang and Sennrich 2019."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def top_k(logits: Array, k: int) -> NDArray[np.int64]:
    """Indices of the k largest entries, largest first; exact ties go to the lowest index."""
    return np.argsort(-logits, axis=-1, kind="stable")[..., :k]


def top_k_margin(router_logits: np.ndarray, k: int) -> Array:
    """Probability of the last chosen expert minus that of the first one left out; infinite if all are chosen."""
    probabilities = -np.sort(-softmax(np.asarray(router_logits, np.float64)), axis=-1)
    if k == probabilities.shape[-1]:
        return np.full(probabilities.shape[:-1], np.inf)
    return probabilities[..., k - 1] - probabilities[..., k]


def load_balancing_loss(
    router_logits: np.ndarray, selected: NDArray[np.integer], valid: NDArray[np.bool_] | None = None
) -> float:
    """E * sum_e (rows of e / n) * (probability of e / n) over all sparse layers and valid tokens [B, T] together.

    Source: Fedus et al. 2021, equations 4 to 6, pooled over layers as transformers' `load_balancing_loss_func`.
    """
    Ls, B, T, E = router_logits.shape
    valid = np.ones((B, T), bool) if valid is None else valid
    n = Ls * valid.sum()
    rows = np.bincount(selected[:, valid].ravel(), minlength=E) / n
    return float(E * rows @ softmax(np.asarray(router_logits, np.float64))[:, valid].sum(axis=(0, 1)) / n)


def rotate(x: Array, angles: Array, factor: float) -> Array:
    """Rotary embedding of [T, heads, H]: components i and i + H/2 are rotated by the token's i-th angle."""
    half = x.shape[-1] // 2
    cos, sin = factor * np.cos(angles)[:, None, :], factor * np.sin(angles)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def inverse_frequencies(rope: RopeParameters, head_dim: int) -> Array:
    """Radians per position of each of the H/2 pairs."""
    base = float(rope.rope_theta)
    plain = base ** (-2 * np.arange(head_dim // 2) / head_dim)
    if rope.rope_type == "default":
        return plain
    assert rope.factor is not None
    if rope.rope_type == "linear":
        return plain / rope.factor
    # yarn: pairs that turn more than beta_fast times within the trained context keep their frequency, pairs that turn
    # less than beta_slow times are interpolated, and those between are blended linearly in the index of the pair.
    context = rope.original_max_position_embeddings
    assert rope.rope_type == "yarn" and context is not None

    def index_of_pair_that_turns(times: float) -> float:
        # context * base ** (-2 i / H) = 2 pi times, solved for i
        return head_dim * math.log(context / (2 * math.pi * times)) / (2 * math.log(base))

    low = index_of_pair_that_turns(32.0 if rope.beta_fast is None else rope.beta_fast)
    high = index_of_pair_that_turns(1.0 if rope.beta_slow is None else rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    interpolated = np.clip((np.arange(head_dim // 2) - low) / width, 0, 1)
    return plain * (1 - interpolated) + plain / rope.factor * interpolated


def attention_factor(rope: RopeParameters) -> float:
    """The factor of cos and sin in yarn: 0.1 ln(factor) + 1 unless the configuration says otherwise."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    assert rope.factor is not None
    log = math.log(rope.factor) if rope.factor > 1 else 0.0
    if rope.mscale and rope.mscale_all_dim:
        return (0.1 * rope.mscale * log + 1) / (0.1 * rope.mscale_all_dim * log + 1)
    return 0.1 * log + 1


def merge(params: Arrays, adapters: Arrays, lora: LoraConfig | None) -> dict[str, np.ndarray]:
    """The weights with scale * B @ A added in float64 to each that has adapters."""
    merged = dict(params)
    for path in adapters:
        if not path.endswith(".lora_A"):
            continue
        assert lora is not None
        base = path.removesuffix(".lora_A")
        stack, name = base.split(".")
        target = f"experts.{name}" if stack == "sparse" and name != "gate" else name
        a, b = (np.asarray(adapters[f"{base}.lora_{side}"], np.float64) for side in "AB")
        merged[base] = np.asarray(params[base], np.float64) + lora.scale(target) * (b @ a)
    return merged
