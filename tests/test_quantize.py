"""NF4: the codec against bitsandbytes bit for bit, the model against one with the decoded weights, and the files."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import main
from convert.adapters import write_peft
from convert.hf2jax import hf2jax, read_hf
from convert.safetensors_io import open_folder, write_file
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import LoraConfig
from jaxmoe.errors import UserError
from jaxmoe.generate.engine import Generator
from jaxmoe.lora import LORA_GROUPS
from jaxmoe.memory import Workload, training_forecast
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.nf4 import codec as quantize
from jaxmoe.nf4 import stack as dequantize
from jaxmoe.nf4.codec import NF4, decode, dynamic_map, encode
from jaxmoe.nf4.recode import dequantized, quantized
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.ops.linear import quantized_product
from jaxmoe.parameters import NESTED_QUANT_MAP, matrix_shape, parameter_specs, quantizable
from jaxmoe.store.checkpoint import Checkpoint
from jaxmoe.store.converted import read_converted
from jaxmoe.train.loop import train
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model, loss_and_gradients
from peers.configs import random_adapters
from peers.make_checkpoint import TINY, make_checkpoint
from tests.parity import COMPILER_OPTIONS, make_batch, relative_error
from tests.test_convert import contents
from tests.test_parity_gradients import training_batch
from tests.tolerances import bound

DTYPES = ("float32", "bfloat16", "float16")
# whole blocks, a short last block, more than one block of the second quantisation, an odd number of elements
SHAPES = ((64, 64), (48, 36), (5, 13), (257, 192), (3, 33), (300, 130))
# matrix rows are whole blocks; otherwise bitsandbytes' AVX-512 code reads the wrong block maxima
MIXED = TINY.replace(
    num_hidden_layers=4, mlp_only_layers=(1,), hidden_size=64, moe_intermediate_size=64, intermediate_size=128
)


@pytest.fixture
def bnb() -> Iterator[Any]:
    """bitsandbytes' functions; compiled parts run eagerly, which gives the same numbers sooner."""
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield bitsandbytes.functional


def draw(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values whose scale differs from row to row, some rows zero, one element large."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape) * np.exp(rng.normal(0, 2, (shape[0], 1)))
    x[rng.random(shape[0]) < 0.1] = 0
    x.flat[rng.integers(x.size)] = 300
    return x.astype(np.float32)


def to_torch(x: np.ndarray, dtype: str) -> Any:
    import torch

    return torch.tensor(x).to(getattr(torch, dtype))


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor as NumPy; bfloat16 goes through float32, which holds it exactly."""
    name = str(x.dtype).removeprefix("torch.")
    return x.float().numpy().astype(name) if name == "bfloat16" else x.numpy()


def assert_same_bits(found: Any, expected: np.ndarray) -> None:
    found = np.asarray(found)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    equal = found.tobytes() == expected.tobytes()
    assert equal  # a bare name: pytest would spend minutes on the difference between two long strings of bytes


# --- the codec


def halves_to_even(rounded: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """`rounded` in float16, with values half-way between two numbers rounded to the even one.

    The CPU code in bitsandbytes' CUDA library rounds such values away from zero; that of its CPU library and its CUDA
    kernels round them to even.
    """
    even = exact.astype(np.float16)
    half_way = (even.astype(np.float32) + rounded.astype(np.float32)) / 2 == exact
    return np.where(half_way, even, rounded)


def check_decoding(bnb: Any, shape: tuple[int, int], dtype: str, nested: bool, seed: int, device: str = "cpu") -> None:
    """Both of jaxmoe's decoders against bitsandbytes' on `device`; the bytes come from its encoder on the CPU."""
    packed, state = bnb.quantize_4bit(to_torch(draw(seed, shape), dtype), quant_type="nf4", compress_statistics=nested)
    codes, absmax = packed.numpy()[:, 0], state.absmax.numpy()
    there = bnb.QuantState.from_dict(state.as_dict(packed=True), device)
    expected = to_numpy(bnb.dequantize_4bit(packed.to(device), there).cpu()).reshape(shape)
    if (dtype, device) == ("float16", "cpu"):
        there.dtype = to_torch(np.zeros(0), "float32").dtype
        expected = halves_to_even(expected, to_numpy(bnb.dequantize_4bit(packed, there)).reshape(shape))
    ours, table = NF4(codes, absmax), None
    if nested:
        ours = NF4(codes, absmax, state.state2.absmax.numpy(), state.offset.numpy())
        table = state.state2.code.numpy()
    assert_same_bits(decode(ours, math.prod(shape), np.dtype(dtype), table).reshape(shape), expected)
    params = {name: jnp.asarray(array)[None, None] for name, array in ours.named("x").items()}
    params |= {} if table is None else {NESTED_QUANT_MAP: jnp.asarray(table)}
    decoded = jax.jit(lambda params: NF4Stack.of(params, "x", (1, *shape), dtype)[jnp.asarray([0, 0])])(params)
    assert_same_bits(decoded[1], expected)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_equals_bitsandbytes(bnb: Any, dtype: str, nested: bool) -> None:
    for seed, shape in enumerate(SHAPES):
        check_decoding(bnb, shape, dtype, nested, seed)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_equals_bitsandbytes_on_cuda(bnb: Any, dtype: str, nested: bool) -> None:
    for seed, shape in enumerate(SHAPES):
        check_decoding(bnb, shape, dtype, nested, seed, "cuda")


def swap_nibbles(patch: pytest.MonkeyPatch) -> None:
    interleaved = dequantize._interleaved
    patch.setattr(dequantize, "_interleaved", lambda even, odd: interleaved(odd, even))


def lose_the_last_bit(patch: pytest.MonkeyPatch) -> None:
    """The effect that a fused multiply-add would have on the blocks' scales."""
    exact = dequantize._decode_absmax
    patch.setattr(dequantize, "_decode_absmax", lambda *arrays: jnp.nextafter(exact(*arrays), jnp.inf))


@pytest.mark.parametrize("fault", [swap_nibbles, lose_the_last_bit])
def test_a_wrong_decoder_would_be_noticed(
    bnb: Any, fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control."""
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check_decoding(bnb, (257, 192), "float32", True, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_equals_bitsandbytes(bnb: Any, dtype: str) -> None:
    for seed, shape in enumerate(SHAPES):
        x = to_torch(draw(seed, shape), dtype)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4")
        ours = encode(to_numpy(x))
        assert_same_bits(ours.codes, packed.numpy()[:, 0])
        assert_same_bits(ours.absmax, state.absmax.numpy())


def test_ties_go_to_the_lower_code(bnb: Any) -> None:
    middle = (quantize.NF4_TABLE[:-1] + quantize.NF4_TABLE[1:]) / np.float32(2)
    x = np.concatenate([middle, np.nextafter(middle, np.float32(2)), [1, -1]]).astype(np.float32)
    assert_same_bits(encode(x).codes, bnb.quantize_4bit(to_torch(x, "float32"), quant_type="nf4")[0].numpy()[:, 0])
    assert encode(np.asarray([1, -1] * 32, np.float32)).codes[0] == 0xF0


def test_the_second_quantisation(bnb: Any) -> None:
    """The table is bitsandbytes'. The codes are the nearest ones; its CPU encoder sometimes picks the neighbour."""
    assert_same_bits(dynamic_map(), bnb.create_dynamic_map().numpy())
    x = np.random.default_rng(0).standard_normal((1024, 512)).astype(np.float32)
    _, state = bnb.quantize_4bit(to_torch(x, "float32"), quant_type="nf4", compress_statistics=True)
    ours = encode(x, dynamic_map())
    assert ours.nested_offset == pytest.approx(state.offset.item(), rel=bound("nf4_nested_fp32"))
    assert ours.nested_absmax is not None
    np.testing.assert_allclose(ours.nested_absmax, state.state2.absmax.numpy(), rtol=bound("nf4_nested_fp32"))
    steps = ours.absmax.astype(int) - state.absmax.numpy()
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 0.01
    exact = encode(x).absmax
    error = np.abs(quantize.decode_absmax(ours, dynamic_map()) - exact).max()
    assert (
        error
        <= 1.01
        * np.abs(to_numpy(bnb.dequantize_blockwise(state.absmax, state.state2)) + state.offset.item() - exact).max()
    )


@pytest.mark.gpu
def test_the_gpu_decodes_the_same_bits() -> None:
    for seed, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            packed = encode(draw(seed, shape), dynamic_map())
            params = {name: jnp.asarray(array)[None, None] for name, array in packed.named("x").items()}
            params |= {NESTED_QUANT_MAP: jnp.asarray(dynamic_map())}
            decoded = jax.jit(lambda p, shape=shape, dtype=dtype: NF4Stack.of(p, "x", (1, *shape), dtype)[0])(params)
            assert_same_bits(decoded, decode(packed, math.prod(shape), np.dtype(dtype), dynamic_map()).reshape(shape))


# --- the model


def stacked(source: Checkpoint) -> Qwen3MoeForCausalLM:
    """The model of a checkpoint's decoded weights, stacked here, without the product's loader."""
    params: dict[str, list[np.ndarray]] = {}
    for block in dequantized(source).blocks():
        for path, array in block.arrays.items():
            params.setdefault(path, []).append(array)
    config = source.config
    specs = parameter_specs(config)
    return Qwen3MoeForCausalLM(
        config, {path: jnp.asarray(np.stack(a) if "." in path else a[0]) for path, a in params.items() if path in specs}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("nf4") / "hf", MIXED, dtype="bfloat16")


LORA = LoraConfig(r=2, alpha=4.0, targets=("q_proj", "o_proj", "gate", "experts.gate_up_proj", "experts.down_proj"))


def outcome(model: Qwen3MoeForCausalLM, remat: Any, fresh: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(hidden states, gradients of random adapters) in the model's dtype."""
    batch = make_batch(MIXED, [[30, 18], [-8, 40]])

    def run(params: Any, adapters: Any, batch: Any) -> Any:
        dtype = str(params["embed_tokens"].dtype)
        tokens = jax.tree.map(lambda array: array[0], batch)
        hidden = forward(
            params,
            adapters,
            Tokens(tokens.input_ids, tokens.position_ids, tokens.segment_ids),
            config=MIXED,
            options=Options(lora=LORA),
        ).hidden
        objective = next_token_objective(0.01)
        step = loss_and_gradients(Model(MIXED, LORA, dtype, remat), params, adapters, batch, objective)
        return hidden, step.gradients

    adapters = {path: jnp.asarray(array) for path, array in random_adapters(MIXED, LORA).items()}
    compiled = jax.jit(run, compiler_options=COMPILER_OPTIONS)
    hidden, gradients = jax.device_get(compiled(model.params, adapters, training_batch(batch)))
    return hidden, gradients


def check_model(folder: pathlib.Path, dtype: str, remat: Any = "low-memory") -> None:
    packed = Qwen3MoeForCausalLM.from_pretrained(folder, dtype, quantize="nf4")
    assert packed.quantization is not None
    hidden, gradients = outcome(packed, remat)
    expected, expected_gradients = outcome(stacked(quantized(read_hf(folder, dtype))), remat)
    assert relative_error(hidden, expected) <= bound("nf4_model")
    for path, gradient in gradients.items():
        assert np.any(expected_gradients[path]), path
        assert relative_error(gradient, expected_gradients[path]) <= bound("nf4_gradients"), path


@pytest.mark.parametrize("remat", ["offload", "fast"])
def test_the_model_equals_that_of_its_decoded_weights(folder: pathlib.Path, remat: str) -> None:
    check_model(folder, "float32", remat)


def dots(jaxpr: Any) -> list[tuple[Any, ...]]:
    """The operands' dtypes of each matrix product in a jaxpr and in those inside it."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(tuple(var.aval.dtype for var in equation.invars))
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                found += dots(getattr(inner, "jaxpr", inner))
    return found


def test_products_of_sixteen_bit_weights_have_sixteen_bit_operands() -> None:
    """A product of bfloat16 with float32, as a float32 cotangent would make one, runs outside the tensor cores."""
    packed = encode(np.ones((64, 64), np.float32))
    params = {name: jnp.asarray(array)[None, None] for name, array in packed.named("x").items()}
    stack = NF4Stack.of(params, "x", (1, 64, 64), "bfloat16")
    run = lambda x: quantized_product(x, stack, jnp.int32(0)).sum()
    found = dots(jax.make_jaxpr(jax.value_and_grad(run))(jnp.ones((8, 64), jnp.bfloat16)).jaxpr)
    assert found == [(jnp.bfloat16, jnp.bfloat16)] * 2


def test_a_wrong_decoder_changes_the_model(folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control."""
    swap_nibbles(monkeypatch)
    with pytest.raises(AssertionError):
        check_model(folder, "float32")


def test_what_is_quantised_and_what_is_not(folder: pathlib.Path) -> None:
    model = Qwen3MoeForCausalLM.from_pretrained(folder, quantize="nf4")
    kept = {path: array for path, array in model.params.items() if array.dtype == jnp.bfloat16}
    assert set(kept) == set(parameter_specs(MIXED)) - set(quantizable(MIXED))
    assert {"embed_tokens", "lm_head", "sparse.gate", "attention.q_norm"} <= set(kept)
    parts = {
        part.name: part.bytes
        for part in training_forecast(Workload(MIXED, LORA, 1, 8, "bfloat16", quantize="nf4")).parts
    }
    assert parts["parameters (nf4)"] == sum(array.nbytes for array in model.params.values())
    with pytest.raises(UserError, match="quantize: expected 'nf4'"):
        Qwen3MoeForCausalLM.from_pretrained(folder, quantize="fp4")


def test_generation(folder: pathlib.Path) -> None:
    packed = Qwen3MoeForCausalLM.from_pretrained(folder, "float32", quantize="nf4")
    whole = stacked(quantized(read_hf(folder, "float32")))
    prompts = [[1, 2, 3], [40, 50, 60, 70, 80]]
    assert Generator(packed).generate(prompts, 6) == Generator(whole).generate(prompts, 6)


WIDE = TINY.replace(hidden_size=256, head_dim=64, moe_intermediate_size=256, num_experts=4, num_hidden_layers=6)


WIDE_LORA = LoraConfig(r=2, targets=(*LORA_GROUPS["attention"], *LORA_GROUPS["experts"]))


def wide_parameters(dtype: str) -> dict[str, jax.Array]:
    """WIDE in NF4; all matrices of a path are equal."""
    rng = np.random.default_rng(0)
    params: dict[str, jax.Array] = {NESTED_QUANT_MAP: jnp.asarray(dynamic_map())}
    for path, spec in parameter_specs(WIDE).items():
        if path not in quantizable(WIDE):
            params[path] = jnp.ones(spec.shape, dtype)
            continue
        one = encode(rng.standard_normal(matrix_shape(WIDE, path)[-1]).astype(np.float32), dynamic_map())
        lead = (spec.shape[0], *matrix_shape(WIDE, path)[:-1])
        for name, array in one.named(path).items():
            params[name] = jnp.broadcast_to(array, (*lead, *array.shape))
    return params


def wide_gradients(params: Any, adapters: Any, batch: Any, dtype: str, remat: str, decode_first: bool) -> Any:
    """The adapters' gradients of WIDE, with its weights decoded where they are used, or all of them before."""
    if decode_first:
        for path in quantizable(WIDE):
            *lead, out, inner = parameter_specs(WIDE)[path].shape
            stack = NF4Stack.of(params, path, (math.prod(lead), out, inner), dtype)
            params = params | {path: stack[jnp.arange(math.prod(lead))].reshape(*lead, out, inner)}
            params = {name: array for name, array in params.items() if not name.startswith(f"{path}.")}
    model = Model(WIDE, WIDE_LORA, dtype, remat)  # pyright: ignore[reportArgumentType]
    return loss_and_gradients(model, params, adapters, batch, next_token_objective()).gradients


@pytest.mark.gpu
def test_the_kernels_give_the_bits_of_the_decoded_weights() -> None:
    """Rows enough for the kernels of 16-bit projections and experts."""
    rng = np.random.default_rng(1)
    params = wide_parameters("bfloat16")
    params["embed_tokens"] = jnp.asarray(rng.standard_normal(params["embed_tokens"].shape), "bfloat16")
    params["sparse.gate"] = jnp.asarray(rng.standard_normal(params["sparse.gate"].shape), "bfloat16")
    adapters = {path: jnp.asarray(array) for path, array in random_adapters(WIDE, WIDE_LORA).items()}
    batch = training_batch(make_batch(WIDE, [[256], [256]]))
    run = jax.jit(wide_gradients, static_argnums=(3, 4, 5))
    lowered = [run.lower(params, adapters, batch, "bfloat16", "fast", before) for before in (False, True)]
    with ThreadPoolExecutor() as pool:  # nearly all of the test's time is the compiler's
        programs = list(pool.map(lambda program: program.compile(), lowered))
    found, expected = (jax.device_get(program(params, adapters, batch)) for program in programs)
    for path, gradient in expected.items():
        assert np.any(gradient), path
        assert_same_bits(found[path], gradient)


def temporary_bytes(remat: str, decode_first: bool) -> int:
    """What the compiled gradient of 16 tokens needs beside its arguments and results."""
    adapters = {path: jnp.asarray(array) for path, array in random_adapters(WIDE, WIDE_LORA).items()}
    batch = training_batch(make_batch(WIDE, [[16]]))
    run = jax.jit(
        lambda params, adapters: wide_gradients(params, adapters, batch, "float32", remat, decode_first),
        compiler_options=COMPILER_OPTIONS,
    )
    analysis = run.lower(wide_parameters("float32"), adapters).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="cuBLAS's workspace, 32 MiB, is larger than this model")
@pytest.mark.parametrize("remat", ["low-memory", "fast"])
def test_no_more_than_one_layer_is_ever_decoded(remat: str) -> None:
    """The bound is one layer's weights, and as much again for the results of all layers if those are saved.

    The results are half of that; all layers' attention weights would exceed it. The control decodes the model first.
    """
    layer = sum(4 * math.prod(parameter_specs(WIDE)[path].shape[1:]) for path in quantizable(WIDE))
    assert temporary_bytes(remat, decode_first=False) < layer * (2 if remat == "fast" else 1)
    assert temporary_bytes(remat, decode_first=True) > WIDE.num_hidden_layers * layer


def test_training(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"{i} and {i + 1} make {2 * i + 1}. " * 3}) + "\n" for i in range(8)))
    shared: dict[str, Any] = {"model": folder, "data": data, "max_steps": 6, "seq_length": 64, "batch_size": 2}
    shared |= {"learning_rate": 1e-2, "warmup_steps": 0, "schedule": "constant", "tensorboard": False, "lora_r": 2}
    losses: list[float] = []
    train(
        TrainConfig(**shared, output=tmp_path / "run", quantize="nf4", dtype="float32"),
        lambda row: losses.append(row["loss"]),
    )
    assert losses[-1] < losses[0]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="quantize: only valid with LoRA training"):
        TrainConfig(**shared, output=tmp_path / "x", quantize="nf4", full=True)
    with pytest.raises(UserError, match="merge: expected weights to merge into, found NF4"):
        train(TrainConfig(**shared, output=tmp_path / "x", quantize="nf4", merge=True))
    assert not (tmp_path / "x").exists()


# --- files


def quantise_folder(bnb: Any, src: pathlib.Path, nested: bool, experts: bool) -> None:
    """Rewrites a checkpoint as transformers and bitsandbytes write it in NF4, by bitsandbytes itself."""
    out: dict[str, np.ndarray] = {}
    for key, tensor in open_folder(src).items():
        weight = tensor.read()
        projection = key.endswith("_proj.weight") and (experts or ".experts." not in key)
        if not projection:
            out[key] = weight
            continue
        x = to_torch(weight.astype(np.float32), tensor.dtype.name)
        packed, state = bnb.quantize_4bit(x, quant_type="nf4", compress_statistics=nested)
        out[key] = packed.numpy()
        out |= {f"{key}.{name}": value.numpy() for name, value in state.as_dict(packed=True).items()}
    (src / "model.safetensors").unlink()
    write_file(src / "model.safetensors", out, {"format": "pt"})
    edit_config(src, lambda raw: raw.update(quantization_config=SETTINGS | {"bnb_4bit_use_double_quant": nested}))


SETTINGS = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def edit_config(folder: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("form", ["per expert, nested", "per expert, plain", "attention only", "odd sizes"])
def test_bytes_of_bitsandbytes_are_kept(bnb: Any, form: str, tmp_path: pathlib.Path) -> None:
    config = MIXED.replace(hidden_size=33, moe_intermediate_size=21, intermediate_size=45) if "odd" in form else MIXED
    attention_only = form == "attention only"
    layout = "fused" if attention_only else "per_expert"
    src = make_checkpoint(tmp_path / "hf", config, dtype="bfloat16", layout=layout)
    quantise_folder(bnb, src, nested="plain" not in form, experts=not attention_only)
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "60KB"])
    assert contents(tmp_path / "back") == contents(src)
    assert (tmp_path / "back" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    main(["inspect", str(src)])
    main(["inspect", str(tmp_path / "jax")])
    if "odd" not in form:  # and they mean the same there
        weight = bitsandbytes_weight(bnb, src, "model.layers.2.self_attn.k_proj.weight")
        found = next(block for block in dequantized(read_converted(tmp_path / "jax")).blocks() if block.layer == 2)
        assert_same_bits(found.arrays["attention.k_proj"], weight)
    model = Qwen3MoeForCausalLM.from_pretrained(src)
    assert model.quantization is not None
    assert ("sparse.down_proj" in model.quantization.paths) == (not attention_only)
    assert jnp.isfinite(model(np.arange(8)[None]).logits).all()


def bitsandbytes_weight(bnb: Any, src: pathlib.Path, key: str) -> np.ndarray:
    import torch

    tensors = {name: t for name, t in open_folder(src).items() if name.startswith(key)}
    arrays = {name: torch.tensor(t.data.view(t.stored_dtype).reshape(t.shape).copy()) for name, t in tensors.items()}
    packed = arrays.pop(key)
    return to_numpy(bnb.dequantize_4bit(packed, bnb.QuantState.from_dict(arrays, torch.device("cpu"))))


def test_experts_are_added_to_what_transformers_quantises(bnb: Any, tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", MIXED, dtype="bfloat16", layout="fused")
    quantise_folder(bnb, src, nested=True, experts=False)
    main(["hf2jax", str(src), str(tmp_path / "jax"), "--quantize", "nf4"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    before, after = contents(src), contents(tmp_path / "back")
    attention = [key for key in before if ".self_attn." in key]
    assert {key: after[key] for key in attention} == {key: before[key] for key in attention}
    # per expert, each with its own statistics
    expert = "model.layers.3.mlp.experts.5.up_proj.weight"
    raw = open_folder(src)["model.layers.3.mlp.experts.gate_up_proj"].read()[5, MIXED.moe_intermediate_size :]
    assert after[expert][2] == encode(raw).codes.tobytes()
    assert not any(key.endswith("experts.gate_up_proj") for key in after)


def test_converting_into_nf4_and_back(bnb: Any, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    main(["hf2jax", str(folder), str(tmp_path / "jax"), "--quantize", "nf4"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "bnb")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "whole"), "--dequantize"])
    settings = json.loads((tmp_path / "bnb" / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_skip_modules"] == ["lm_head", *(f"model.layers.{i}.mlp.gate" for i in (0, 2, 3))]
    assert "quantization_config" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    key = "model.layers.3.mlp.experts.7.gate_proj.weight"
    assert_same_bits(open_folder(tmp_path / "whole")[key].read(), bitsandbytes_weight(bnb, tmp_path / "bnb", key))
    direct = Qwen3MoeForCausalLM.from_pretrained(folder, quantize="nf4").params
    for source in ("jax", "bnb"):
        read = Qwen3MoeForCausalLM.from_pretrained(tmp_path / source).params
        assert read.keys() == direct.keys()
        assert all(np.array_equal(read[name], direct[name]) for name in read)


def test_transformers_reads_what_is_written(tmp_path: pathlib.Path) -> None:
    """A model of dense layers, since transformers 5 has no 4-bit experts."""
    pytest.importorskip("bitsandbytes")
    import torch
    import transformers

    config = MIXED.replace(num_experts=0, mlp_only_layers=())
    src = make_checkpoint(tmp_path / "hf", config)
    main(["hf2jax", str(src), str(tmp_path / "jax"), "--quantize", "nf4"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "bnb")])
    ids = np.random.default_rng(0).integers(0, 320, (1, 24))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "bnb", dtype=torch.float32, device_map="cpu", use_safetensors=True, trust_remote_code=False
    )
    # Without gradients bitsandbytes multiplies in bfloat16 on a CPU.
    expected = theirs.train()(torch.tensor(ids)).logits.detach().numpy()
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    found = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "jax")(ids).logits
    assert relative_error(np.asarray(found), expected) <= bound("parity_fp32")


def test_merging_needs_the_weights(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    lora = LoraConfig(r=2, alpha=4.0, targets=("q_proj",))
    write_peft(tmp_path / "peft", MIXED, lora, random_adapters(MIXED, lora))
    hf2jax(folder, tmp_path / "jax", quantize="nf4")
    merge = ["jax2hf", str(tmp_path / "jax"), str(tmp_path / "merged"), "--adapter", str(tmp_path / "peft")]
    with pytest.raises(UserError, match="found NF4"):
        main(merge)
    assert not (tmp_path / "merged").exists()
    main([*merge, "--dequantize"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "whole"), "--dequantize"])
    merged, whole = contents(tmp_path / "merged"), contents(tmp_path / "whole")
    changed = {key for key in merged if merged[key] != whole[key]}
    assert changed == {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(4)}
    hf2jax(folder, tmp_path / "plain")
    with pytest.raises(UserError, match="expected weights in NF4 or FP8, found none"):
        main(["jax2hf", str(tmp_path / "plain"), str(tmp_path / "x"), "--dequantize"])


KEY = "model.layers.2.mlp.experts.7.up_proj.weight"
STATE = f"{KEY}.quant_state.bitsandbytes__nf4"


def edit_tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def apply(folder: pathlib.Path) -> None:
        file = folder / "model.safetensors"
        read = open_folder(folder).items()
        tensors = {name: t.data.view(t.stored_dtype).reshape(t.shape).copy() for name, t in read}
        change(tensors)
        write_file(file, tensors, {"format": "pt"})

    return apply


def edit_state(**changes: Any) -> Callable[[pathlib.Path], None]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        state = json.loads(tensors[STATE].tobytes()) | changes
        state = {name: value for name, value in state.items() if value != "absent"}
        tensors[STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)

    return edit_tensors(change)


def settings(**changes: Any) -> Callable[[pathlib.Path], None]:
    return lambda folder: edit_config(folder, lambda raw: raw["quantization_config"].update(changes))


# what is done to a checkpoint in NF4, and what the one-line error must say
BAD: dict[str, tuple[Callable[[pathlib.Path], Any], tuple[str, ...]]] = {
    "no state": (edit_tensors(lambda t: t.pop(STATE)), (STATE, "missing tensor")),
    "no absmax": (edit_tensors(lambda t: t.pop(f"{KEY}.absmax")), (f"{KEY}.absmax", "missing tensor")),
    "no nested absmax": (edit_tensors(lambda t: t.pop(f"{KEY}.nested_absmax")), (f"{KEY}.nested_absmax",)),
    "no codes": (edit_tensors(lambda t: t.pop(KEY)), (KEY, "missing tensor")),
    "fp4 in the keys": (
        edit_tensors(lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)})),
        (KEY, "fp4", "expected"),
    ),
    "fp4 in the state": (edit_state(quant_type="fp4"), (STATE, "expected nf4, found 'fp4'")),
    "fp4 in the config": (settings(bnb_4bit_quant_type="fp4"), ("quantization_config", "fp4")),
    "8 bit": (settings(load_in_4bit=False, load_in_8bit=True), ("quantization_config", "not supported")),
    "another storage": (settings(bnb_4bit_quant_storage="bfloat16"), ("quantization_config", "bfloat16")),
    "no config": (lambda f: edit_config(f, lambda raw: raw.pop("quantization_config")), ("quantization_config",)),
    "another block size": (edit_state(blocksize=128), (STATE, "blocksize: expected 64, found 128")),
    "another nested block size": (edit_state(nested_blocksize=128), (STATE, "expected 256, found 128")),
    "another shape in the state": (edit_state(shape=[32, 128]), (STATE, "[64, 64]", "[32, 128]")),
    "an unknown dtype": (edit_state(dtype="float64"), (STATE, "float64")),
    "another dtype than its stack": (edit_state(dtype="float16"), (KEY, "bfloat16", "float16")),
    "no offset": (edit_state(nested_offset="absent"), (STATE, "nested_offset")),
    "an offset of no number": (edit_state(nested_offset=math.nan), (STATE, "nested_offset", "nan")),
    "a state of no JSON": (edit_tensors(lambda t: t.update({STATE: t[STATE][1:]})), (STATE, "JSON")),
    "a state that is a list": (edit_tensors(lambda t: t.update({STATE: np.frombuffer(b"[]", np.uint8)})), (STATE,)),
    "codes too few": (edit_tensors(lambda t: t.update({KEY: t[KEY][:-1]})), (KEY, "[2048, 1]", "[2047, 1]")),
    "absmax too few": (
        edit_tensors(lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"][:-1]})),
        ("absmax", "[64]", "[63]"),
    ),
    "absmax of floats": (
        edit_tensors(lambda t: t.update({f"{KEY}.absmax": t[f"{KEY}.absmax"].astype(np.float32)})),
        (f"{KEY}.absmax", "U8", "F32"),
    ),
    "another table": (
        edit_tensors(lambda t: t.update({f"{KEY}.quant_map": t[f"{KEY}.quant_map"][::-1].copy()})),
        (f"{KEY}.quant_map", "NF4"),
    ),
    "another nested table": (
        edit_tensors(lambda t: t[f"{KEY}.nested_quant_map"].__setitem__(0, -1)),
        (f"{KEY}.nested_quant_map", "same table"),
    ),
    "a nested table of nonsense": (
        edit_tensors(lambda t: t.update({f"{KEY}.nested_quant_map": np.zeros(256, np.float32)})),
        (f"{KEY}.nested_quant_map", "rising"),
    ),
    "one weight in 16 bit": (
        edit_tensors(lambda t: [t.pop(key) for key in list(t) if key.startswith(f"{KEY}.")]),
        (KEY, "missing tensor"),
    ),
    "a head in NF4": (
        edit_tensors(lambda t: t.update({"lm_head.weight.absmax": np.zeros(1, np.float32)})),
        ("unexpected", "lm_head.weight.absmax"),
    ),
    "codes as weights": (
        edit_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].view(np.uint8)})),
        ("lm_head.weight",),
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoint that is damaged below; undamaged, it converts."""
    folder = tmp_path_factory.mktemp("sound")
    hf2jax(make_checkpoint(folder / "hf", MIXED, dtype="bfloat16"), folder / "jax", quantize="nf4")
    main(["jax2hf", str(folder / "jax"), str(folder / "bnb")])
    hf2jax(folder / "bnb", folder / "again")
    return folder


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(bad: str, sound: pathlib.Path, tmp_path: pathlib.Path) -> None:
    damage, says = BAD[bad]
    shutil.copytree(sound / "bnb", tmp_path / "hf")
    damage(tmp_path / "hf")
    with pytest.raises(UserError) as caught:
        main(["hf2jax", str(tmp_path / "hf"), str(tmp_path / "out" / "jax")])
    message = str(caught.value)
    assert all(text in message for text in says), message
    assert "\n" not in message
    assert [entry.name for entry in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.pop("nf4"), "unexpected nested_quant_map"),
        (lambda m: m["nf4"].update(nested=False), "nested"),
        (lambda m: m["nf4"]["weights"].update({"norm": "bfloat16"}), "nf4: expected"),
        (lambda m: m["nf4"]["weights"].update({"attention.q_proj": "int8"}), "nf4: expected"),
        (lambda m: m["nf4"]["weights"].pop("attention.q_proj"), "attention.q_proj"),
        (lambda m: m["items"]["layers/00001"]["attention.q_proj.codes"].update(dtype="int8"), "uint8"),
        (lambda m: m["items"]["layers/00001"]["attention.q_proj.codes"].update(digest="0" * 64), "SHA-256"),
        (lambda m: m["items"]["layers/00001"]["attention.q_proj.nested_offset"].update(digest="0" * 64), "SHA-256"),
        (lambda m: m["items"]["top"]["nested_quant_map"].update(shape=[16]), "nested_quant_map"),
    ],
)
def test_a_damaged_manifest_is_one_line(
    change: Callable[[dict[str, Any]], Any], says: str, sound: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(sound / "jax", tmp_path / "jax")
    manifest = json.loads((tmp_path / "jax" / "manifest.json").read_text())
    assert (manifest["version"], manifest["nf4"]["nested"]) == (5, True)
    change(manifest)
    (tmp_path / "jax" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=says) as caught:
        main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "out")])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
