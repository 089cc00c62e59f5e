"""What a step of generating text runs on an NVIDIA GPU, each kernel against XLA, and a model with all of them.

Without a GPU the kernels run in Pallas' interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.fp8.codec import E4M3
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.model.cache import KVCache, NewTokens, forward_cached
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Options
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.few_rows import GATHERED, Rows
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels import cached_attention, few_rows
from jaxmoe.ops.kernels.grouped_matmul import hopper_e4m3
from jaxmoe.ops.router import largest_by_rank
from peers.configs import config_of
from tests.parity import relative_error
from tests.row_kernels import INTERPRETED, draw, made_up_gpu
from tests.test_kernels import needs_kernels
from tests.tolerances import bound

KERNELS = ((cached_attention, "attend"), (few_rows, "products"))
GROUPS, OUT, INNER = 6, 64, 128
multiply = partial(few_rows.products, interpret=INTERPRETED)


def in_nf4(matrices: int, nested: bool, seed: int = 0) -> NF4Stack:
    """Random codes and scales; an absmax of the second quantisation counts its table's values from -1 to 1."""
    rng = np.random.default_rng(seed)
    elements = OUT * INNER // matrices
    code = lambda size: rng.integers(0, 256, (GROUPS, matrices, size), dtype=np.uint8)
    scale = lambda *shape: rng.uniform(0.5, 1.5, (GROUPS, matrices, *shape)).astype(np.float32)
    absmax = (
        code(elements // 64),
        scale(-(-elements // 64 // 256)),
        scale(),
        np.linspace(-1, 1, 256, dtype=np.float32),
    )
    parts: Any = absmax if nested else (scale(elements // 64), None, None, None)
    arrays: Any = jax.tree.map(jnp.asarray, (code(elements // 2), *parts))
    return NF4Stack(*arrays, shape=(GROUPS, OUT, INNER), dtype=jnp.dtype(jnp.bfloat16))


def in_fp8(matrices: int, out: int = OUT, inner: int = INNER) -> FP8Stack:
    """Random codes, and scales that no two blocks share."""
    rng = np.random.default_rng(0)
    codes = rng.normal(0, 60, (GROUPS, out, inner)).clip(-448, 448).astype(E4M3)
    scales = rng.uniform(1e-3, 1e-2, (GROUPS, matrices, -(-out // matrices // 128), inner // 128))
    return FP8Stack(jnp.asarray(codes), jnp.asarray(scales, jnp.float32), codes.shape, jnp.dtype(jnp.bfloat16))


STACKS: dict[str, Any] = {
    "FP8": lambda: in_fp8(2),
    "16 bit": lambda: draw(7, GROUPS, OUT, INNER).astype(jnp.bfloat16),
    "NF4": lambda: in_nf4(2, nested=False),
    "nested NF4": lambda: in_nf4(2, nested=True),
}


def chosen(tokens: int) -> Rows:
    """Three of five experts for each token, the experts of the second half of the groups."""
    experts = np.stack([np.random.default_rng(token).permutation(5)[:3] for token in range(tokens)])
    return Rows.of_experts(jnp.asarray(experts, jnp.int32), 1)


@pytest.mark.parametrize(
    ("form", "tokens"), [("16 bit", 1), ("nested NF4", 1), ("16 bit", 3), ("NF4", 30), ("FP8", 1), ("FP8", 3)]
)
def test_only_the_chosen_experts(form: str, tokens: int) -> None:
    """Thirty tokens give more rows of one expert than the kernel takes at once."""
    x, stack, rows = draw(1, tokens, INNER).astype(jnp.bfloat16), STACKS[form](), chosen(tokens)
    (expected,) = GATHERED.products(x, [stack], rows, jnp.float32)
    (found,) = multiply(x, [stack], rows, jnp.float32)
    assert relative_error(found, expected) <= bound("few_rows_fp32")
    (shifted,) = multiply(x, [stack], rows._replace(offset=rows.offset - 1), jnp.float32)
    assert relative_error(shifted, expected) > 0.1
    (expected,) = GATHERED.products(x, [stack], rows, jnp.bfloat16, swiglu=True)
    (found,) = multiply(x, [stack], rows, jnp.bfloat16, swiglu=True)
    assert relative_error(found, expected) <= bound("few_rows_bf16")


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("form", ["NF4", "nested NF4"])
def test_decoded_weights_have_the_bits_of_the_codec(form: str, tokens: int) -> None:
    """A row with a single one picks a column of the decoded matrix."""
    stack = STACKS[form]()
    x = jax.nn.one_hot(jnp.asarray([77, 50][:tokens]), INNER, dtype=jnp.bfloat16)
    for group in (0, GROUPS - 1):
        (found,) = multiply(x, [stack], Rows.of_layer(tokens, group), jnp.float32)
        expected = stack[group].astype(jnp.float32)[:, jnp.asarray([77, 50][:tokens])]
        np.testing.assert_array_equal(found, expected.T)
        assert not np.array_equal(found, stack[1].astype(jnp.float32)[:, jnp.asarray([77, 50][:tokens])].T)


@pytest.mark.parametrize("tokens", [1, 3])
def test_several_stacks_in_one_call(tokens: int) -> None:
    x, rows = draw(1, tokens, INNER).astype(jnp.bfloat16), Rows.of_layer(tokens, jnp.int32(4))
    stacks = [STACKS["nested NF4"](), in_nf4(1, nested=True, seed=1), STACKS["16 bit"]()]
    pairs = zip(multiply(x, stacks, rows, jnp.float32), GATHERED.products(x, stacks, rows, jnp.float32), strict=True)
    assert max(relative_error(*pair) for pair in pairs) <= bound("few_rows_fp32")


def test_what_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = STACKS["16 bit"]()
    assert few_rows.unsupported(jnp.bfloat16, stack, STACKS["NF4"]()) is None
    assert "found float32" in str(few_rows.unsupported(jnp.float32, stack))
    narrow = in_nf4(4, nested=False)
    assert "found 16 by 128" in str(few_rows.unsupported(jnp.bfloat16, narrow))
    assert "found 64 by 96" in str(few_rows.unsupported(jnp.bfloat16, stack[:, :, :96]))
    assert "found float16" in str(few_rows.unsupported(jnp.bfloat16, stack.astype(jnp.float16)))
    assert few_rows.unsupported(jnp.bfloat16, in_fp8(1)) is None
    made_up_gpu(monkeypatch)  # of compute capability 8.0
    assert "no instructions for FP8" in str(few_rows.unsupported(jnp.bfloat16, in_fp8(1)))


@needs_kernels
def test_how_many_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where grouped products decode FP8 in registers, they are faster with fewer rows than elsewhere."""
    monkeypatch.setattr(hopper_e4m3, "_small_case", lambda: None)
    fp8, most = in_fp8(1, out=128), few_rows.KERNEL.most_rows
    made_up_gpu(monkeypatch, (8, 9))
    assert most(fp8) == most(STACKS["16 bit"]()) == 32
    made_up_gpu(monkeypatch, (9, 0))
    assert (most(STACKS["16 bit"]()), most(STACKS["NF4"]()), most(fp8)) == (32, 32, 3)
    with forced(fp8_products="decoded"):
        assert most(fp8) == 32


def test_ranks_choose_as_top_k_does() -> None:
    scores = jnp.round(4 * draw(0, 9, 40)) / 4  # many ties
    np.testing.assert_array_equal(largest_by_rank(scores, 8), jax.lax.top_k(scores, 8)[1])
    assert int(largest_by_rank(jnp.full((1, 40), jnp.nan), 8).max()) < 40


def test_a_decoding_step_with_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states and cache of one new token per sequence, with adapters, in bfloat16."""
    batch = 3
    sizes = {
        "hidden_size": 128,
        "moe_intermediate_size": 128,
        "head_dim": 32,
        "num_hidden_layers": 2,
        "num_experts": 32,
    }
    config = config_of("plain").replace(**sizes, num_attention_heads=4, num_key_value_heads=2)
    lora = LoraConfig(r=4, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
    params = init_parameters(config, jax.random.key(0), jnp.bfloat16)
    adapters = {path: array + 0.02 for path, array in init_adapters(config, lora, jax.random.key(1)).items()}
    cache = KVCache(*(draw(key, 2, batch, 64, 2, 32).astype(jnp.bfloat16) for key in (3, 4)))
    at = jnp.arange(batch, dtype=jnp.int32) + 9
    new = NewTokens(at[:, None], at, jnp.ones_like(at))

    def step() -> Any:
        run = jax.jit(partial(forward_cached, config=config, options=Options(lora=lora)))
        traced = run.trace(params, adapters, new, cache)
        return str(traced.jaxpr).count("pallas_call"), run(params, adapters, new, cache)[:2]

    plain, expected = step()
    if INTERPRETED:
        made_up_gpu(monkeypatch)
        for module, name in KERNELS:
            monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=True))
    with forced(norm_rotary="xla", grouped_matmul="tiled", cached_attention="triton"):
        kernels, found = step()
    # projections, attention, output projection, router, gate and up, down
    assert (plain, kernels) == (0, 6)
    errors = [relative_error(*pair) for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert max(errors) <= bound("few_rows_model_bf16")
