"""NF4 encoded by XLA against the codec in NumPy, bit for bit; what is encoded on the device while a model is loaded."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from convert.hf2jax import read_hf
from jaxmoe.nf4 import codec, encode
from jaxmoe.nf4.codec import NF4, NF4_TABLE, dynamic_map
from jaxmoe.nf4.recode import quantized
from jaxmoe.parameters import NF4_BLOCK, matrix_shape
from jaxmoe.store import recoded
from jaxmoe.store.checkpoint import Divisible, MadeOnDevice
from jaxmoe.store.digest import Pending, WeightsDigest, combined, digest
from jaxmoe.store.loading import load_stacks
from peers.configs import config_of
from peers.make_checkpoint import make_checkpoint

DTYPES = ("float32", "bfloat16", "float16")
BLOCKS = 300  # more than one block of the second quantisation, the last one short


@pytest.fixture
def by_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices too are encoded on the device."""
    monkeypatch.setattr(encode, "_FEWEST", 0)


def ordinary(rng: np.random.Generator) -> np.ndarray:
    """Weights whose scale differs from block to block, some blocks zero, of both signs."""
    x = rng.standard_normal((BLOCKS, NF4_BLOCK)) * np.exp2(rng.uniform(-10, 8, (BLOCKS, 1)))
    x[rng.random(BLOCKS) < 0.1] = 0
    x[rng.random(x.shape) < 0.1] *= -0.0
    return x


def near_ties(rng: np.random.Generator) -> np.ndarray:
    """Elements at the midpoints of the table and one or two units beside them, in blocks of many scales."""
    middle = (NF4_TABLE[:-1] + NF4_TABLE[1:]) / np.float32(2)
    unit = np.spacing(np.abs(middle))
    row = np.concatenate([middle - unit, middle, middle + unit, middle + 2 * unit, [1, -1, 0, 1e-20]])
    return row * np.exp2(np.where(rng.random((BLOCKS, 1)) < 0.5, rng.integers(-6, 6), rng.uniform(-6, 6, (BLOCKS, 1))))


def tiny_elements(rng: np.random.Generator) -> np.ndarray:
    """Subnormal elements in blocks of ordinary size."""
    x = rng.standard_normal((BLOCKS, NF4_BLOCK)) * np.exp2(rng.uniform(-149, 0, (BLOCKS, NF4_BLOCK)))
    x[:, 7] = np.exp2(rng.uniform(-6, 6, BLOCKS))
    return x


def equal_blocks(rng: np.random.Generator) -> np.ndarray:
    """Every absmax is the mean: the second quantisation divides zero by zero."""
    return np.full((BLOCKS, NF4_BLOCK), rng.uniform(0.1, 1))


def drawn(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    with np.errstate(under="ignore"):
        return [
            draw(rng).astype(np.float32).astype(dtype) for draw in (ordinary, near_ties, tiny_elements, equal_blocks)
        ]


def check_bits(found: NF4, matrices: list[np.ndarray], table: np.ndarray | None) -> None:
    with np.errstate(invalid="ignore"):
        expected = [codec.encode(matrix, table) for matrix in matrices]
    for name in NF4._fields:
        ours = getattr(found, name)
        assert (ours is None) == (getattr(expected[0], name) is None), name
        for i, one in enumerate(expected):
            theirs = getattr(one, name)
            if theirs is not None:
                same = np.asarray(ours)[i].tobytes() == theirs.tobytes() and ours.dtype == theirs.dtype
                assert same, (name, i)


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("dtype", DTYPES)
def test_xla_gives_the_bits_of_the_codec(dtype: str) -> None:
    matrices = drawn(dtype)
    for table in (None, dynamic_map()):
        packed = encode.encode(matrices, table)
        assert isinstance(packed.codes, jax.Array)
        check_bits(packed, matrices, table)


def without_the_last_bit(patch: pytest.MonkeyPatch) -> None:
    """A reciprocal that is one unit too large, as a division on a GPU may give it."""
    exact = encode._reciprocal
    patch.setattr(encode, "_reciprocal", lambda bits: encode._floats(encode._bits(exact(bits)) + 1))


def ties_to_the_upper(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(encode, "_BOUNDS", np.nextafter(encode._BOUNDS, np.float32(-1)))


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("fault", [without_the_last_bit, ties_to_the_upper])
def test_a_wrong_encoder_would_be_noticed(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    sound = encode._encode.__wrapped__  # pyright: ignore[reportAttributeAccessIssue]

    def traced_anew(words: Any, dtype: str) -> Any:
        return sound(words, dtype)

    fault(monkeypatch)
    monkeypatch.setattr(encode, "_encode", jax.jit(traced_anew, static_argnums=1))
    matrices = drawn("float32")
    with pytest.raises(AssertionError):
        check_bits(encode.encode(matrices), matrices, None)


def test_reciprocals_are_the_nearest() -> None:
    """Of all mantissas whose upper or lower half is one of a few, at both ends of the range that is encoded."""
    rng = np.random.default_rng(0)
    mantissas = np.concatenate([np.arange(2**12), 2**23 - 1 - np.arange(2**12), rng.integers(0, 2**23, 2**16)])
    for exponent in (-64, 0, 63):
        x = np.ldexp(1 + mantissas / 2**23, exponent).astype(np.float32)
        found = jax.jit(encode._reciprocal)(x.view(np.int32))
        assert (np.asarray(found) == 1 / x).all()


@pytest.mark.usefixtures("by_xla")
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38, 1e-30, 1e-39])
def test_blocks_of_no_ordinary_size_are_the_codec_s(value: float) -> None:
    matrices = drawn("float32")
    matrices[1][5] *= 0
    matrices[1][5, 3] = value
    with np.errstate(invalid="ignore"):
        packed = encode.encode(matrices)
    assert isinstance(packed.codes, np.ndarray)
    check_bits(packed, matrices, None)


@pytest.mark.usefixtures("by_xla")
def test_a_short_last_block_is_the_codec_s() -> None:
    matrices = [matrix.reshape(-1)[:-7] for matrix in drawn("float32")]
    packed = encode.encode(matrices, dynamic_map())
    assert isinstance(packed.codes, np.ndarray)
    check_bits(packed, matrices, dynamic_map())


@pytest.mark.parametrize("layout", ["per_expert", "fused"])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_matrices_are_those_of_the_block(layout: Any, dtype: str | None, tmp_path: pathlib.Path) -> None:
    config = config_of("mlp_only_layers")
    make_checkpoint(tmp_path, config, layout=layout, dtype="bfloat16")
    source = read_hf(tmp_path, dtype)
    assert isinstance(source, Divisible)
    whole = source.block(1)
    paths = ("attention.k_proj", "sparse.gate_up_proj", "sparse.down_proj")
    assert source.block(1, without=paths).arrays.keys() == whole.arrays.keys() - set(paths)
    for path in paths:
        expected = whole.arrays[path].reshape(-1, matrix_shape(config, path)[-1])
        for start, stop in ((0, len(expected)), (len(expected) // 3, len(expected) // 3 + 1)):
            found = source.matrices(1, path, start, stop)
            assert len(found) == stop - start
            for matrix, one in zip(found, expected[start:stop], strict=True):
                assert matrix.dtype == one.dtype and matrix.tobytes() == one.tobytes()


@pytest.mark.usefixtures("by_xla")
def test_the_device_makes_what_the_host_makes(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stacks and the digest of a model that is quantised on the device, in several pieces, and in NumPy."""
    monkeypatch.setattr(recoded, "group_size", lambda matrices, elements: max(1, matrices // 2))
    config = config_of("mlp_only_layers").replace(hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    make_checkpoint(tmp_path, config, dtype="bfloat16")
    source = quantized(read_hf(tmp_path))
    assert isinstance(source, MadeOnDevice)
    with WeightsDigest() as collected:
        device = load_stacks(config, source, digest=collected), combined(collected.parts())
    monkeypatch.setattr(encode, "encode", encode._by_codec)
    with WeightsDigest() as collected:
        for block in source.blocks():
            collected.add(block)
        assert device[1] == combined(collected.parts())
    host = load_stacks(config, source)
    assert device[0].keys() == host.keys()
    for path, array in host.items():
        assert np.asarray(device[0][path]).tobytes() == np.asarray(array).tobytes(), path


@pytest.mark.parametrize("cuts", [(2**20,), (5, 2**20 + 7, 2**21 + 1), (2**20 - 1, 2**21)])
def test_the_digest_of_an_array_in_pieces_is_that_of_the_array(cuts: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, 3 * 2**20 + 5, np.uint8)
    assert Pending.on_device(np.split(array, cuts)).result() == digest(array)
    assert Pending.on_device(np.split(array, cuts)[::-1]).result() != digest(array)
