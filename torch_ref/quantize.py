"""4-bit weights as bitsandbytes stores them, for linear maps and for whole expert stacks.

NF4 (Dettmers et al. 2023): blocks of 64 values, two codes to a byte; the maxima of the blocks are quantised to 8 bits.
The backward pass gets the packed weight; the 16-bit weight exists only while a product needs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_ref import kernels
from torch_ref.experts import grouped_matmul, mixture, transformers_implementation

# bitsandbytes annotates nearly every field of its classes as None
State = Any
QuantState: Any = bitsandbytes.functional.QuantState
Params4bit: Any = bnb.nn.modules.Params4bit
dequantize_4bit = bitsandbytes.functional.dequantize_4bit
get_4bit_type = bitsandbytes.functional.get_4bit_type

_NESTED_BLOCK = 256  # maxima that share one maximum


class _FrozenLinear(torch.autograd.Function):
    """X W^T for a W that is decoded in the forward pass, and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.weight(grads[0].dtype), None


class _FrozenGroupedLinear(torch.autograd.Function):
    """The same for rows sorted by expert and a stack of weights."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ends: Tensor, weight: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(ends)
        return grouped_matmul(rows, weight(rows.dtype).transpose(-2, -1), ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (ends,) = ctx.saved_tensors
        return grouped_matmul(grads[0].contiguous(), ctx.weight(grads[0].dtype), ends), None, None


class Linear4bit(bnb.nn.modules.Linear4bit):
    """bitsandbytes' linear map, computed as one product with the weight decoded into the input's dtype.

    bitsandbytes' own forward repacks the weight on some CPUs, which changes the results.
    """

    @classmethod
    def packed(cls, packed: Tensor, state: State, bias: nn.Parameter | None) -> Linear4bit:
        """The module of existing codes and statistics."""
        out, inner = state.shape
        with torch.device("meta"):
            self = cls(inner, out, bias=False, compress_statistics=state.nested, quant_type=state.quant_type)
        weight = Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            bnb_quantized=True,
            module=self,
        )
        self.weight = weight
        self.quant_state = state
        self.bias = bias
        self.compute_dtype = state.dtype
        self.compute_type_is_set = True
        return self

    @property
    def packed_shapes(self) -> dict[str, torch.Size]:
        """The unpacked shape of each packed parameter."""
        return {"weight": torch.Size((self.out_features, self.in_features))}

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], decoded in float32 and rounded to `dtype` once."""
        weight: Any = self.weight
        return decode(weight.data, weight.quant_state, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """X W^T + bias in x's dtype."""
        y = _FrozenLinear.apply(x, self.dequantized)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def quantize(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, State]:
    """NF4 codes with doubly quantised statistics; `dtype` is what the weight decodes to.

    The encoder gets float32, because it divides by the block's maximum in the dtype of its input.
    """
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight.float().contiguous(), compress_statistics=True, quant_type="nf4"
    )
    state.dtype = dtype
    return packed, state


def same_form(one: State, other: State) -> bool:
    """Whether one stack may hold weights of both statistics; its maxima are those of bitsandbytes."""
    if (one.blocksize, one.quant_type, one.nested) != (other.blocksize, other.quant_type, other.nested):
        return False
    if not one.nested:
        return True
    return one.state2.blocksize == _NESTED_BLOCK and torch.equal(one.state2.code, other.state2.code)


def decode(packed: Tensor, state: State, dtype: torch.dtype) -> Tensor:
    """The tensor of codes and statistics, decoded in float32 and rounded to `dtype` once.

    It is decoded as a vector: on CPUs bitsandbytes 0.50 decodes a matrix wrongly if its rows are not whole blocks.
    """
    second = state.state2 if state.nested else None
    if _unsupported(packed, state.quant_type, second.blocksize if second is not None else _NESTED_BLOCK) is None:
        values = kernels.decode_4bit(
            packed.view(1, -1),
            state.absmax.view(1, -1),
            None if second is None else second.absmax.view(1, -1),
            state.offset.view(1) if state.nested else None,
            None if second is None else second.code,
            _nf4_values(packed.device),
            state.blocksize,
            dtype,
        )
        return values[0, : state.shape.numel()].view(state.shape)
    absmax = state.absmax
    if state.nested:
        absmax = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return _decode(packed, absmax, state.shape, state.blocksize, state.quant_type, dtype)


def _unsupported(codes: Tensor, quant_type: str, nested_block: int = _NESTED_BLOCK) -> str | None:
    """Why `kernels.decode_4bit` cannot decode `codes`; None if it can, to the bits of bitsandbytes' several kernels."""
    if quant_type != "nf4":
        return f"expected nf4, found {quant_type}"
    if nested_block != _NESTED_BLOCK:
        return f"expected {_NESTED_BLOCK} maxima to share one maximum, found {nested_block}"
    return kernels.unsupported(codes)


@functools.cache
def _nf4_values(device: torch.device) -> Tensor:
    """The values of the 16 codes."""
    return get_4bit_type("nf4", device=device)


def _decode(
    packed: Tensor, absmax: Tensor, shape: torch.Size, blocksize: int, quant_type: str, dtype: torch.dtype
) -> Tensor:
    flat = QuantState(
        absmax.flatten(), torch.Size((shape.numel(),)), blocksize=blocksize, quant_type=quant_type, dtype=dtype
    )
    return dequantize_4bit(packed.reshape(-1, 1), flat).view(shape)


@dataclass
class PackedStack:
    """The weights [E, out, in] of one projection of all experts, with every part of every expert quantised separately.

    A part is a matrix with its own key on disk: gate and up of an expert are two parts of one stack.

    Attributes:
        codes: uint8 [E, parts, bytes]; each part is padded to whole blocks.
        absmax: the maxima of the blocks [E, parts, blocks]: 8-bit codes if there is `nested_absmax`, else float32.
        nested_absmax: float32 [E, parts, ceil(blocks / 256)].
        offset: float32 [E, parts], the mean that was subtracted from the maxima.
        nested_quant_map: float32 [256], the values of absmax's codes.
        shape: (E, out, in).
        blocksize: number of values in a block.
        quant_type: nf4 or fp4.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    nested_quant_map: Tensor | None
    shape: torch.Size
    blocksize: int
    quant_type: str

    @classmethod
    def from_parts(cls, parts: Iterator[tuple[int, int, Tensor, State]], shape: torch.Size) -> PackedStack:
        """Gathers (expert, part, codes, statistics) of one form in any order; `shape` is (E, out, in)."""
        self: PackedStack | None = None
        for expert, part, packed, state in parts:
            if self is None:
                self = cls._empty(packed.device, state, shape)
            self.codes[expert, part, : packed.numel()] = packed.flatten()
            self.absmax[expert, part] = state.absmax
            if self.nested_absmax is not None:
                assert self.offset is not None
                self.nested_absmax[expert, part] = state.state2.absmax
                self.offset[expert, part] = state.offset
        assert self is not None
        return self

    @classmethod
    def _empty(cls, device: torch.device, state: State, shape: torch.Size) -> PackedStack:
        experts, out, inner = shape
        rows, _ = state.shape
        parts, blocks = out // rows, -(-rows * inner // state.blocksize)

        def zeros(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(experts, parts, *size, dtype=dtype, device=device)

        return cls(
            codes=zeros(blocks * state.blocksize // 2, dtype=torch.uint8),
            absmax=zeros(blocks, dtype=state.absmax.dtype),
            nested_absmax=zeros(-(-blocks // _NESTED_BLOCK)) if state.nested else None,
            offset=zeros() if state.nested else None,
            nested_quant_map=state.state2.code if state.nested else None,
            shape=shape,
            blocksize=state.blocksize,
            quant_type=state.quant_type,
        )

    @property
    def nested(self) -> bool:
        """Whether the maxima of the blocks are quantised too."""
        return self.nested_absmax is not None

    @property
    def parts(self) -> int:
        """Matrices per expert."""
        return self.codes.shape[1]

    def to(self, device: torch.device) -> None:
        """Moves codes and statistics to `device`; their dtypes stay."""
        for name in ("codes", "absmax", "nested_absmax", "offset", "nested_quant_map"):
            tensor = getattr(self, name)
            if tensor is not None:
                setattr(self, name, tensor.to(device))

    def select(self, experts: Tensor | slice) -> PackedStack:
        """The stack of some experts, in the order of `experts`; an expert may occur more than once."""

        def pick(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[experts]

        codes = self.codes[experts]
        return PackedStack(
            codes,
            self.absmax[experts],
            pick(self.nested_absmax),
            pick(self.offset),
            self.nested_quant_map,
            torch.Size((len(codes), *self.shape[1:])),
            self.blocksize,
            self.quant_type,
        )

    def maxima(self) -> Tensor:
        """The maxima of the blocks in float32, [E, parts, blocks]."""
        if self.nested_absmax is None:
            return self.absmax
        assert self.nested_quant_map is not None and self.offset is not None
        scale = self.nested_absmax.repeat_interleave(_NESTED_BLOCK, -1)[..., : self.absmax.shape[-1]]
        return self.nested_quant_map[self.absmax.int()] * scale + self.offset[..., None]

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weights [E, out, in], decoded in float32 and rounded to `dtype` once."""
        experts, out, inner = self.shape
        filled = torch.Size((experts, self.parts, self.codes.shape[-1] * 2))
        if _unsupported(self.codes, self.quant_type) is None:
            values = self._decoded_by_kernel(dtype).view(filled)
        else:
            values = _decode(self.codes, self.maxima(), filled, self.blocksize, self.quant_type, dtype)
        return values[..., : out // self.parts * inner].reshape(self.shape)

    def _decoded_by_kernel(self, dtype: torch.dtype) -> Tensor:
        return kernels.decode_4bit(
            self.codes.flatten(0, 1),
            self.absmax.flatten(0, 1),
            None if self.nested_absmax is None else self.nested_absmax.flatten(0, 1),
            None if self.offset is None else self.offset.flatten(),
            self.nested_quant_map,
            _nf4_values(self.codes.device),
            self.blocksize,
            dtype,
        )

    def linear(self, x: Tensor, expert: int) -> Tensor:
        """X W[expert]^T."""
        one = self.select(slice(expert, expert + 1))
        return _FrozenLinear.apply(x, lambda dtype: one.dequantized(dtype)[0])

    def grouped_linear(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W^T; with fewer rows than experts, only the needed experts are decoded."""
        if len(rows) < self.shape[0]:
            ends = torch.arange(1, len(rows) + 1, dtype=torch.int32, device=rows.device)
            return _FrozenGroupedLinear.apply(rows, ends, self.select(experts).dequantized)
        return _FrozenGroupedLinear.apply(rows, ends, self.dequantized)

    def grouped_transposed(self, rows: Tensor, ends: Tensor, experts: Tensor) -> Tensor:
        """Each row times its expert's W."""
        if len(rows) < self.shape[0]:
            ends = torch.arange(1, len(rows) + 1, dtype=torch.int32, device=rows.device)
            return grouped_matmul(rows, self.select(experts).dequantized(rows.dtype), ends)
        return grouped_matmul(rows, self.dequantized(rows.dtype), ends)

    @property
    def frozen(self) -> bool:
        """True, because codes have no gradient."""
        return True

    def states(self, expert: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, State]]:
        """Yields codes and statistics of each part of one expert, as bitsandbytes makes them for a single matrix."""
        _, out, inner = self.shape
        rows = out // self.parts
        code = get_4bit_type(self.quant_type, device=self.codes.device)
        for part in range(self.parts):
            state2 = offset = None
            if self.nested_absmax is not None:
                assert self.nested_quant_map is not None and self.offset is not None
                nested_absmax = self.nested_absmax[expert, part]
                nested_map = self.nested_quant_map
                state2 = QuantState(nested_absmax, code=nested_map, blocksize=_NESTED_BLOCK, dtype=torch.float32)
                offset = self.offset[expert, part]
            yield (
                self.codes[expert, part, : -(-rows * inner // 2), None],
                QuantState(
                    self.absmax[expert, part],
                    shape=torch.Size((rows, inner)),
                    code=code,
                    blocksize=self.blocksize,
                    quant_type=self.quant_type,
                    dtype=dtype,
                    offset=offset,
                    state2=state2,
                ),
            )


class Experts4bit(nn.Module):
    """The experts of one layer in 4 bit; it replaces transformers' `Qwen3MoeExperts`.

    The codes are parameters with the names of the stacks, where PEFT finds them. The statistics are not buffers: a cast
    of the model to another dtype must not change them.
    """

    def __init__(
        self,
        gate_up_proj: PackedStack,
        down_proj: PackedStack,
        act_fn: Callable[[Tensor], Tensor],
        dtype: torch.dtype,
        config: Any = None,
    ) -> None:
        super().__init__()
        self.config = config  # its experts_implementation is honoured
        self._stacks = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        self.gate_up_proj = nn.Parameter(gate_up_proj.codes, requires_grad=False)
        self.down_proj = nn.Parameter(down_proj.codes, requires_grad=False)
        self.act_fn = act_fn
        self.num_experts = gate_up_proj.shape[0]
        self.dtype = dtype
        self.is_transposed = False  # read by PEFT: the stacks are [E, out, in]

    @property
    def packed_shapes(self) -> Mapping[str, torch.Size]:
        """The unpacked shape of each packed parameter."""
        return {name: stack.shape for name, stack in self._stacks.items()}

    def stack(self, name: str) -> PackedStack:
        """The packed stack `name`, gate_up_proj or down_proj."""
        return self._stacks[name]

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, temp_up: Tensor | None = None
    ) -> Tensor:
        """As `Qwen3MoeExperts.forward`: [M, D], [M, k], [M, k] -> [M, D]; called by transformers' own block too.

        Raises:
            ValueError: an implementation that cannot read 4-bit weights.
        """
        refused = transformers_implementation(self)
        if refused is not None:
            raise ValueError(f"experts_implementation: expected eager or grouped_mm for 4-bit experts, found {refused}")
        return mixture(self, hidden_states, top_k_index, top_k_weights, temp_up=temp_up)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Experts4bit:
        super()._apply(fn, recurse)
        for name, stack in self._stacks.items():
            parameter = getattr(self, name)
            stack.to(parameter.device)
            parameter.data = stack.codes  # so that the codes exist once
        return self
