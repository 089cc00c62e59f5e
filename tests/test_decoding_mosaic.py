"""Decoding's kernels in Mosaic GPU against XLA: products of few rows, attention over the cache, a step with both.

Without a GPU they run in JAX's interpreter, which knows no inline code: plain operations decode the weights there, and
the bits of the kernels' own decoding are tested on a GPU.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.config import LoraConfig
from jaxmoe.model.cache import KVCache, NewTokens, forward_cached
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Options
from jaxmoe.ops.cached_attention import MASKED
from jaxmoe.ops.few_rows import GATHERED, Rows
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.kernels import cached_attention_mosaic, few_rows_mosaic
from jaxmoe.ops.kernels.few_rows_mosaic import Blocks
from jaxmoe.ops.small_case import BOUND
from peers.configs import config_of
from tests.parity import relative_error
from tests.row_kernels import draw, made_up_gpu
from tests.test_ampere import path  # noqa: F401 - a fixture
from tests.test_decoding_kernels import BFLOAT16, LAYER, arguments_of, rounded
from tests.test_few_rows import GROUPS, INNER, STACKS, chosen, in_fp8, in_nf4
from tests.test_kernels import needs_kernels, on_gpu
from tests.tolerances import bound

KERNELS = ((cached_attention_mosaic, "attend"), (few_rows_mosaic, "products"))


@needs_kernels
@pytest.mark.parametrize(
    ("form", "tokens"), [("16 bit", 1), ("nested NF4", 1), ("16 bit", 3), ("NF4", 30), ("FP8", 1), ("FP8", 3)]
)
def test_only_the_chosen_experts(form: str, tokens: int, path: Any) -> None:  # noqa: F811
    """Thirty tokens give more rows of one expert than the kernel takes at once. The control: experts of another
    layer."""
    x, stack, rows = draw(1, tokens, INNER).astype(jnp.bfloat16), STACKS[form](), chosen(tokens)
    multiply = partial(few_rows_mosaic.products, x, [stack], interpret=path)
    (expected,) = GATHERED.products(x, [stack], rows, jnp.float32)
    assert relative_error(multiply(rows, jnp.float32)[0], expected) <= bound("few_rows_fp32")
    if tokens < 30:
        (shifted,) = multiply(rows._replace(offset=rows.offset - 1), jnp.float32)
        assert relative_error(shifted, expected) > 0.1
    (expected,) = GATHERED.products(x, [stack], rows, jnp.bfloat16, swiglu=True)
    assert relative_error(multiply(rows, jnp.bfloat16, swiglu=True)[0], expected) <= bound("few_rows_bf16")


@needs_kernels
@pytest.mark.parametrize("blocks", [Blocks(8, 2, 3, 128), Blocks(4, 1, 2, 512)], ids=["turns", "steps"])
def test_however_the_work_is_cut(blocks: Blocks, path: Any) -> None:  # noqa: F811
    """A program may do several tiles, and a tile several steps along the contraction."""
    inner = 384 if blocks.columns == 8 else 1024
    x, stack = draw(1, 4, inner).astype(jnp.bfloat16), draw(7, GROUPS, 32, inner).astype(jnp.bfloat16)
    rows = chosen(4)
    (found,) = few_rows_mosaic.products(x, [stack], rows, jnp.float32, blocks=blocks, interpret=path)
    (expected,) = GATHERED.products(x, [stack], rows, jnp.float32)
    assert relative_error(found, expected) <= bound("few_rows_fp32")


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("form", ["NF4", "nested NF4", "FP8"])
def test_decoded_weights_have_the_bits_of_the_codec(form: str, tokens: int, path: Any) -> None:  # noqa: F811
    """A row with a single one picks a column of the decoded matrix."""
    stack, picked = STACKS[form](), jnp.asarray([77, 50][:tokens])
    x = jax.nn.one_hot(picked, INNER, dtype=jnp.bfloat16)
    for group in (0, GROUPS - 1):
        rows = Rows.of_layer(tokens, group)
        (found,) = few_rows_mosaic.products(x, [stack], rows, jnp.float32, interpret=path)
        np.testing.assert_array_equal(found, stack[group].astype(jnp.float32)[:, picked].T)
        assert not np.array_equal(found, stack[1].astype(jnp.float32)[:, picked].T)


@needs_kernels
@pytest.mark.parametrize("tokens", [1, 3])
def test_several_stacks_in_one_call(tokens: int, path: Any) -> None:  # noqa: F811
    x, rows = draw(1, tokens, INNER).astype(jnp.bfloat16), Rows.of_layer(tokens, jnp.int32(4))
    stacks = [STACKS["nested NF4"](), in_nf4(1, nested=True, seed=1), STACKS["16 bit"]()]
    found = few_rows_mosaic.products(x, stacks, rows, jnp.float32, interpret=path)
    pairs = zip(found, GATHERED.products(x, stacks, rows, jnp.float32), strict=True)
    assert max(relative_error(*pair) for pair in pairs) <= bound("few_rows_fp32")


@needs_kernels
def test_what_the_products_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, why = STACKS["16 bit"](), few_rows_mosaic.unsupported
    assert why(jnp.bfloat16, stack, STACKS["NF4"]()) is None
    assert "found float32" in str(why(jnp.float32, stack))
    assert "found 16 by 128" in str(why(jnp.bfloat16, in_nf4(4, nested=False)))
    assert "found 64 by 96" in str(why(jnp.bfloat16, stack[:, :, :96]))
    assert "found float16" in str(why(jnp.bfloat16, stack.astype(jnp.float16)))
    assert why(jnp.bfloat16, in_fp8(1)) is None
    made_up_gpu(monkeypatch)  # of compute capability 8.0
    assert "no instructions for FP8" in str(why(jnp.bfloat16, in_fp8(1)))


@needs_kernels
@pytest.mark.parametrize(
    ("positions", "slots", "window", "heads"),
    [([0, 5, 63, 80], 64, None, (4, 2, 64)), ([1023, 700], 1024, 100, (12, 2, 64))],
    ids=["first, last and past the end", "two parts and a window"],
)
def test_attention_over_the_cache(
    positions: list[int],
    slots: int,
    window: int | None,
    heads: tuple[int, int, int],
    path: Any,  # noqa: F811
) -> None:
    """A position past the end writes nothing, and nobody reads what it attends to. The control: another window."""
    arguments = arguments_of(positions, slots, heads)
    new, rotation, cache, layer, at = arguments
    found = cached_attention_mosaic.attend(new, rotation, cache, layer, at, window, interpret=path)
    expected, before = MASKED(*arguments, sliding_window=window), cache
    real, near = jnp.asarray(positions) < slots, bound("cached_attention_bf16")
    assert relative_error(found[0][real], expected[0][real]) <= near
    assert relative_error(MASKED(*arguments, sliding_window=(window or 64) - 1)[0][real], expected[0][real]) > near
    for stack, wanted, old in zip(found[1], expected[1], before, strict=True):
        assert relative_error(stack, wanted) <= bound("cached_attention_written_bf16")
        changed = np.asarray(jnp.any(stack != old, axis=(3, 4)))
        places = [(LAYER, b, position) for b, position in enumerate(positions) if position < slots]
        assert sorted(map(tuple, np.argwhere(changed).tolist())) == places


@needs_kernels
@pytest.mark.parametrize(
    ("query", "cache", "word"),
    [
        (((1, 2, 4, 64), BFLOAT16), ((1, 1, 64, 2, 64), BFLOAT16), "found 2"),
        (((1, 1, 4, 64), "float32"), ((1, 1, 64, 2, 64), "float32"), "found float32"),
        (((1, 1, 4, 32), BFLOAT16), ((1, 1, 64, 2, 32), BFLOAT16), "found 32"),
        (((1, 1, 4, 64), BFLOAT16), ((1, 1, 96, 2, 64), BFLOAT16), "found 96"),
        (((1, 1, 4, 64), BFLOAT16), ((1, 1, 16, 2, 64), BFLOAT16), "found 16"),
    ],
)
def test_what_attention_over_the_cache_refuses(query: Any, cache: Any, word: str) -> None:
    arrays = [jax.ShapeDtypeStruct(*each) for each in (query, cache)]
    assert word in str(cached_attention_mosaic.unsupported(*arrays))


@needs_kernels
def test_a_decoding_step_with_the_kernels(monkeypatch: pytest.MonkeyPatch, path: Any) -> None:  # noqa: F811
    """Hidden states and cache of one new token per sequence, with adapters, in bfloat16."""
    batch = 2
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 64, "num_hidden_layers": 2}
    config = config_of("plain").replace(**sizes, num_experts=32, num_attention_heads=4, num_key_value_heads=2)
    lora = LoraConfig(r=4, targets=("q_proj", "experts.gate_up_proj", "experts.down_proj"))
    params = init_parameters(config, jax.random.key(0), jnp.bfloat16)
    adapters = {path: array + 0.02 for path, array in init_adapters(config, lora, jax.random.key(1)).items()}
    cache = KVCache(*(draw(key, 2, batch, 64, 2, 64).astype(jnp.bfloat16) for key in (3, 4)))
    at = jnp.arange(batch, dtype=jnp.int32) + 9
    new = NewTokens(at[:, None], at, jnp.ones_like(at))

    def step() -> Any:
        run = jax.jit(partial(forward_cached, config=config, options=Options(lora=lora)))
        traced = run.trace(params, adapters, new, cache)
        return str(traced.jaxpr).count("name=few_rows") + str(traced.jaxpr).count("name=cached_attention"), run(
            params, adapters, new, cache
        )[:2]

    plain, expected = step()
    if not on_gpu:
        made_up_gpu(monkeypatch)
        for module, name in KERNELS:
            monkeypatch.setattr(module, name, partial(getattr(module, name), interpret=path))
    with forced(norm_rotary="xla", grouped_matmul="tiled", cached_attention="mosaic", few_rows="mosaic"):
        kernels, found = step()
    # projections, attention, output projection, router, gate and up, down
    assert (plain, kernels) == (0, 6)
    errors = [relative_error(*pair) for pair in zip(*map(jax.tree.leaves, (found, expected)), strict=True)]
    assert max(errors) <= bound("few_rows_model_bf16")


@needs_kernels
@pytest.mark.parametrize("form", ["16 bit", "NF4Stack", "FP8Stack"])
def test_the_small_case_of_the_products(form: str, path: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """It runs before the kernel is chosen, and sees rows of other experts."""
    assert few_rows_mosaic.small_case_error(form, "bfloat16", path) <= 1e-2
    monkeypatch.setattr(few_rows_mosaic._Listed, "source", lambda listed, number: jnp.int32(0))
    assert few_rows_mosaic.small_case_error(form, "bfloat16", path) > BOUND


@needs_kernels
def test_the_small_case_of_attention(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The control: the new keys of two heads exchanged."""
    assert cached_attention_mosaic.small_case_error(64, "bfloat16", path) <= 1e-2
    attend = cached_attention_mosaic.attend
    turned = lambda new, *rest: attend(new._replace(key=jnp.flip(new.key, 2)), *rest)
    monkeypatch.setattr(cached_attention_mosaic, "attend", turned)
    assert cached_attention_mosaic.small_case_error(64, "bfloat16", path) > BOUND


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [256, 4096])
def test_attention_over_the_cache_at_the_real_width(slots: int) -> None:
    arguments = arguments_of([slots - 1, 0, slots // 2 + 3], slots, (32, 4, 128))
    attend = partial(cached_attention_mosaic.attend, sliding_window=None)
    found, expected = attend(*arguments), MASKED(*arguments, sliding_window=None)
    assert relative_error(found[0], expected[0]) <= bound("cached_attention_bf16")
    assert relative_error(found[1].key, expected[1].key) <= bound("cached_attention_written_bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16])
def test_products_of_few_rows_at_the_real_width(tokens: int) -> None:
    """Gate and up, with SwiGLU, of 128 experts."""
    x, stack = rounded(0, tokens, 2048), rounded(1, 128, 1536, 2048)
    rows = Rows.of_experts(jax.lax.top_k(draw(2, tokens, 128), 8)[1], 0)
    (found,) = few_rows_mosaic.products(x, [stack], rows, BFLOAT16, swiglu=True)
    (expected,) = GATHERED.products(x, [stack], rows, BFLOAT16, swiglu=True)
    assert relative_error(found, expected) <= bound("few_rows_bf16")
