"""The forms in which published checkpoints hold their weights: FP8, NF4 in some layers only, several dtypes."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert import fp8
from convert.__main__ import main
from convert.hf2jax import hf2jax, read_hf
from convert.names import Row
from convert.report import inspect
from convert.safetensors_io import Tensor, open_folder, write_file
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.doctor import report as doctor
from jaxmoe.errors import UserError
from jaxmoe.generate import __main__ as generate_command
from jaxmoe.generate.engine import Generator
from jaxmoe.generate.sampling import Sampling
from jaxmoe.memory import Workload, training_forecast
from jaxmoe.model.decoder import forward
from jaxmoe.model.interface import Options, Tokens
from jaxmoe.nf4.recode import quantized
from jaxmoe.nf4.stack import NF4Stack
from jaxmoe.parameters import Quantization, quantizable, stored_specs
from jaxmoe.routing import __main__ as routing_command
from jaxmoe.routing import capture as routing_capture
from jaxmoe.store.converted import read_converted
from jaxmoe.store.digest import WeightsDigest
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.prepare import prepare
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model, loss_and_gradients
from jaxmoe.weight_form import weight_form
from peers.configs import random_adapters
from peers.make_checkpoint import make_checkpoint
from tests.parity import COMPILER_OPTIONS, make_batch, relative_error
from tests.parts import check_parts
from tests.test_convert import contents
from tests.test_parity_gradients import training_batch
from tests.test_quantize import LORA, MIXED, assert_same_bits, edit_config, stacked
from tests.tolerances import bound

FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
    "modules_to_not_convert": ["lm_head"],
}


def tensor(name: str, code: str, array: np.ndarray) -> Tensor:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return Tensor(name, pathlib.Path("x"), code, array.shape, data)


def random_fp8(shape: tuple[int, ...], scale_dtype: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(codes, scales) that no two blocks share."""
    rng = np.random.default_rng(seed)
    codes = rng.normal(0, 60, shape).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    *lead, out, inner = shape
    scales = rng.uniform(1e-3, 1e-2, (*lead, -(-out // 128), -(-inner // 128)))
    return codes, scales.astype(scale_dtype)


def decoded(codes: np.ndarray, scales: np.ndarray, dtype: str) -> np.ndarray:
    code = {"float32": "F32", "bfloat16": "BF16"}[scales.dtype.name]
    return fp8.decode_fp8(tensor("w", "F8_E4M3", codes), tensor("s", code, scales), np.dtype(dtype))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
def test_fp8_is_decoded_as_transformers_does(scale_dtype: str, dtype: str) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    for shape in ((256, 384), (3, 128, 256)):
        codes, scales = random_fp8(shape, scale_dtype)
        theirs = Fp8Dequantize(SimpleNamespace())._dequantize_one(
            torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
            torch.from_numpy(scales.astype(np.float32)).to(getattr(torch, scale_dtype)),
            getattr(torch, dtype),
        )
        found = decoded(codes, scales, dtype)
        assert_same_bits(found.astype(np.float32), theirs.float().numpy())
        assert found.dtype == dtype


@pytest.mark.parametrize("shape", [(200, 300), (129, 130), (2, 64, 192)])
def test_the_last_blocks_of_fp8_may_be_partial(shape: tuple[int, ...]) -> None:
    import torch
    from transformers.integrations import finegrained_fp8 as theirs

    codes, scales = random_fp8(shape, "float32")
    whole = np.repeat(np.repeat(scales, 128, -2), 128, -1)[..., : shape[-2], : shape[-1]]
    found = decoded(codes, scales, "float32")
    assert_same_bits(found, codes.astype(np.float32) * whole)
    with pytest.raises(AssertionError):  # negative control: the blocks' order matters
        assert_same_bits(decoded(codes, scales[..., ::-1], "float32"), codes.astype(np.float32) * whole)

    arrays = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn), torch.from_numpy(scales)
    if hasattr(theirs, "_dequantize_fp8_weight"):  # what its FP8 layers compute; 5.17 has it in GPU kernels only
        of_layers = theirs._dequantize_fp8_weight(*arrays, [128, 128], torch.float32)
        assert_same_bits(found, of_layers.numpy())
    # Its dequantize=True divides into equal blocks.
    equal = lambda: theirs.Fp8Dequantize(SimpleNamespace())._dequantize_one(*arrays, torch.float32)
    if shape[-2] % scales.shape[-2] or shape[-1] % scales.shape[-1]:
        with pytest.raises(ValueError, match="not divisible"):
            equal()
    else:
        assert not np.array_equal(equal().numpy(), found)


def test_a_notice_says_that_transformers_reads_edges_otherwise(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    shapes = {"even": (256, 128), "one block": (64, 100), "uneven": (200, 128)}
    assert fp8.uneven_blocks(
        shapes, {k: Tensor(k, tmp_path, "F8_E4M3", v, np.empty(0)) for k, v in shapes.items()}
    ) == ["uneven"]
    read_hf(write_fp8(tmp_path / "even"), dequantize=True)
    assert not [record for record in caplog.records if "FP8 blocks" in record.message]
    read_hf(write_fp8(tmp_path / "uneven", config=MIXED.replace(hidden_size=192)), dequantize=True)
    (said,) = [record.message for record in caplog.records if "FP8 blocks" in record.message]
    assert "self_attn.q_proj.weight [64, 192]" in said and "\n" not in said


def write_fp8(folder: pathlib.Path, scale_dtype: str = "bfloat16", config: Qwen3MoeConfig = MIXED) -> pathlib.Path:
    """A checkpoint in Qwen's FP8 layout; the projections' values are new."""
    import torch
    from safetensors.torch import save_file

    make_checkpoint(folder, config, dtype="bfloat16")
    tensors: dict[str, Any] = {}
    for seed, (key, stored) in enumerate(open_folder(folder).items()):
        if not key.endswith("_proj.weight"):
            tensors[key] = torch.from_numpy(stored.read().astype(np.float32)).bfloat16()
            continue
        codes, scales = random_fp8(stored.shape, scale_dtype, seed)
        tensors[key] = torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn)
        tensors[f"{key}_scale_inv"] = torch.from_numpy(scales.astype(np.float32)).to(getattr(torch, scale_dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, lambda raw: raw.update(quantization_config=FP8, dtype="bfloat16"))
    return folder


def test_an_fp8_checkpoint(tmp_path: pathlib.Path) -> None:
    import torch
    from transformers import FineGrainedFP8Config
    from transformers import Qwen3MoeForCausalLM as Theirs

    src = write_fp8(tmp_path / "hf")
    check_parts(read_hf(src, dequantize=True))
    assert "FP8" in inspect(src)["quantization"]
    main(["hf2jax", str(src), str(tmp_path / "jax"), "--dequantize"])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    raw = json.loads((tmp_path / "back" / "config.json").read_text())
    assert raw["dtype"] == "bfloat16" and "quantization_config" not in raw
    theirs = Theirs.from_pretrained(
        src,
        dtype=torch.bfloat16,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        device_map="cpu",
        use_safetensors=True,
        trust_remote_code=False,
    ).state_dict()
    plain = Theirs.from_pretrained(
        tmp_path / "back", dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False
    ).state_dict()
    assert plain.keys() == theirs.keys()
    assert all(torch.equal(plain[name], theirs[name]) for name in plain)
    direct = Qwen3MoeForCausalLM.from_pretrained(src, dequantize=True).params
    converted = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "jax").params
    assert all(direct[name].dtype == "bfloat16" and np.array_equal(direct[name], converted[name]) for name in direct)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"w": ("F8_E4M3", (64, 64))}, "missing tensor w_scale_inv"),
        ({"w": ("F8_E4M3", (64, 64)), "w_scale_inv": ("F32", (1,))}, r"expected F32 or BF16 \[1, 1\]"),
        ({"w": ("F8_E4M3", (64, 64)), "w_scale_inv": ("F8_E8M0", (1, 1))}, "found F8_E8M0"),
        ({"w": ("BF16", (64, 64))}, "expected weights in FP8 .* remove quantization_config"),
    ],
)
def test_fp8_without_its_scales_is_refused(tensors: dict[str, Any], says: str) -> None:
    made = {k: Tensor(k, pathlib.Path("x"), code, shape, np.empty(0)) for k, (code, shape) in tensors.items()}
    with pytest.raises(UserError, match=says):
        fp8.check_fp8("x", [Row("w", (64, 64), "w", ())], made)


# --- forms that are refused: what config.json says, and what the message must name
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ (bits 4)"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "AWQ (bits 4)"),
    ({"quantization_config": {"quant_method": "eetq"}}, "EETQ"),
    ({"quantization_config": {"quant_method": "hqq"}}, "HQQ"),
    ({"quantization_config": {"quant_method": "torchao"}}, "torchao"),
    ({"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}, "float-quantized"),
    ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, "NVFP4"),
    ({"quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
    ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes in another form than NF4 (load_in_8bit True)"),
    ({"quantization_config": {"quant_method": "new"}}, "'new'"),
    ({"quantization_config": FP8 | {"fmt": "e5m2"}}, "fmt e5m2"),
    ({"quantization_config": FP8 | {"scale_fmt": "ue8m0"}}, "ue8m0"),
    ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "static"),
    ({"quantization_config": FP8 | {"weight_block_size": None}}, "FP8"),
    ({"quantization": {"bits": 4}, "quantization_config": {"group_size": 64, "bits": 4}}, "MLX"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return make_checkpoint(tmp_path_factory.mktemp("forms") / "hf", MIXED, dtype="bfloat16")


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_another_form_is_refused_with_what_to_download(
    changes: dict[str, Any], says: str, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(MIXED.to_hf() | changes))
    with pytest.raises(UserError) as caught:
        read_hf(tmp_path, dequantize=True)
    message = str(caught.value)
    assert says in message and "download" in message and "\n" not in message


def test_nothing_about_the_form_is_said_by_null(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    plain = {"quantization": None, "quantization_config": None}
    (tmp_path / "config.json").write_text(json.dumps(MIXED.to_hf() | plain))
    assert read_hf(tmp_path).quantization is None


@pytest.mark.parametrize(
    ("settings", "form"),
    [
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "nf4"),  # of bitsandbytes, without its name
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, None),
        ({"quant_method": "gptq", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, None),
    ],
)
def test_settings_of_bitsandbytes_need_no_method(settings: dict[str, Any], form: str | None) -> None:
    assert weight_form(settings) == form


@pytest.mark.parametrize("form", ["nf4", "fp8"])
def test_a_form_that_only_the_config_names(form: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """As a merge into 16 bits may leave it."""
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (tmp_path / "model.safetensors").hardlink_to(folder / "model.safetensors")
    settings = {"quantization_config": nf4 if form == "nf4" else FP8}
    (tmp_path / "config.json").write_text(json.dumps(MIXED.to_hf() | settings))
    with pytest.raises(UserError, match=f"expected .* in {form.upper()}.*, found none; .*remove quantization_config"):
        read_hf(tmp_path, dequantize=form == "fp8")


def test_gguf_alone_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").touch()
    with pytest.raises(UserError, match=r"Q4_K_M.gguf \(GGUF is not supported\); download"):
        read_hf(tmp_path)


# --- mixed stacks
LEFT = {1: ("self_attn.q_proj", "mlp.up_proj"), 2: ("mlp.experts", "self_attn.v_proj"), 3: ("self_attn.v_proj",)}


def write_mixed(folder: pathlib.Path, base: pathlib.Path, left: Mapping[int, Sequence[str]]) -> pathlib.Path:
    """The checkpoint `folder` in NF4, with the modules `left` in bfloat16 as a "dynamic" upload has them."""
    hf2jax(folder, base / "nf4", quantize="nf4")
    main(["jax2hf", str(base / "nf4"), str(base / "mixed")])
    names = [f"model.layers.{layer}.{name}" for layer, modules in left.items() for name in modules]
    is_left = lambda key: any(key.startswith(f"{name}.") for name in names)
    packed, plain = open_folder(base / "mixed"), open_folder(folder)
    arrays = {k: t.data.view(t.stored_dtype).reshape(t.shape).copy() for k, t in packed.items() if not is_left(k)}
    arrays |= {key: stored.read() for key, stored in plain.items() if is_left(key)}
    write_file(base / "mixed" / "model.safetensors", arrays, {"format": "pt"})
    edit_config(base / "mixed", lambda raw: raw["quantization_config"]["llm_int8_skip_modules"].extend(names))
    return base / "mixed"


@pytest.fixture(scope="module")
def mixed(folder: pathlib.Path) -> pathlib.Path:
    return write_mixed(folder, folder.parent, LEFT)


def test_a_mixed_checkpoint_keeps_its_bytes(mixed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    main(["hf2jax", str(mixed), str(tmp_path / "jax")])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back"), "--max-shard-size", "60KB"])
    assert contents(tmp_path / "back") == contents(mixed)
    assert (tmp_path / "back" / "config.json").read_bytes() == (mixed / "config.json").read_bytes()
    assert json.loads((tmp_path / "jax" / "manifest.json").read_text())["version"] == 6
    for path in (mixed, tmp_path / "jax"):
        assert "sparse.down_proj (but not in layers 2)" in inspect(path)["quantization"]
        assert "attention.v_proj (but not in layers 2, 3)" in inspect(path)["quantization"]
    direct = Qwen3MoeForCausalLM.from_pretrained(mixed)
    converted = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "jax")
    assert direct.quantization == converted.quantization == read_converted(tmp_path / "jax").quantization
    assert all(np.array_equal(direct.params[name], converted.params[name]) for name in direct.params)
    # the memory is the files': no layer is held twice
    work = Workload(MIXED, LORA, 1, 8, "bfloat16", quantize="nf4", quantization=direct.quantization)
    parts = {part.name: part.bytes for part in training_forecast(work).parts}
    assert parts["parameters (nf4)"] == sum(array.nbytes for array in direct.params.values())
    for path in (mixed, tmp_path / "jax"):
        shown = doctor.forecast(doctor.DoctorConfig(model=str(path), lora_r=2, seq_length=8))
        assert (
            next(part for part in shown["training"].parts if part.name == "parameters (nf4)").bytes
            == (parts["parameters (nf4)"])
        )
    assert direct.params["sparse.gate_up_proj.weight"].shape == (1, 8, 128, 64)
    assert direct.params["sparse.gate_up_proj.codes"].shape[0] == 2
    # what is left is not recoded, whatever is asked for
    source = read_hf(mixed)
    recoded = quantized(source).quantization
    assert recoded is not None and source.quantization is not None
    assert recoded.unquantized == source.quantization.unquantized
    main(["hf2jax", str(mixed), str(tmp_path / "whole"), "--dequantize"])
    assert read_converted(tmp_path / "whole").quantization is None


def test_a_mixed_model_trains_as_its_decoded_weights(mixed: pathlib.Path) -> None:
    model, whole = Qwen3MoeForCausalLM.from_pretrained(mixed, "float32"), stacked(read_hf(mixed, "float32"))
    batch = jax.tree.map(jnp.asarray, training_batch(make_batch(MIXED, [[30, 18], [-8, 40]])))
    adapters = {path: jnp.asarray(array) for path, array in random_adapters(MIXED, LORA).items()}
    step = Model(MIXED, LORA, "float32", "low-memory")
    outcome = lambda params: loss_and_gradients(step, params, adapters, batch, next_token_objective(0.01))
    # one compilation for the two models
    both = jax.jit(lambda *models: [outcome(params) for params in models], compiler_options=COMPILER_OPTIONS)
    found, expected = jax.device_get(both(model.params, whole.params))
    assert relative_error(found.loss, expected.loss) <= bound("nf4_model")
    for path, gradient in found.gradients.items():
        assert np.any(expected.gradients[path]), path
        assert relative_error(gradient, expected.gradients[path]) <= bound("nf4_gradients"), path
    dequantized = Qwen3MoeForCausalLM.from_pretrained(mixed, "float32", dequantize=True).params
    assert all(np.array_equal(whole.params[path], dequantized[path]) for path in whole.params)


@pytest.mark.usefixtures("quick_compilation")
def test_a_mixed_stack_writes_what_its_decoded_weights_would(tmp_path: pathlib.Path) -> None:
    """Every greedy token is the best of a forward pass over all tokens before it, with the weights decoded."""
    config = MIXED.replace(num_hidden_layers=2, mlp_only_layers=())
    base = make_checkpoint(tmp_path / "hf", config, dtype="bfloat16")
    mixed = write_mixed(base, tmp_path, {1: ("self_attn.q_proj", "mlp.experts")})
    prompts = [[72, 101, 108, 108, 111], [97]]
    generator = Generator(Qwen3MoeForCausalLM.from_pretrained(mixed, "float32"))
    found = generator.generate(prompts, 12, Sampling())
    whole = Qwen3MoeForCausalLM.from_pretrained(mixed, "float32", dequantize=True)
    ids = np.zeros((2, 32), np.int32)
    for row, prompt, tokens in zip(ids, prompts, found, strict=True):
        row[: len(prompt) + len(tokens)] = [*prompt, *tokens]
    best = np.asarray(whole(jnp.asarray(ids)).logits.argmax(-1))
    for row, prompt, tokens in zip(best, prompts, found, strict=True):
        assert row[len(prompt) - 1 : len(prompt) - 1 + len(tokens)].tolist() == tokens
    assert len(set(found[0])) > 3


class Reached(Exception):
    """Ends a command once its model has been read."""


def model_of(command: str, path: pathlib.Path, *flags: str) -> dict[str, Any]:
    """The weights that a command reads."""
    found: list[Any] = []

    def reached(model: Any, *_: Any, **__: Any) -> None:
        found.append(model)
        raise Reached

    (path.parent / "text.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    words = {
        "generate": ["--prompt", "a"],
        "capture": ["--data", str(path.parent / "text.jsonl"), "--out", str(path.parent / "captured")],
    }[command]
    run = generate_command.main if command == "generate" else lambda words: routing_command.main(["capture", *words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_command, "Generator", reached)
        patch.setattr(routing_capture, "capture", reached)
        with pytest.raises(Reached):
            run(["--model", str(path), *flags, *words])
    return found[0].params


@pytest.mark.parametrize("command", ["generate", "capture"])
def test_commands_decode_weights_when_asked_to(command: str, mixed: pathlib.Path) -> None:
    expected = Qwen3MoeForCausalLM.from_pretrained(mixed, dequantize=True).params
    found = model_of(command, mixed, "--dequantize")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[path], expected[path]) for path in expected)
    assert "sparse.down_proj.codes" in model_of(command, mixed)


def test_training_decodes_weights_when_asked_to(mixed: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    settings = TrainConfig(
        model=mixed,
        data=tmp_path / "data.jsonl",
        output=tmp_path / "out",
        max_steps=1,
        batch_size=1,
        seq_length=16,
        dequantize=True,
        merge=True,
    )
    source = prepare(settings, None).source
    assert source.quantization is None
    weights = source.load(lambda *_: None, WeightsDigest(), ()).frozen
    expected = Qwen3MoeForCausalLM.from_pretrained(mixed, dequantize=True).params
    assert weights.keys() == expected.keys()
    assert all(np.array_equal(weights[path], expected[path]) for path in expected)
    with pytest.raises(UserError, match="merge: expected weights to merge into, found NF4"):
        prepare(dataclasses.replace(settings, dequantize=False), None)


def test_a_stack_of_one_form_looks_nothing_up() -> None:
    """The program of a model whose layers are all in NF4 is that of code that knows no mixed stacks, to the letter."""
    uniform = Quantization(quantizable(MIXED))
    mixed = dataclasses.replace(uniform, unquantized=(("attention.q_proj", (1,)),))

    def text(quantization: Quantization) -> str:
        params = {
            path: jax.ShapeDtypeStruct(spec.shape, spec.dtype or "bfloat16")
            for path, spec in stored_specs(MIXED, quantization).items()
        }
        ids = jax.ShapeDtypeStruct((1, 16), "int32")
        run = lambda params, *tokens: forward(params, {}, Tokens(*tokens), config=MIXED, options=Options()).hidden
        return jax.jit(run).lower(params, ids, ids, ids).as_text()

    plain = text(uniform)
    assert text(mixed) != plain and text(mixed).count("stablehlo.case") > plain.count("stablehlo.case")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NF4Stack, "__getitem__", NF4Stack._decoded)
        assert text(uniform) == plain


EXPERTS_IN_TWO_FORMS = {
    "one expert's down": ((5, "down_proj"), "BF16", "0.down_proj", "NF4", "down_proj"),
    "the first expert's down": ((0, "down_proj"), "NF4", "0.down_proj", "BF16", "down_proj"),
    "one expert's up": ((5, "up_proj"), "BF16", "0.gate_proj", "NF4", "gate_proj and up_proj"),
    "up, not gate": ((None, "up_proj"), "BF16", "0.gate_proj", "NF4", "gate_proj and up_proj"),
}


@pytest.mark.parametrize("case", EXPERTS_IN_TWO_FORMS)
def test_experts_of_one_layer_in_two_forms(
    case: str, mixed: pathlib.Path, folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (left, name), found, other, expected, together = EXPERTS_IN_TWO_FORMS[case]
    packed, plain = open_folder(mixed), open_folder(folder)
    keys = [f"model.layers.3.mlp.experts.{e}.{name}.weight" for e in ([left] if left is not None else range(8))]
    arrays = {k: t.data.view(t.stored_dtype).reshape(t.shape) for k, t in packed.items()}
    arrays = {k: array for k, array in arrays.items() if not any(k.startswith(key) for key in keys)}
    write_file(tmp_path / "model.safetensors", arrays | {k: plain[k].read() for k in keys}, {"format": "pt"})
    (tmp_path / "config.json").write_bytes((mixed / "config.json").read_bytes())
    says = (
        rf"expected {expected} as in .*\.3\.mlp\.experts\.{other}\.weight, found {found} \(in one layer, {together} of"
    )
    with pytest.raises(UserError, match=says) as caught:
        read_hf(tmp_path)
    assert "--dequantize" in str(caught.value) and "\n" not in str(caught.value)
    experts = read_hf(tmp_path, dequantize=True).block(3).arrays
    decoded = experts["sparse.down_proj"] if name == "down_proj" else experts["sparse.gate_up_proj"][:, 64:]
    for key in keys:
        assert_same_bits(decoded[int(key.split(".")[5])], plain[key].read())


def test_a_mixed_upload_equals_transformers(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("bitsandbytes")
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    src = make_checkpoint(tmp_path / "hf", MIXED)
    skip = ["lm_head", "model.layers.1.self_attn.q_proj", "model.layers.2.self_attn", "model.layers.1.mlp.up_proj"]
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=skip,
    )
    load = functools.partial(AutoModelForCausalLM.from_pretrained, use_safetensors=True, trust_remote_code=False)
    load(src, dtype=torch.float32, quantization_config=settings, device_map="cpu").save_pretrained(tmp_path / "bnb")
    ids = np.random.default_rng(0).integers(0, 320, (1, 24))
    theirs = load(tmp_path / "bnb", device_map="cpu").dequantize().float()
    expected = theirs(torch.tensor(ids)).logits.detach().numpy()
    model = Qwen3MoeForCausalLM.from_pretrained(tmp_path / "bnb", "float32")
    assert model.quantization is not None and len(model.quantization.unquantized) == 4
    assert relative_error(np.asarray(model(jnp.asarray(ids)).logits), expected) <= bound("parity_fp32")


# --- stacks of several dtypes
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_of_different_dtypes_are_cast(dtype: str, tmp_path: pathlib.Path) -> None:
    src = tmp_path / "hf"
    make_checkpoint(src, MIXED, dtype="bfloat16")
    rng = np.random.default_rng(0)
    wide = lambda key: ".layers.2." in key or key.endswith("mlp.gate.weight")
    arrays = {key: stored.read().copy() for key, stored in open_folder(src).items()}
    arrays |= {k: rng.standard_normal(a.shape).astype(np.float32) for k, a in arrays.items() if wide(k)}
    write_file(src / "model.safetensors", arrays, {"format": "pt"})
    for read in (read_hf, Qwen3MoeForCausalLM.from_pretrained):
        with pytest.raises(UserError, match=r"layers\.2\..*found F32 \(so in layer 2; --dtype, or dtype=") as caught:
            read(src)
        assert "\n" not in str(caught.value)
    main(["hf2jax", str(src), str(tmp_path / "jax"), "--dtype", dtype])
    main(["jax2hf", str(tmp_path / "jax"), str(tmp_path / "back")])
    back = open_folder(tmp_path / "back")
    assert back.keys() == arrays.keys()
    for key, array in arrays.items():
        assert_same_bits(back[key].read(), array.astype(dtype))
    params = Qwen3MoeForCausalLM.from_pretrained(src, dtype=dtype).params
    assert all(array.dtype == dtype for array in params.values())
    assert_same_bits(params["attention.q_proj"][2], arrays["model.layers.2.self_attn.q_proj.weight"].astype(dtype))


def test_a_router_in_float32_keeps_its_bytes(tmp_path: pathlib.Path) -> None:
    src = make_checkpoint(tmp_path / "hf", MIXED, dtype="bfloat16")
    read = {key: stored.read().copy() for key, stored in open_folder(src).items()}
    arrays = {key: a.astype(np.float32) if key.endswith("mlp.gate.weight") else a for key, a in read.items()}
    write_file(src / "model.safetensors", arrays, {"format": "pt"})
    source = read_hf(src)
    assert {path for path, dtype in source.dtypes.items() if dtype == np.float32} == {"sparse.gate"}
