"""The routed experts, in two implementations that are chosen by name and agree up to rounding.

`loop` is the simple one: a one-hot mask, one expert after the other, `index_add` into float32. `grouped` sorts the
rows by expert and gives each projection to torch's grouped matmul; none of its own steps waits for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from torch_ref import kernels
from torch_ref.derivatives import exported, once_differentiable, traced, transformed
from torch_ref.low_rank import fold, split_high_low, unfold

_ALIGNMENT = 16  # bytes: torch's grouped matmul needs the stride of every operand to be a multiple of it
_FEW_ROWS = 128  # of decoding; more would take gigabytes for a copy of the weights for each row


@dataclass(frozen=True)
class ExpertAdapter:
    """LoRA on one stack: A [E, r, in], B [E, out, r], the factor on their product, and the dropout before A."""

    lora_A: Tensor
    lora_B: Tensor
    scale: float
    dropout: nn.Module

    @property
    def rank(self) -> int:
        """The width r of the low-rank rows."""
        return self.lora_A.shape[1]


@runtime_checkable
class Stack(Protocol):
    """The weights [E, out, in] of one projection of all experts, in 16 or in 4 bit."""

    @property
    def shape(self) -> torch.Size:
        """(E, out, in)."""
        ...

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """X W[expert]^T."""
        ...

    def grouped_linear(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W^T; `ends` [E] are the groups' ends, `experts` [R] the expert of each row."""
        ...

    def grouped_transposed(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W."""
        ...

    @property
    def frozen(self) -> bool:
        """Whether the weights need no gradient."""
        ...


@dataclass(frozen=True)
class DenseStack:
    """A stack that is one tensor [E, out, in], trainable or not."""

    weight: Tensor

    @property
    def shape(self) -> torch.Size:
        """(E, out, in)."""
        return self.weight.shape

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """X W[expert]^T."""
        return F.linear(x, self.weight[expert])

    def grouped_linear(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W^T."""
        return grouped_matmul(rows, self.weight.transpose(-2, -1), ends)

    def grouped_transposed(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W."""
        return grouped_matmul(rows, self.weight, ends)

    @property
    def frozen(self) -> bool:
        """Whether the weights need no gradient."""
        return not self.weight.requires_grad


@dataclass(frozen=True)
class Projection:
    """A stack and the adapters that are active on it."""

    stack: Stack
    adapters: Sequence[ExpertAdapter] = ()

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """X W[expert]^T plus every adapter's scale (x A^T) B^T, in x's dtype."""
        y = self.stack.linear(x, expert)
        for adapter in self.adapters:
            a, b = (split_high_low(half[expert], x.dtype, d) for d, half in enumerate((adapter.lora_A, adapter.lora_B)))
            low = fold(F.linear(adapter.dropout(x), a), adapter.rank)
            y = y + adapter.scale * F.linear(unfold(low, b.shape[1]), b)
        return y

    def grouped_linear(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """The same for rows that are sorted by expert, in x's dtype."""
        y = self.stack.grouped_linear(rows, ends, experts)
        for adapter in self.adapters:
            a, b = _aligned(adapter.lora_A, adapter.lora_B, rows.dtype)
            low = fold(grouped_matmul(adapter.dropout(rows), a.transpose(-2, -1), ends), adapter.rank)
            y = y + adapter.scale * grouped_matmul(unfold(low, b.shape[2]), b.transpose(-2, -1), ends)
        return y


def _aligned(lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The parts of A and B in `dtype`, their rank padded with zeros to a size that the grouped matmul takes."""
    a, b = split_high_low(lora_a, dtype, 1), split_high_low(lora_b, dtype, 2)
    pad = -a.shape[1] % (_ALIGNMENT // dtype.itemsize)
    a, b = (F.pad(a, (0, 0, 0, pad)), F.pad(b, (0, pad))) if pad else (a, b.contiguous())
    return (_in_order(a), _in_order(b)) if torch.compiler.is_compiling() else (a, b)


@torch.library.custom_op("torch_ref::in_order", mutates_args=(), schema="(Tensor weights) -> Tensor")
def _in_order(weights: Tensor) -> Tensor:
    """A contiguous copy, also in compiled code.

    The compiler chooses the strides of what its own kernels write, even after `contiguous()`. Experts that lie side by
    side in memory are strides that `grouped_mm` refuses.
    """
    return weights.clone(memory_format=torch.contiguous_format)


@_in_order.register_fake
def _(weights: Tensor) -> Tensor:
    return torch.empty_like(weights, memory_format=torch.contiguous_format)


_in_order.register_autograd(lambda ctx, gradient: gradient)


def unsupported(sizes: Iterable[int], dtype: torch.dtype) -> str | None:
    """Why `grouped_matmul` cannot multiply weights of these inner and outer sizes in `dtype`; None if it can."""
    if not hasattr(F, "grouped_mm"):
        return f"needs torch.nn.functional.grouped_mm, which torch {torch.__version__} lacks"
    for size in sizes:
        if size * dtype.itemsize % _ALIGNMENT:
            return f"expects sizes that are multiples of {_ALIGNMENT} bytes, found {size} x {dtype}"
    return None


def grouped_matmul(
    rows: Float[Tensor, "R inner"], weights: Float[Tensor, "E inner out"], ends: Int[Tensor, " E"]
) -> Float[Tensor, "R out"]:
    """Rows ends[e-1]:ends[e] times weights[e], for every e; differentiable in rows and weights.

    Source: `torch.nn.functional.grouped_mm`. On a CPU and on GPUs before Hopper torch runs one product per expert.

    Raises:
        ValueError: torch lacks the function, or an inner or outer size is not a multiple of 16 bytes.
    """
    reason = unsupported(weights.shape[1:], rows.dtype)
    if reason is not None:
        raise ValueError(f"experts_implementation: 'grouped' {reason}; use 'loop'")
    weights = weights.to(rows.dtype)
    if torch.compiler.is_compiling() and rows.dtype != torch.bfloat16:
        # the compiler has torch's function in bfloat16 only
        decoding = torch.compiler.is_dynamo_compiling() and not torch.is_grad_enabled()
        if decoding and rows.shape[0] <= _FEW_ROWS:
            return _few_rows_matmul(rows, weights, ends)
        return torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)  # the same product as an operator
    return F.grouped_mm(rows, weights, offs=ends)


def _few_rows_matmul(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """As `grouped_matmul`, with each row's weights copied; nothing waits for the GPU, as CUDA graphs demand."""
    expert = torch.searchsorted(ends, torch.arange(rows.shape[0], device=rows.device), right=True)
    return torch.bmm(rows.unsqueeze(1), weights[expert]).squeeze(1)


class _Gather(torch.autograd.Function):
    """Copies each token to its k rows; the backward pass is a gather and a sum, not a scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order // k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        return _combine(grads[0], inverse, ctx.k), None, None, None


class _Combine(torch.autograd.Function):
    """Sums each token's k rows times their weights, in float32; the backward pass is a gather as well."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, inverse)
        return _combine(rows, inverse, weights.shape[1], weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        rows, weights, order, inverse = ctx.saved_tensors
        (d_out,) = grads
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows = d_out.index_select(0, order // weights.shape[1]) * weights.flatten()[order].unsqueeze(1)
        if ctx.needs_input_grad[1]:
            per_token = rows.index_select(0, inverse).unflatten(0, weights.shape)
            d_weights = torch.bmm(per_token, d_out.unsqueeze(2)).squeeze(2)
        return d_rows, d_weights, None, None


def _gather(x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
    """Copies each token to its k rows."""
    return x.index_select(0, order // k) if transformed() else _Gather.apply(x, order, inverse, k)


def _weighted_sum(rows: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """Sums each token's k rows times their weights."""
    if transformed():
        return _combine(rows, inverse, weights.shape[1], weights)
    return _Combine.apply(rows, weights, order, inverse)


class _FrozenExperts(torch.autograd.Function):
    """All of `grouped_experts` for stacks that are not trained.

    It saves only the gate and up products for the backward pass. The rows after the down projection are not needed:
    the gradient of a routing weight is <d_out, W_down h> = <W_down^T d_out, h>.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        order: Tensor,
        inverse: Tensor,
        ends: Tensor,
        experts: Tensor,
        gate_up: Stack,
        down: Stack,
        activation: Callable[[Tensor], Tensor],
    ) -> Tensor:
        product = gate_up.grouped_linear(x.index_select(0, order // weights.shape[1]), ends, experts)
        rows = down.grouped_linear(_gated(product, activation), ends, experts)
        ctx.save_for_backward(product, weights, order, inverse, ends, experts)
        ctx.stacks, ctx.activation = (gate_up, down), activation
        return _combine(rows, inverse, weights.shape[1], weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        product, weights, order, inverse, ends, experts = ctx.saved_tensors
        gate_up, down = ctx.stacks
        k = weights.shape[1]
        d_hidden = down.grouped_transposed(
            grads[0].index_select(0, order // k), ends, experts
        )  # rows before their weights
        d_product, d_weights = _gated_backward(d_hidden, product, weights.flatten()[order], ctx.activation)
        d_rows = gate_up.grouped_transposed(d_product, ends, experts)
        return _combine(d_rows, inverse, k), d_weights[inverse].view(weights.shape), *[None] * 7


def _gated(product: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    """activation(gate) * up."""
    if _is_silu(activation) and kernels.unsupported_activations(product) is None:
        return kernels.swiglu(product)
    gate, up = product.chunk(2, dim=-1)
    return activation(gate) * up


def _gated_backward(
    d_hidden: Tensor, product: Tensor, weights: Tensor, activation: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Gradients of the product and of the weights, given the gradient of weights[r] * activation(gate) * up."""
    if _is_silu(activation) and kernels.unsupported_activations(product) is None:
        return kernels.swiglu_backward(d_hidden, product, weights)
    gate, up = (half.detach() for half in product.chunk(2, dim=-1))
    with torch.enable_grad():
        activated = activation(gate.requires_grad_())
    d_weights = torch.linalg.vecdot(d_hidden, activated.detach() * up)
    d_hidden = d_hidden * weights[:, None]
    d_product = torch.empty_like(product)
    d_gate, d_up = d_product.chunk(2, dim=-1)
    torch.mul(d_hidden, activated.detach(), out=d_up)
    d_gate.copy_(torch.autograd.grad(activated, gate, d_hidden * up)[0])
    return d_product, d_weights


def _is_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    return activation is F.silu or isinstance(activation, nn.SiLU | type(ACT2FN["silu"]))


def _combine(rows: Tensor, inverse: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """The sum of each token's k rows, times `weights` if given, in float32."""
    if kernels.unsupported_activations(rows) is None:
        return kernels.combine(rows, inverse, k, weights)
    per_token = rows.index_select(0, inverse).unflatten(0, (-1, k))
    return per_token.sum(1) if weights is None else torch.bmm(weights.unsqueeze(1), per_token).squeeze(1)


def loop_experts(
    x: Float[Tensor, "M D"],
    selected: Int[Tensor, "M k"],
    weights: Float[Tensor, "M k"],
    gate_up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
    temp_up: Float[Tensor, "R F2"] | None = None,
) -> Float[Tensor, "M D"]:
    """sum_k weight * down(activation(gate(x)) * up(x)) over each token's experts, summed in float32, in x's dtype.

    `temp_up`, [M * k, 2F], receives x W_gate_up^T of the rows, ordered by expert, then by token.
    """
    _refuse_to_compile()
    experts = gate_up.stack.shape[0]
    out = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    with torch.no_grad():
        mask = F.one_hot(selected, experts).permute(2, 0, 1)  # [E, M, k]
        hit = mask.sum((1, 2)).nonzero().flatten().tolist()
    start = 0
    for expert in hit:
        token, slot = torch.where(mask[expert])
        product = gate_up.linear(x[token], expert)
        if temp_up is not None:
            product = temp_up[start : start + len(token)].copy_(product)
            start += len(token)
        gate, up = product.chunk(2, dim=-1)
        rows = down.linear(activation(gate) * up, expert)
        out.index_add_(0, token, rows.to(out.dtype) * weights[token, slot, None].to(out.dtype))
    return out.to(x.dtype)


def _refuse_to_compile() -> None:
    """Says that `loop` cannot be traced: its shapes depend on the experts that the tokens chose.

    Compilation of parts of a graph continues after the loop; of a full graph, and an export, it stops here.
    """
    reason = "experts_implementation: 'loop' cannot be compiled as part of a full graph, nor exported; use 'grouped'"
    if exported():
        raise ValueError(reason)
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(reason)


def grouped_experts(
    x: Float[Tensor, "M D"],
    selected: Int[Tensor, "M k"],
    weights: Float[Tensor, "M k"],
    gate_up: Projection,
    down: Projection,
    activation: Callable[[Tensor], Tensor],
    temp_up: Float[Tensor, "R F2"] | None = None,
) -> Float[Tensor, "M D"]:
    """As `loop_experts`, over rows sorted by expert."""
    flat = selected.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    # bincount and repeat_interleave would wait for the GPU.
    counts = torch.zeros(gate_up.stack.shape[0], dtype=torch.int32, device=x.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32)).cumsum(0, dtype=torch.int32)
    experts = flat[order]

    frozen = gate_up.stack.frozen and down.stack.frozen and not (gate_up.adapters or down.adapters)
    # the compiler cannot trace its backward pass, and decides by itself what to save
    if frozen and temp_up is None and not traced() and not torch.is_autocast_enabled(x.device.type):
        stacks = gate_up.stack, down.stack
        return _FrozenExperts.apply(x, weights.to(x.dtype), order, inverse, ends, experts, *stacks, activation)

    rows = _gather(x, order, inverse, selected.shape[1])
    product = gate_up.grouped_linear(rows, ends, experts)
    if temp_up is not None:
        product = temp_up.copy_(product)
    gate, up = product.chunk(2, dim=-1)
    rows = down.grouped_linear(activation(gate) * up, ends, experts)
    with torch.autocast(device_type=x.device.type, enabled=False):  # so both passes run in the rows' dtype
        return _weighted_sum(rows, weights.to(rows.dtype), order, inverse)


IMPLEMENTATIONS: Mapping[str, Callable[..., Tensor]] = {"loop": loop_experts, "grouped": grouped_experts}


def mixture(
    experts: Any,
    x: Float[Tensor, "M D"],
    selected: Int[Tensor, "M k"],
    weights: Float[Tensor, "M k"],
    adapters: Mapping[str, Sequence[ExpertAdapter]] | None = None,
    temp_up: Float[Tensor, "R F2"] | None = None,
) -> Float[Tensor, "M D"]:
    """The output of an expert module for routed tokens, with `adapters` of its gate_up_proj and down_proj added.

    Raises:
        ValueError: an implementation that cannot multiply these sizes.
    """
    gate_up, down = (
        Projection(stack_of(experts, name), (adapters or {}).get(name, ())) for name in ("gate_up_proj", "down_proj")
    )
    run = implementation(experts, x, gate_up)
    return run(x, selected, weights, gate_up, down, experts.act_fn, temp_up)


def stack_of(experts: nn.Module, name: str) -> Stack:
    """The weights `name` (gate_up_proj or down_proj) of an expert module, in 16 or 4 bit."""
    stack = getattr(experts, "stack", None)
    return DenseStack(getattr(experts, name)) if stack is None else stack(name)


def transformers_implementation(experts: Any) -> str | None:
    """The implementation of transformers that must run, because the model asks for it and it is not one of ours.

    Ours stand for transformers' `eager` and `grouped_mm`.
    """
    if getattr(experts, "torch_ref_implementation", None) is not None:
        return None
    if getattr(experts, "_is_expert_parallel", False):
        return "expert parallelism"
    name = _configured(experts)
    if name == "grouped_mm":
        replaced = ALL_EXPERTS_FUNCTIONS.get(name) is not grouped_mm_experts_forward  # somebody registered another
        return name if replaced else None
    return None if name in (None, "eager") else name


def implementation(experts: Any, x: Tensor, gate_up: Projection) -> Callable[..., Tensor]:
    """What runs `experts`: the choice of `torch_ref.model.set_experts_implementation`, or of transformers' own.

    By default (and with transformers' grouped_mm) that is `grouped` where it is supported, otherwise `loop`.
    A model that torch_ref loaded takes `grouped` on CUDA and in compiled code only.
    """
    chosen = getattr(experts, "torch_ref_implementation", "model")
    if chosen in IMPLEMENTATIONS:
        return IMPLEMENTATIONS[chosen]
    if _configured(experts) == "eager":
        return IMPLEMENTATIONS["loop"]
    _, two_f, inner = gate_up.stack.shape
    wanted = chosen == "model" or x.is_cuda or torch.compiler.is_compiling()
    grouped = wanted and unsupported((two_f // 2, inner), x.dtype) is None
    return IMPLEMENTATIONS["grouped" if grouped else "loop"]


def _configured(experts: Any) -> str | None:
    return getattr(getattr(experts, "config", None), "_experts_implementation", None)
