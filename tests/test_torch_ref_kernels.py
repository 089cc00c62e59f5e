"""torch_ref's Triton kernels on a GPU against their twins in plain torch and, in 4 bit, against bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen3_moe import modeling_qwen3_moe

import torch_ref.experts
import torch_ref.quantize
from tests.test_torch_ref import distance
from tests.tolerances import bound
from torch_ref import kernels
from torch_ref.experts import DenseStack, Projection, grouped_experts
from torch_ref.quantize import PackedStack

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels on, and the same numbers in every run."""
    monkeypatch.setattr(kernels, "SWITCHED_ON", True)
    torch.manual_seed(0)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).to("cuda", dtype)


def check(found: torch.Tensor, twin: torch.Tensor, exact: torch.Tensor) -> None:
    """The kernel's error against float64 is float32's rounding, or in 16 bit no larger than its twin's."""
    assert found.shape == exact.shape and found.dtype == twin.dtype and bool(found.isfinite().all())
    limit = bound("torch_ref_fp32") if found.dtype == torch.float32 else bound("torch_ref_bf16") * distance(twin, exact)
    assert distance(found, exact) <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(37, 96), (5, 768), (1, 32), (9, 300)])
def test_swiglu(rows: int, width: int, dtype: torch.dtype) -> None:
    product, weights, d_hidden = (
        draw(rows, 2 * width, dtype=dtype),
        draw(rows, dtype=dtype),
        draw(rows, width, dtype=dtype),
    )

    def twin(dtype: torch.dtype) -> list[torch.Tensor]:
        leaf, w = product.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()
        gate, up = leaf.chunk(2, -1)
        out = F.silu(gate) * up
        return [out.detach(), *torch.autograd.grad(out * w[:, None], (leaf, w), d_hidden.to(dtype))]

    found = [kernels.swiglu(product), *kernels.swiglu_backward(d_hidden, product, weights)]
    for triple in zip(found, twin(dtype), twin(torch.float64), strict=True):
        check(*triple)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("width", [48, 2048, 1500])
def test_combine(width: int, weighted: bool, dtype: torch.dtype) -> None:
    rows, inverse = draw(33, width, dtype=dtype), torch.randperm(33, device="cuda")
    weights = draw(11, 3, dtype=dtype) if weighted else None

    def twin(dtype: torch.dtype) -> torch.Tensor:
        per_token = rows.to(dtype)[inverse].view(11, 3, width)
        return (per_token if weights is None else per_token * weights.to(dtype)[..., None]).sum(1)

    check(kernels.combine(rows, inverse, 3, weights), twin(dtype), twin(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "tables", "H"), [(2, 1, 128), (2, 2, 16), (1, 1, 64)])
def test_norm_and_rotary(batch: int, tables: int, H: int, dtype: torch.dtype) -> None:
    x, d_out, weight = draw(batch, 7, 3, H, dtype=dtype), draw(batch, 7, 3, H, dtype=dtype), draw(H, dtype=dtype)
    angles = draw(tables, 7, H // 2).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def twin(dtype: torch.dtype) -> list[torch.Tensor]:
        leaf = x.to(dtype).requires_grad_()
        normed = F.rms_norm(leaf, (H,), weight.to(dtype), 1e-6)
        out, _ = modeling_qwen3_moe.apply_rotary_pos_emb(normed, normed, cos.to(dtype), sin.to(dtype), unsqueeze_dim=2)
        return [out.detach(), *torch.autograd.grad(out, leaf, d_out.to(dtype))]

    found = [
        kernels.norm_rotary(x, weight, cos, sin, 1e-6),
        kernels.norm_rotary_backward(d_out, x, weight, cos, sin, 1e-6),
    ]
    for triple in zip(found, twin(dtype), twin(torch.float64), strict=True):
        check(*triple)


def experts_of(dtype: torch.dtype, count: int = 8, D: int = 64, width: int = 48) -> list[Any]:
    """Arguments of `grouped_experts` for 50 tokens of 3 experts each."""
    selected = torch.stack([torch.randperm(count)[:3] for _ in range(50)]).cuda()
    stacks = [
        DenseStack(draw(count, 2 * width, D, dtype=dtype) / 8),
        DenseStack(draw(count, D, width, dtype=dtype) / 7),
    ]
    x, weights = draw(50, D, dtype=dtype).requires_grad_(), draw(50, 3, dtype=dtype).requires_grad_()
    return [x, selected, weights, *map(Projection, stacks), F.silu]


def results(arguments: list[Any]) -> list[torch.Tensor]:
    out = grouped_experts(*arguments)
    d_out = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, (arguments[0], arguments[2]), d_out)]


@pytest.mark.parametrize("fault", [None, "swiglu", "swiglu_backward", "combine"])
def test_experts_with_kernels_and_without(fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients; if a kernel is faulty, the test sees the difference."""
    arguments = experts_of(torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "unsupported_activations", lambda x: "switched off by the test")
        expected = results(arguments)
    if fault is not None:
        real = getattr(kernels, fault)

        def wrong(*a: Any) -> Any:
            found = real(*a)
            return (found[0].roll(1, 0), *found[1:]) if isinstance(found, tuple) else found.roll(1, 0)

        monkeypatch.setattr(kernels, fault, wrong)
    error = max(distance(*pair) for pair in zip(results(arguments), expected, strict=True))
    assert (error <= bound("torch_ref_fp32")) is (fault is None)


def forget_the_offset(patch: pytest.MonkeyPatch) -> None:
    real = kernels.decode_4bit
    patch.setattr(kernels, "decode_4bit", lambda c, a, n, offset, *rest: real(c, a, n, torch.zeros_like(offset), *rest))


def lose_the_last_bit(patch: pytest.MonkeyPatch) -> None:
    real = kernels.decode_4bit
    patch.setattr(
        kernels, "decode_4bit", lambda c, a, n, *rest: real(c, a, torch.nextafter(n, torch.full_like(n, 9)), *rest)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("shape", [(4, 2, 96, 64), (3, 1, 7, 33), (2, 2, 768, 2048)], ids=str)
def test_decoding_gives_the_bits_of_bitsandbytes(
    shape: tuple[int, int, int, int], nested: bool, dtype: torch.dtype
) -> None:
    check_decoding(shape, nested, dtype)


def check_decoding(shape: tuple[int, int, int, int], nested: bool, dtype: torch.dtype) -> None:
    bnb = torch_ref.quantize.bitsandbytes.functional
    E, parts, rows, inner = shape
    weights = draw(*shape, dtype=torch.float32) * torch.exp(draw(E, parts, rows, 1, dtype=torch.float32))
    encoded = [
        (e, p, *bnb.quantize_4bit(weights[e, p], compress_statistics=nested, quant_type="nf4"))
        for e in range(E)
        for p in range(parts)
    ]
    stack = PackedStack.from_parts(iter(encoded), torch.Size((E, parts * rows, inner)))
    found = stack.dequantized(dtype).unflatten(1, (parts, -1))
    for e, p, codes, state in encoded:
        assert torch.equal(torch_ref.quantize.decode(codes, state, dtype), found[e, p])
        state.dtype, state.shape = dtype, torch.Size((rows * inner,))
        assert torch.equal(found[e, p].flatten(), bnb.dequantize_4bit(codes, state).flatten())


@pytest.mark.parametrize("fault", [forget_the_offset, lose_the_last_bit])
def test_a_wrong_decoder_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_decoding((4, 2, 96, 64), True, torch.float32)
