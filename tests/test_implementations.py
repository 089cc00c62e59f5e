"""Which implementation is chosen, by device, by operands or by force; the devices are simulated."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.errors import UserError
from jaxmoe.model.selection import fallbacks, jax_without_kernels
from jaxmoe.ops import attention_cudnn, implementations
from jaxmoe.ops.implementations import OPERATIONS, Device, choose, default_device, explain, forced
from jaxmoe.presets import PRESETS

CPU = Device("cpu", "cpu", None)
HOPPER = Device("gpu", "NVIDIA H200", (9, 0))
BLACKWELL = Device("gpu", "NVIDIA B200", (10, 0))
AMPERE = Device("gpu", "NVIDIA A100", (8, 0))
TURING = Device("gpu", "Tesla T4", (7, 5))


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    for operation in OPERATIONS:
        monkeypatch.delenv(f"JAXMOE_{operation.upper()}", raising=False)


TRITON_KERNELS = ("cached attention", "few rows")


def on(monkeypatch, device):
    monkeypatch.setattr(implementations, "default_device", lambda: device)


@pytest.mark.parametrize(
    ("device", "attention", "grouped_matmul", "one_pass", "triton_kernels"),
    [
        (CPU, "blocks", "tiled", "xla", "xla"),
        (HOPPER, "cudnn", "mosaic", "mosaic", "triton"),
        (BLACKWELL, "cudnn", "mma", "mosaic", "triton"),
        (AMPERE, "flash", "mma", "mosaic", "triton"),
        (TURING, "blocks", "tiled", "xla", "xla"),
    ],
    ids=lambda value: value.kind if isinstance(value, Device) else value,
)
def test_the_device_decides(monkeypatch, device, attention, grouped_matmul, one_pass, triton_kernels):
    on(monkeypatch, device)
    assert {(what, name) for what, name, _ in explain()} == {
        ("attention", attention),
        ("context attention", "cudnn" if attention == "cudnn" else "tiles"),
        ("grouped matmul", grouped_matmul),
        ("fp8 products", "registers" if grouped_matmul == "mosaic" else "decoded"),
        *((what, "mosaic" if grouped_matmul == "mosaic" else "xla") for what in ("row copies", "top experts")),
        ("nf4 products", "mosaic" if grouped_matmul == "mosaic" else "decoded"),
        *((what, one_pass) for what in ("norm rotary", "swiglu gradient")),
        *((what, triton_kernels) for what in TRITON_KERNELS),
    }


def test_a_newer_card_runs_what_an_older_one_would(monkeypatch):
    h200 = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(implementations.jax, "local_devices", lambda **_: [h200])
    assert default_device() == HOPPER and choose("attention").name == "cudnn"
    monkeypatch.setenv("JAXMOE_COMPUTE_CAPABILITY", "8.0")
    assert default_device().compute_capability == (8, 0)
    assert (choose("attention").name, choose("grouped_matmul").name) == ("flash", "mma")
    for text in ("10.0", "8", "sm_80"):
        monkeypatch.setenv("JAXMOE_COMPUTE_CAPABILITY", text)
        with pytest.raises(UserError, match=f"at most the device's 9.0; found '{text}'"):
            default_device()
    monkeypatch.setattr(h200, "compute_capability", "gfx90a")
    with pytest.raises(UserError, match=r"expected a compute capability such as 8\.0 and an NVIDIA GPU"):
        default_device()


def test_an_experiment_is_selected_by_name_only(monkeypatch):
    for device in (CPU, TURING, HOPPER):
        on(monkeypatch, device)
        assert choose("grouped_matmul").name != "ragged_dot"
        with forced(grouped_matmul="ragged_dot"):
            assert choose("grouped_matmul").name == "ragged_dot"


def test_without_the_triton_backend_xla_takes_over(monkeypatch):
    on(monkeypatch, HOPPER)
    monkeypatch.setattr(implementations, "find_spec", lambda name: None)
    for operation in TRITON_KERNELS:
        choice = choose(operation.replace(" ", "_"))
        assert choice.name == "xla" and "triton needs Pallas' Triton backend, which jax" in choice.reason


def test_the_reason_names_what_stood_in_the_way(monkeypatch):
    on(monkeypatch, AMPERE)
    reason = choose("attention").reason
    assert (
        "cudnn needs an NVIDIA GPU of compute capability 9.0 or newer, found NVIDIA A100, compute capability 8.0"
        in (reason)
    )


def test_operands_rule_out(monkeypatch):
    on(monkeypatch, HOPPER)
    full, half = (jax.ShapeDtypeStruct((1, 64, 4, 128), dtype) for dtype in ("float32", "bfloat16"))
    selected = choose("attention", full, full)
    assert selected.name == "blocks"
    assert "cudnn needs 16-bit floats, found float32" in selected.reason
    monkeypatch.setattr(attention_cudnn.fused, "check_cudnn_version", lambda: 91200)
    assert choose("attention", half, half).name == "cudnn"


def test_forced_by_the_environment_and_by_the_context(monkeypatch):
    on(monkeypatch, HOPPER)
    monkeypatch.setenv("JAXMOE_GROUPED_MATMUL", "tiled")
    assert choose("grouped_matmul").name == "tiled"
    assert "JAXMOE_GROUPED_MATMUL" in choose("grouped_matmul").reason
    with forced(grouped_matmul="mosaic"):  # the nearer one wins
        assert choose("grouped_matmul").name == "mosaic"
        with forced(attention="blocks"):
            assert (choose("grouped_matmul").name, choose("attention").name) == ("mosaic", "blocks")
        assert choose("attention").name == "cudnn"
    assert choose("grouped_matmul").name == "tiled"


def test_forcing_what_cannot_run_is_an_error(monkeypatch):
    on(monkeypatch, CPU)
    with forced(grouped_matmul="mosaic"), pytest.raises(UserError, match=r"^forced grouped_matmul: mosaic cannot run"):
        choose("grouped_matmul")
    on(monkeypatch, HOPPER)
    monkeypatch.setenv("JAXMOE_ATTENTION", "cudnn")
    with pytest.raises(UserError, match=r"^JAXMOE_ATTENTION: cudnn cannot run here: needs 16-bit floats"):
        choose("attention", *[jax.ShapeDtypeStruct((1, 64, 4, 128), "float32")] * 2)


def test_a_gpu_that_goes_without_a_kernel_is_told(monkeypatch):
    config = PRESETS["qwen3-30b-a3b"]
    on(monkeypatch, TURING)
    attention, experts = fallbacks(config, "bfloat16")
    assert attention.startswith("attention uses the slow fallback: pure JAX in chunks of queries")
    assert experts.startswith("the experts use the slow fallback: pure JAX loop")
    assert "mosaic needs an NVIDIA GPU of compute capability 9.x, found Tesla T4" in experts
    assert "mma needs an NVIDIA GPU of compute capability 8.0 or newer" in experts
    dense = config.replace(mlp_only_layers=tuple(range(config.num_hidden_layers)))
    assert fallbacks(dense, "bfloat16") == [attention]
    assert "over pairs of tiles" in fallbacks(config, "bfloat16", MeshShape(context=2))[0]
    on(monkeypatch, AMPERE)  # has kernels, where jax is new enough for them
    assert all("needs jax 0.11 or newer (Python 3.12 or newer)" in line for line in fallbacks(config, "bfloat16"))
    on(monkeypatch, HOPPER)
    attention, experts = fallbacks(config, "float32")
    assert "found float32" in attention
    if "found float32" in experts:  # otherwise both say that jax is too old for the kernels
        assert "experts" not in "".join(fallbacks(config, "bfloat16"))
        odd = choose("grouped_matmul", "bfloat16", config.hidden_size, 72)  # zeros are added
        assert odd.name == "mma" and "mosaic needs widths that are multiples of 16, found 72" in odd.reason
    windowed = config.replace(sliding_window=512)
    shared, *_ = fallbacks(windowed, "bfloat16", MeshShape(context=2))
    assert "over pairs of tiles" in shared and "cudnn needs attention without a window" in shared
    on(monkeypatch, CPU)  # where nothing else is expected
    assert not fallbacks(config, "float32")


def test_a_jax_without_kernels_is_named(monkeypatch):
    for version, lines in (((0, 10, 2), 1), ((0, 11, 0), 0)):
        monkeypatch.setattr(jax, "__version_info__", version)
        on(monkeypatch, AMPERE)
        assert len(jax_without_kernels()) == lines
        assert all("needs Python 3.12 or newer" in line for line in jax_without_kernels())
        for device in (CPU, TURING):  # no version has kernels for them
            on(monkeypatch, device)
            assert not jax_without_kernels()


def test_unknown_names_are_errors(monkeypatch):
    monkeypatch.setenv("JAXMOE_ATTENTION", "fast")
    with pytest.raises(UserError, match=r"^JAXMOE_ATTENTION: expected one of cudnn, flash, blocks; found 'fast'$"):
        choose("attention")
    with pytest.raises(UserError, match="found 'fast'"), forced(attention="fast"):
        pass
    with pytest.raises(
        UserError,
        match="expected operations among attention, context_attention, cached_attention, grouped_matmul, "
        "row_copies, top_experts, fp8_products, nf4_products, few_rows, norm_rotary, swiglu_gradient; found 'atention'",
    ):
        forced(atention="blocks").__enter__()


def test_a_compiled_function_follows_the_force(monkeypatch):
    """Otherwise JAX would run the function as it was traced before."""
    on(monkeypatch, HOPPER)

    @jax.jit
    def is_cudnn():
        return jnp.asarray(choose("attention").name == "cudnn")

    assert is_cudnn()
    with forced(attention="blocks"):
        assert not is_cudnn()
    assert is_cudnn()


def test_the_default_device_is_jax_s():
    assert default_device().platform == jax.local_devices()[0].platform
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        assert default_device() == CPU


@pytest.mark.parametrize(("operation", "name"), [(o, n) for o, names in OPERATIONS.items() for n in names])
def test_every_entry_of_the_registry_loads(operation, name):
    assert callable(OPERATIONS[operation][name].load().unsupported)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_one_implementation_runs_anywhere(operation):
    assert any(entry.unsupported(CPU) is None for entry in OPERATIONS[operation].values())


def test_a_wrong_home_is_noticed():
    entry = OPERATIONS["attention"]["blocks"]
    with pytest.raises(AttributeError, match="CHUNCKED"):
        entry._replace(home="jaxmoe.ops.attention_chunked:CHUNCKED").load()
