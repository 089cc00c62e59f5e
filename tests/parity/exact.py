"""The float64 oracle for checkpoints of any size: one layer in memory at a time, on a CPU or a GPU, with gradients.

    python -m tests.parity.exact PLAN

The mathematics is that of `tests/oracle.py`, without casts; the tests compare the two. This one reads weights layer by
layer, multiplies expert by expert, and can be differentiated.
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from convert.adapters import load_adapter
from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.lora import LORA_TARGETS
from tests.oracle import attention_factor, inverse_frequencies
from tests.parity.batches import Batch
from tests.parity.environment import torch_device, write_environment
from tests.parity.plan import Case, Plan, read_batch, run_cases
from tests.parity.weights import Weights, in_fp8

SIDE = "exact"
_RECOMPUTE_ABOVE = 4 << 30  # bytes of expert weights in float64


@dataclass
class Exact:
    """One model; `adapters` are leaves [layers, ...] in float64 under the paths of `jaxmoe`."""

    config: Qwen3MoeConfig
    weights: Weights
    lora: LoraConfig | None = None
    adapters: Mapping[str, Tensor] | None = None
    rows_in_fp8: bool = False

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The arrays that every side writes, in float64, differentiable with respect to the adapters."""
        config, device = self.config, self.weights.device
        ids, positions, segments = (torch.from_numpy(a.astype(np.int64)).to(device) for a in batch)
        frequencies = torch.from_numpy(inverse_frequencies(config.rope_parameters, config.head_dim)).to(device)
        angles = positions[..., None].double() * frequencies
        factor = attention_factor(config.rope_parameters)
        tables = factor * angles.cos(), factor * angles.sin()
        T = ids.shape[1]
        distance = torch.arange(T, device=device)[:, None] - torch.arange(T, device=device)
        visible = (distance >= 0) & (segments[:, :, None] == segments[:, None, :])
        if config.sliding_window is not None:
            visible &= distance < config.sliding_window

        embedding = self.weights["model.embed_tokens.weight"]
        x = embedding[ids].double()
        hidden, records = [], []
        for layer in range(config.num_hidden_layers):
            hidden.append(x)
            if self._recompute():
                x, *record = checkpoint(self._layer, x, layer, tables, visible, use_reentrant=False)
            else:
                x, *record = self._layer(x, layer, tables, visible)
            records += [record] if record else []
        x = rms_norm(x, self._double("model.norm.weight"), config.rms_norm_eps)
        head = embedding if config.tie_word_embeddings else self.weights["lm_head.weight"]
        out = {"logits": x @ head.double().T, "hidden": torch.stack([*hidden, x])}
        for name, stack in zip(("router_logits", "selected", "weights"), zip(*records, strict=True), strict=False):
            out[name] = torch.stack(stack)
        if records:
            out["aux_loss"] = self._load_balancing_loss(out["router_logits"], out["selected"])
        return out

    def loss(self, batch: Batch, labels: np.ndarray, aux_coefficient: float) -> Tensor:
        """Mean cross-entropy over the tokens with a label plus the weighted load-balancing loss."""
        out = self.forward(batch)
        expected = torch.from_numpy(labels.astype(np.int64)).to(self.weights.device)
        loss = F.cross_entropy(out["logits"].flatten(0, 1), expected.flatten(), ignore_index=-100)
        return loss + aux_coefficient * out["aux_loss"] if "aux_loss" in out else loss

    def _recompute(self) -> bool:
        """Whether gradients are requested and the weights in float64 would fill the device.

        Then only one layer's weights exist at a time, in the backward pass too.
        """
        c = self.config
        size = 8 * 3 * len(c.sparse_layers) * c.num_experts * c.moe_intermediate_size * c.hidden_size
        return bool(self.adapters) and torch.is_grad_enabled() and size > _RECOMPUTE_ABOVE

    def _layer(self, x: Tensor, layer: int, tables: Any, visible: Tensor) -> tuple[Tensor, ...]:
        config, at = self.config, f"model.layers.{layer}"
        h = rms_norm(x, self._double(f"{at}.input_layernorm.weight"), config.rms_norm_eps)
        x = x + self._attention(h, layer, tables, visible)
        h = rms_norm(x, self._double(f"{at}.post_attention_layernorm.weight"), config.rms_norm_eps)
        if layer in config.dense_layers:
            slot = config.dense_layers.index(layer)
            gate, up = (self._linear(h, f"{at}.mlp.{n}_proj", f"{n}_proj", slot) for n in ("gate", "up"))
            return (x + self._linear(F.silu(gate) * up, f"{at}.mlp.down_proj", "down_proj", slot),)
        slot = config.sparse_layers.index(layer)
        logits = self._linear(h, f"{at}.mlp.gate", "gate", slot)
        probabilities = logits.softmax(-1)
        weights, selected = probabilities.sort(dim=-1, descending=True, stable=True)
        weights, selected = (t[..., : config.num_experts_per_tok] for t in (weights, selected))
        if config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        flat, experts, shares = (t.flatten(0, 1) for t in (h, selected, weights))
        out = self._experts(flat, experts, shares, layer, slot)
        return x + out.view(x.shape), logits, selected, weights

    def _attention(self, h: Tensor, layer: int, tables: tuple[Tensor, Tensor], visible: Tensor) -> Tensor:
        config, at = self.config, f"model.layers.{layer}.self_attn"
        B, T, _ = h.shape
        query, key, value = (
            self._linear(h, f"{at}.{n}_proj", f"{n}_proj", layer).view(B, T, -1, config.head_dim) for n in "qkv"
        )
        query = rotate(rms_norm(query, self._double(f"{at}.q_norm.weight"), config.rms_norm_eps), *tables)
        key = rotate(rms_norm(key, self._double(f"{at}.k_norm.weight"), config.rms_norm_eps), *tables)
        group = config.num_attention_heads // config.num_key_value_heads
        key, value = (t.repeat_interleave(group, dim=2) for t in (key, value))
        scores = torch.einsum("btnh,bsnh->bnts", query, key) / math.sqrt(config.head_dim)
        scores = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
        heads = torch.einsum("bnts,bsnh->btnh", scores, value)
        return self._linear(heads.reshape(B, T, -1), f"{at}.o_proj", "o_proj", layer)

    def _experts(self, h: Tensor, selected: Tensor, weights: Tensor, layer: int, slot: int) -> Tensor:
        """Each expert over the tokens that chose it, [M, D] -> [M, D]."""
        gate_up, down = self.weights.experts(layer, self.config.num_experts)
        out = torch.zeros_like(h)
        for expert in selected.unique().tolist():
            token, place = torch.where(selected == expert)
            own = self._rows(h[token])
            both = own @ gate_up[expert].double().T + self._delta(own, "experts.gate_up_proj", (slot, expert))
            gate, up = both.chunk(2, dim=-1)
            product = self._rows(F.silu(gate) * up)
            rows = product @ down[expert].double().T + self._delta(product, "experts.down_proj", (slot, expert))
            out = out.index_add(0, token, rows * weights[token, place, None])
        return out

    def _rows(self, x: Tensor) -> Tensor:
        """Rows as the experts multiply them."""
        return in_fp8(x) if self.rows_in_fp8 else x

    def _linear(self, x: Tensor, module: str, target: str, slot: int) -> Tensor:
        y = x @ self._double(f"{module}.weight").T + self._delta(x, target, (slot,))
        return y + self._double(f"{module}.bias") if f"{module}.bias" in self.weights else y

    def _delta(self, x: Tensor, target: str, index: tuple[int, ...]) -> Tensor | float:
        """What the adapter of `target` adds to a product with `x`."""
        path = LORA_TARGETS[target].path
        if self.lora is None or self.adapters is None or f"{path}.lora_A" not in self.adapters:
            return 0.0
        a, b = (self.adapters[f"{path}.lora_{side}"][index] for side in "AB")
        return self.lora.scale(target) * (x @ a.T) @ b.T

    def _double(self, key: str) -> Tensor:
        return self.weights[key].double()

    def _load_balancing_loss(self, logits: Tensor, selected: Tensor) -> Tensor:
        E = self.config.num_experts
        share = torch.bincount(selected.flatten(), minlength=E).double() / selected[..., 0].numel()
        return E * (share * logits.softmax(-1).flatten(0, -2).mean(0)).sum()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of [B, T, heads, H]: component i turns with component i + H/2."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def run_case(plan: Plan, case: Case) -> None:
    """Writes the oracle's arrays of one case; the other sides are pinned to the experts of its free run."""
    device = torch_device(plan.device)
    config = Qwen3MoeConfig.from_pretrained(case.checkpoint)
    weights = Weights(case.quantized or case.checkpoint, getattr(torch, case.dtype), device)
    lora = adapters = None
    if case.adapter:
        lora, arrays = load_adapter(case.adapter, config)
        adapters = {p: torch.from_numpy(a).to(device).double() for p, a in arrays.items()}
    batch = read_batch(case.batch)
    exact = Exact(config, weights, lora, adapters, case.rows_in_fp8)
    with torch.no_grad():
        plan.save(case, SIDE, "free", {name: a.cpu().numpy() for name, a in exact.forward(batch).items()})
    if "gradients" in case.runs:
        assert adapters is not None, f"{case.name}: expected an adapter for gradients"
        for leaf in adapters.values():
            leaf.requires_grad_()
        for draw, run in enumerate(case.gradient_runs):
            loss = exact.loss(batch, batch.labels_of(draw, case.draws), case.aux_coefficient)
            gradients = torch.autograd.grad(loss, list(adapters.values()))
            out = {"loss": np.asarray(loss.item())}
            out |= {f"gradient.{path}": g.cpu().numpy() for path, g in zip(adapters, gradients, strict=True)}
            plan.save(case, SIDE, run, out)


def main() -> int:
    """Runs every case of a plan."""
    plan = Plan.read(pathlib.Path(sys.argv[1]))
    failed = run_cases(plan, SIDE, lambda case: run_case(plan, case))
    write_environment(plan, SIDE)
    return failed


if __name__ == "__main__":
    sys.exit(main())
