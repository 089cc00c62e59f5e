"""FP8: the codec against transformers bit for bit, the model against one with the decoded weights, and the files."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jaxtyping import Array

from convert.__main__ import main
from convert.hf2jax import hf2jax, read_hf
from convert.report import inspect
from convert.safetensors_io import open_folder, write_file
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.errors import UserError
from jaxmoe.fp8 import codec, encode, stack
from jaxmoe.fp8.codec import FP8
from jaxmoe.fp8.stack import FP8Stack
from jaxmoe.memory import Workload, training_forecast
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.ops.experts import ExpertWeights, sorted_experts
from jaxmoe.ops.implementations import forced
from jaxmoe.ops.linear import LinearMap, linears
from jaxmoe.ops.router import route
from jaxmoe.parameters import Quantization, layer_paths, matrix_shape, parameter_specs, quantizable
from jaxmoe.recode import dequantized, quantized
from jaxmoe.store import recoded
from jaxmoe.store.converted import read_converted
from jaxmoe.store.digest import WeightsDigest, combined
from jaxmoe.store.loading import load_stacks
from jaxmoe.train.prepare import prepare
from jaxmoe.train.settings import TrainConfig
from peers.make_checkpoint import make_checkpoint
from tests.parity import COMPILER_OPTIONS, make_batch, relative_error
from tests.parts import check_parts
from tests.test_convert import contents
from tests.test_quantize import LORA, MIXED, assert_same_bits, draw
from tests.test_weight_forms import FP8 as SETTINGS
from tests.test_weight_forms import model_of, random_fp8, write_fp8
from tests.tolerances import bound

# blocks of several rows and columns, the last ones smaller; no expert's gate ends where a block would
WIDE = MIXED.replace(num_hidden_layers=2, mlp_only_layers=(1,), hidden_size=192, intermediate_size=160)
EVEN = WIDE.replace(hidden_size=256, moe_intermediate_size=128)  # all of whose experts' blocks are whole
SHAPES = ((128, 128), (256, 384), (200, 130), (3, 65, 300))


def same(packed: FP8, expected: FP8) -> None:
    for found, array in zip(packed, expected, strict=True):
        assert_same_bits(np.asarray(found), array)


# --- the codec


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_encoding_equals_transformers(dtype: str) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = SimpleNamespace(weight_block_size=[128, 128], scale_fmt="float")
    theirs = Fp8Quantize(SimpleNamespace(quantization_config=settings))
    for seed, shape in enumerate(SHAPES[:2]):
        matrix = draw(seed, shape)
        matrix[:128, :128] = 0  # a block of zeros
        made = theirs._quantize_one("x.weight", torch.tensor(matrix).to(getattr(torch, dtype)))
        codes = made["x.weight"].view(torch.uint8).numpy().view(codec.E4M3)
        expected = FP8(codes, made["x.weight_scale_inv"].numpy())
        same(codec.encode(matrix.astype(dtype)), expected)
    with pytest.raises(AssertionError):  # negative control: blocks that begin elsewhere
        same(codec.encode(np.roll(matrix, 64, axis=0).astype(dtype)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_device_encodes_and_decodes_as_the_host(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_FEWEST", 0)
    spread = stack.spread
    for seed, (*_, out, inner) in enumerate(SHAPES[2:]):
        matrices = np.stack([draw(seed + n, (out, inner)) for n in range(4)]).astype(dtype)
        matrices[0, :, 128:] = 0
        packed = codec.encode(matrices)
        found = encode.encode([matrix.reshape(-1) for matrix in matrices], (out, inner))
        assert isinstance(found.codes, jax.Array)
        same(found, packed)
        # two matrices in a group, as gate and up are
        scales = packed.scales.reshape(2, 2, *packed.scales.shape[1:])
        arrays = {"x.codes": packed.codes.reshape(2, 2 * out, inner), "x.scales": scales}
        one = FP8Stack.of(jax.tree.map(jnp.asarray, arrays), "x", (2, 2 * out, inner), dtype)
        expected = codec.decode(packed, np.dtype(dtype)).reshape(2, 2 * out, inner)
        assert_same_bits(one[jnp.asarray([1, 0])], expected[::-1])
        with monkeypatch.context() as patch:  # negative control: each block takes the scale of the one beside it
            patch.setattr(stack, "spread", lambda grid, sides: spread(jnp.roll(grid, 1, -1), sides))
            with pytest.raises(AssertionError):
                assert_same_bits(one[jnp.asarray([1, 0])], expected[::-1])


def test_what_may_meet_subnormal_numbers_is_encoded_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_FEWEST", 0)
    tiny = np.full((128, 128), 1e-30, np.float32)
    found = encode.encode([tiny], (128, 128))
    assert isinstance(found.codes, np.ndarray)
    same(found, codec.encode(tiny[None]))


# --- the files


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint in Qwen's form."""
    return write_fp8(tmp_path_factory.mktemp("fp8") / "hf", config=WIDE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("plain") / "hf", WIDE, dtype="bfloat16")


def digest_of(source: Any) -> str:
    with WeightsDigest() as collected:
        for block in source.blocks():
            collected.add(block)
        return combined(collected.parts())


def test_a_checkpoint_keeps_its_bytes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    src, scale_dtype = folder, "bfloat16"
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "60KB"])
    assert contents(tmp_path / "back") == contents(src)
    assert (tmp_path / "back" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert json.loads((tmp_path / "jax" / "manifest.json").read_text())["version"] == 7
    direct, converted = read_hf(src), read_converted(tmp_path / "jax")
    assert direct.quantization == converted.quantization == Quantization.in_fp8(quantizable(WIDE), scale_dtype)
    assert digest_of(direct) == digest_of(converted)
    for path in (src, tmp_path / "jax"):
        assert (
            f"FP8 in blocks of 128 x 128 with {scale_dtype} scales: attention.k_proj" in inspect(path)["quantization"]
        )
    for source in (direct, converted, dequantized(converted)):
        check_parts(source)
    # decoded from the converted folder as from the published one
    decoded = {block.layer: block.arrays for block in read_hf(src, dequantize=True).blocks()}
    for block in dequantized(converted).blocks():
        for path, array in block.arrays.items():
            assert_same_bits(array, decoded[block.layer][path])


def test_fused_experts_keep_their_bytes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Where gate and up have whole blocks of their own."""

    def fused(config: Any, width: int) -> pathlib.Path:
        src = write_fp8(tmp_path / f"from-{width}", config=config)
        arrays = {k: t.data.view(t.stored_dtype).reshape(t.shape).copy() for k, t in open_folder(src).items()}
        experts = {key: arrays.pop(key) for key in list(arrays) if ".experts." in key}
        for suffix in ("", "_scale_inv"):
            name = "model.layers.0.mlp.experts.{}.{}_proj.weight" + suffix
            of = lambda part, name=name: np.stack([experts[name.format(e, part)] for e in range(config.num_experts)])
            arrays[f"model.layers.0.mlp.experts.gate_up_proj{suffix}"] = np.concatenate([of("gate"), of("up")], 1)
            arrays[f"model.layers.0.mlp.experts.down_proj{suffix}"] = of("down")
        (tmp_path / str(width)).mkdir()
        write_file(tmp_path / str(width) / "model.safetensors", arrays, {"format": "pt"})
        (tmp_path / str(width) / "config.json").write_bytes((src / "config.json").read_bytes())
        return tmp_path / str(width)

    config = MIXED.replace(num_hidden_layers=1, mlp_only_layers=(), moe_intermediate_size=128)
    src = fused(config, 128)
    check_parts(read_hf(src))
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    assert contents(tmp_path / "back") == contents(src)
    apart = read_hf(tmp_path / "from-128").block(0).arrays
    for path, array in read_hf(src).block(0).arrays.items():
        assert_same_bits(array, apart[path])
    other = fused(config.replace(moe_intermediate_size=64), 64)
    with pytest.raises(UserError, match=r"gate_up_proj_scale_inv: expected|gate and up of whole blocks.*--dequantize"):
        read_hf(other)


def test_quantising_a_checkpoint(plain: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written, what transformers reads of it, and what a model holds that is quantised on the way."""
    import torch
    from transformers import FineGrainedFP8Config
    from transformers import Qwen3MoeForCausalLM as Theirs

    main(["hf2jax", str(plain), str(tmp_path / "jax"), "--quantize", "fp8"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    settings = json.loads((tmp_path / "back" / "config.json").read_text())["quantization_config"]
    assert settings == SETTINGS | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"]}
    on_the_way = quantized(read_hf(plain), "fp8")
    check_parts(on_the_way)
    converted = read_converted(tmp_path / "jax")
    assert digest_of(on_the_way) == digest_of(converted) == digest_of(read_hf(tmp_path / "back"))
    assert quantized(converted, "fp8") is converted
    for block in read_hf(plain).blocks():
        for path, array in block.arrays.items():
            if path in quantizable(WIDE):
                inner = array.shape[-1]
                matrices = array.reshape(-1, matrix_shape(WIDE, path)[-1] // inner, inner)
                packed = converted.block(block.layer).arrays
                scales = packed[f"{path}.scales"]
                same(
                    FP8(packed[f"{path}.codes"].reshape(matrices.shape), scales.reshape(-1, *scales.shape[-2:])),
                    codec.encode(matrices),
                )
    # on the device, in several pieces
    monkeypatch.setattr(encode, "_FEWEST", 0)
    monkeypatch.setattr(recoded, "group_size", lambda matrices, elements: max(1, matrices // 2))
    stacks = load_stacks(WIDE, on_the_way)
    for layer in range(2):
        for path, slot in layer_paths(WIDE, layer, converted.quantization):
            assert_same_bits(stacks[path][slot], converted.block(layer).arrays[path])
    theirs = Theirs.from_pretrained(
        make_even(tmp_path), dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True),
        device_map="cpu", use_safetensors=True, trust_remote_code=False,
    ).state_dict()  # fmt: skip
    ours = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "even-fp8", dequantize=True).params
    q_proj = theirs["model.layers.0.self_attn.q_proj.weight"].float().numpy()
    assert_same_bits(np.asarray(ours["attention.q_proj"][0], np.float32), q_proj)
    down = theirs["model.layers.0.mlp.experts.down_proj"].float().numpy()
    assert_same_bits(np.asarray(ours["sparse.down_proj"][0], np.float32), down)


def make_even(base: pathlib.Path) -> pathlib.Path:
    """A checkpoint that this package quantised, of widths that transformers can dequantise."""
    config = MIXED.replace(num_hidden_layers=1, mlp_only_layers=())
    make_checkpoint(base / "even", config, dtype="bfloat16")
    hf2jax(base / "even", base / "even-jax", quantize="fp8")
    main(["jax2hf", str(base / "even-jax"), str(base / "even-fp8")])
    return base / "even-fp8"


# --- the model


def test_the_model_equals_that_of_its_decoded_weights(tmp_path: pathlib.Path) -> None:
    config = WIDE.replace(num_hidden_layers=1, mlp_only_layers=())
    src = write_fp8(tmp_path / "hf", config=config)
    packed = Qwen3MoeForCausalLM.from_pretrained(src, "float32")
    assert packed.quantization == Quantization.in_fp8(quantizable(config), "bfloat16")
    decoded = Qwen3MoeForCausalLM.from_pretrained(src, "float32", dequantize=True)
    batch = make_batch(config, [[30, 18], [-8, 40]])
    tokens = Tokens(*(jnp.asarray(array) for array in (batch.input_ids, batch.position_ids, batch.segment_ids)))
    run = lambda params: forward(params, {}, tokens, config=config, options=Options()).hidden
    # one compilation for the two models
    both = jax.jit(lambda *models: [run(params) for params in models], compiler_options=COMPILER_OPTIONS)
    found, expected = jax.device_get(both(packed.params, decoded.params))
    assert relative_error(found, expected) <= bound("nf4_model")


def test_gradients_are_those_of_the_decoded_weights() -> None:
    """The weights are decoded again for the backward pass of experts and linear maps."""
    rng = np.random.default_rng(0)

    def drawn(seed: int, *shape: int) -> FP8Stack:
        codes, scales = random_fp8(shape, "float32", seed)
        return FP8Stack(jnp.asarray(codes), jnp.asarray(scales[:, None]), codes.shape, jnp.dtype("float32"))

    def run(x: Array, gate_up: Any, down: Any) -> Array:
        weights = ExpertWeights(gate_up, down, 0, trainable=False)
        (y,) = linears(x, LinearMap(down, jnp.int32(2), None, None))
        return jnp.sum(sorted_experts(x, routing, weights) ** 2) + jnp.sum(y**2)

    x, gate = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((24, 136), (4, 136)))
    routing = route(x, gate, num_experts_per_tok=2, norm_topk_prob=True)
    packed = drawn(0, 4, 272, 136), drawn(1, 4, 136, 136)
    plain = [jnp.stack([held[group] for group in range(4)]) for held in packed]
    both = jax.jit(lambda x: [jax.value_and_grad(run)(x, *stacks) for stacks in (packed, plain)])
    for found, expected in zip(*both(x), strict=True):
        assert relative_error(found, expected) <= bound("nf4_gradients")


def test_rows_in_fp8_give_the_numbers_of_the_reference() -> None:
    """Experts whose rows are quantised, too, forwards, and their gradients, on sides of which no block is whole."""
    import torch
    from torch import nn

    from torch_ref.experts import mixture
    from torch_ref.fp8 import multiply_in_fp8

    rng = np.random.default_rng(0)
    E, F, D = 4, 72, 200
    x, gate, d_out = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, D), (E, D), (24, D)))
    routing = route(jnp.asarray(x), jnp.asarray(gate), num_experts_per_tok=2, norm_topk_prob=True)
    drawn = [random_fp8(shape, "float32", n) for n, shape in enumerate(((E, 2 * F, D), (E, D, F)))]
    held = [
        FP8Stack(jnp.asarray(codes), jnp.asarray(scales[:, None]), codes.shape, jnp.dtype("float32"))
        for codes, scales in drawn
    ]

    def run(x: Array) -> Array:
        return sorted_experts(x, routing, ExpertWeights(held[0], held[1], 0, trainable=False))

    def both(x: Array) -> tuple[Array, Array]:
        value, pull = jax.vjp(run, x)
        return value, pull(jnp.asarray(d_out))[0]

    with forced(fp8_products="xla"):
        found = jax.device_get(jax.jit(both)(jnp.asarray(x)))
    experts: Any = nn.Module()
    for name, packed in zip(("gate_up_proj", "down_proj"), drawn, strict=True):
        weights = torch.from_numpy(codec.decode(FP8(*packed), np.dtype(np.float32)))
        setattr(experts, name, nn.Parameter(weights, requires_grad=False))
    experts.act_fn = nn.functional.silu

    def reference(implementation: str) -> list[np.ndarray]:
        experts.torch_ref_implementation = implementation
        rows = torch.from_numpy(x).requires_grad_()
        chosen = torch.from_numpy(np.array(routing.experts, np.int64))
        y = mixture(experts, rows, chosen, torch.from_numpy(np.array(routing.weights)))
        y.backward(torch.from_numpy(d_out))
        assert rows.grad is not None
        return [y.detach().numpy(), rows.grad.numpy()]

    plain = reference("grouped")
    multiply_in_fp8(experts)
    for ours, *theirs, unquantized in zip(found, reference("loop"), reference("grouped"), plain, strict=True):
        errors = [relative_error(ours, each) for each in theirs]
        assert max(errors) <= bound("fp8_rows") < 1e-2 < relative_error(ours, unquantized), errors


def test_the_forecast_counts_the_arrays(folder: pathlib.Path) -> None:
    model = Qwen3MoeForCausalLM.from_pretrained(folder)
    work = Workload(WIDE, LORA, 1, 8, "bfloat16", quantize="fp8", quantization=model.quantization)
    parts = {part.name: part.bytes for part in training_forecast(work).parts}
    assert parts["parameters (fp8)"] == sum(array.nbytes for array in model.params.values())
    assert parts["decoded weights"] > 0
    # on Hopper the kernels decode the experts themselves, with rows in FP8, too; projections are decoded first
    on_hopper = dataclasses.replace(work, config=EVEN, experts="mosaic", quantization=None)

    def decoded(name: Any) -> int:
        forecast = training_forecast(dataclasses.replace(on_hopper, fp8_products=name))
        return sum(part.bytes for part in forecast.parts if part.name == "decoded weights")

    assert decoded("registers") == decoded("mosaic") < decoded("decoded") == decoded("xla")


@pytest.mark.parametrize("command", ["generate", "capture"])
def test_commands_quantise_when_asked_to(command: str, plain: pathlib.Path) -> None:
    expected = Qwen3MoeForCausalLM.from_pretrained(plain, quantize="fp8").params
    found = model_of(command, plain, "--quantize", "fp8")
    assert found.keys() == expected.keys() and found["sparse.down_proj.codes"].dtype == codec.E4M3
    assert all(np.array_equal(found[path], expected[path]) for path in expected)


def test_training_holds_the_weights_in_fp8(plain: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    settings = TrainConfig(
        model=plain, data=tmp_path / "data.jsonl", output=tmp_path / "out", max_steps=1, batch_size=1, seq_length=16,
        quantize="fp8",
    )  # fmt: skip
    assert prepare(settings, None).source.quantization == Quantization.in_fp8(quantizable(WIDE))
    with pytest.raises(UserError, match="merge: expected weights to merge into, found FP8"):
        prepare(dataclasses.replace(settings, merge=True), None)


def test_weights_in_fp8_are_not_trained_in_full(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n')
    settings = TrainConfig(model=folder, data=tmp_path / "data.jsonl", output=tmp_path / "run", full=True, max_steps=1)
    with pytest.raises(UserError, match=r"full: expected weights that can be trained, found FP8 .*--dequantize"):
        prepare(settings, None)


# --- refusals


def in_place(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[pathlib.Path], None]:
    def edit(src: pathlib.Path) -> None:
        arrays = {k: t.data.view(t.stored_dtype).reshape(t.shape).copy() for k, t in open_folder(src).items()}
        change(arrays)
        write_file(src / "model.safetensors", arrays, {"format": "pt"})

    return edit


def put(key: str) -> Callable[[dict[str, np.ndarray]], None]:
    """The tensor `key` in FP8."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[key], arrays[f"{key}_scale_inv"] = random_fp8(arrays[key].shape, "bfloat16")

    return change


def plain_again(key: str) -> Callable[[dict[str, np.ndarray]], None]:
    """The tensor `key` in bfloat16."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[key] = arrays[key].astype(ml_dtypes.bfloat16)
        del arrays[f"{key}_scale_inv"]

    return change


EXPERT, Q_SCALE = "model.layers.0.mlp.experts.{}.up_proj.weight", "model.layers.1.self_attn.q_proj.weight_scale_inv"
REFUSED = {
    "a head": (put("lm_head.weight"), r"lm_head\.weight: expected 16 or 32 bits, found FP8; --dequantize"),
    "an expert": (plain_again(EXPERT.format(3)), r"3\.up_proj\.weight: expected FP8 as in .*0\.gate_proj.*found BF16"),
    "scales of two dtypes": (
        lambda arrays: arrays.update({Q_SCALE: arrays[Q_SCALE].astype(np.float32)}),
        r"expected one dtype of all scales, found BF16, F32; --dequantize",
    ),
    "no scales": (lambda arrays: arrays.pop(Q_SCALE), rf"missing tensor {Q_SCALE}"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_only_be_decoded_is_refused(case: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    change, says = REFUSED[case]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    in_place(change)(tmp_path)
    with pytest.raises(UserError, match=says) as caught:
        read_hf(tmp_path)
    assert "\n" not in str(caught.value)
    if "--dequantize" in says:
        assert read_hf(tmp_path, dequantize=True).quantization is None


def test_a_mixed_checkpoint_keeps_its_bytes(tmp_path: pathlib.Path) -> None:
    """Some layers in 16 bits, and a router in FP8."""
    config = WIDE.replace(mlp_only_layers=())
    src = write_fp8(tmp_path / "hf", config=config)
    in_place(plain_again("model.layers.1.self_attn.q_proj.weight"))(src)
    in_place(put("model.layers.0.mlp.gate.weight"))(src)
    main(["hf2jax", str(src), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    assert contents(tmp_path / "back") == contents(src)
    source = read_hf(src)
    assert source.quantization is not None
    assert source.quantization.unquantized == (("attention.q_proj", (1,)), ("sparse.gate", (1,)))
    assert "attention.q_proj (but not in layers 1)" in inspect(src)["quantization"]
    check_parts(source)
    stacks, whole = load_stacks(config, source), load_stacks(config, read_hf(src, dequantize=True))
    shape = parameter_specs(config)["sparse.gate"].shape
    held = jax.jit(lambda layer: FP8Stack.of(stacks, "sparse.gate", shape, "bfloat16")[layer])
    for layer in range(shape[0]):
        assert_same_bits(held(layer), np.asarray(whole["sparse.gate"][layer]))


def test_one_form_is_not_brought_into_another(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"quantize: expected plain weights or nf4, found fp8 .*--dequantize"):
        Qwen3MoeForCausalLM.from_pretrained(folder, quantize="nf4")
    with pytest.raises(UserError, match="quantize: expected 'nf4', 'fp8' or None, found 'fp4'"):
        Qwen3MoeForCausalLM.from_pretrained(folder, quantize="fp4")
    hf2jax(folder, tmp_path / "jax")
    with pytest.raises(UserError, match=r"adapter: expected weights .* merged into, found FP8 \(--dequantize"):
        main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "out"), "--adapter", str(tmp_path)])
    manifest = json.loads((tmp_path / "jax" / "manifest.json").read_text())
    manifest["fp8"]["scales"] = "float64"
    (tmp_path / "jax" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="fp8: expected scales and weights, found"):
        read_converted(tmp_path / "jax")


# --- the reference


def test_torch_ref_decodes_the_same_bytes(folder: pathlib.Path) -> None:
    import torch

    from torch_ref.fp8 import decode, read_decoded

    found = read_decoded(folder, torch.bfloat16)
    arrays = read_hf(folder, dequantize=True).block(0).arrays
    for key, expected in (
        ("self_attn.q_proj", arrays["attention.q_proj"]),
        ("mlp.experts.5.up_proj", arrays["sparse.gate_up_proj"][5, 64:]),
    ):
        assert_same_bits(found[f"model.layers.0.{key}.weight"].float().numpy(), expected.astype(np.float32))
    codes, scales = (torch.from_numpy(a) for a in (np.zeros((130, 130), np.uint8), np.ones((1, 2), np.float32)))
    with pytest.raises(RuntimeError):  # negative control: another number of blocks
        decode(codes.view(torch.float8_e4m3fn), scales, torch.float32)


def load_torch_ref(folder: pathlib.Path) -> Any:
    from torch_ref import FastQwen3MoeModel

    model, _ = FastQwen3MoeModel.from_pretrained(
        str(folder), max_seq_length=None, dtype="float32", load_in_4bit=False, device_map="cpu", fix_tokenizer=False
    )
    return model


def test_torch_ref_loads_a_checkpoint_in_fp8(folder: pathlib.Path) -> None:
    import torch

    model = load_torch_ref(folder)
    arrays = read_hf(folder, "float32", dequantize=True).block(0).arrays
    state = model.state_dict()
    assert_same_bits(state["model.layers.0.mlp.experts.gate_up_proj"].numpy(), arrays["sparse.gate_up_proj"])
    assert_same_bits(state["model.layers.0.self_attn.q_proj.weight"].numpy(), arrays["attention.q_proj"])
    assert state["model.embed_tokens.weight"].dtype == torch.float32


def test_torch_ref_keeps_the_generation_settings_of_a_checkpoint_in_fp8(folder: pathlib.Path, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [7, 9], "top_k": 3}', encoding="utf-8")
    found = load_torch_ref(tmp_path / "model").generation_config
    assert (found.eos_token_id, found.top_k) == ([7, 9], 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), "expected model.norm.weight"),
        (lambda t: t.pop("model.layers.0.self_attn.q_proj.weight_scale_inv"), "expected .*q_proj.weight_scale_inv"),
        (lambda t: t.update({"other.weight": t["model.norm.weight"].clone()}), "unexpected tensor other.weight"),
        (lambda t: t.update({"other.weight_scale_inv": t["model.norm.weight"].clone()}), "unexpected tensor other"),
    ],
    ids=["a weight too few", "a weight without scales", "a weight too many", "scales of no weight"],
)
def test_torch_ref_refuses_other_tensors(change: Any, message: str, folder: pathlib.Path, tmp_path) -> None:
    """transformers would draw what is missing at random, with a warning."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        load_torch_ref(tmp_path / "model")
