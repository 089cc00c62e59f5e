"""The registry: which implementation of an operation runs on the default device, why, and how another one is forced.

An operation with several implementations calls `choose` while it is traced. It gets the first implementation in
`OPERATIONS` that the device and the operands allow. `JAXMOE_<OPERATION>=name` in the environment, or
`forced(operation="name")` around the call, selects one by name or fails; nothing falls back silently from a forced
choice.

To add an implementation, write one file that ends in a value with a method `unsupported(*operands) -> str | None`, and
add one entry here.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from jaxmoe.errors import UserError


class Device(NamedTuple):
    """What a choice depends on: JAX's platform, the device's name, CUDA's compute capability (None: not NVIDIA)."""

    platform: str
    kind: str
    compute_capability: tuple[int, int] | None

    def __str__(self) -> str:
        if self.compute_capability is None:
            return self.platform
        return f"{self.kind}, compute capability {self.compute_capability[0]}.{self.compute_capability[1]}"


class Implementation(NamedTuple):
    """One way to run an operation.

    `what` describes it, `unsupported` says why a device cannot run it (None: it can), and `home` is "module:name" of
    its value, which is imported only where the device can run it.
    """

    what: str
    unsupported: Callable[[Device], str | None]
    home: str

    def load(self) -> Any:
        """The value: it runs the operation, and its `unsupported(*operands)` says why it cannot (None: it can)."""
        module, name = self.home.split(":")
        return getattr(importlib.import_module(module), name)


class Choice(NamedTuple):
    """The selected implementation's name, the reason (what it is, and why those before it cannot run), its value."""

    name: str
    reason: str
    value: Any


def default_device() -> Device:
    """The device that JAX places computations on by default.

    `JAXMOE_COMPUTE_CAPABILITY=8.0` treats it as a card of this older compute capability: what that card would run, with
    its tiles, can then be tested and timed on a newer one.

    Raises:
        UserError: the variable is no number of this form, or newer than the device.
    """
    device: Any = jax.config.values["jax_default_device"] or jax.local_devices()[0]
    if isinstance(device, str):  # the configuration also accepts a platform's name
        device = jax.local_devices(backend=device)[0]
    capability = getattr(device, "compute_capability", None)  # "9.0"; other platforms lack it or return something else
    return Device(device.platform, device.device_kind, _demanded_capability(_version(str(capability))))


def _version(text: str) -> tuple[int, int] | None:
    """(9, 0) of "9.0"; None if it is no such number."""
    try:
        major, minor = (int(part) for part in text.split("."))
    except ValueError:
        return None
    return major, minor


def _demanded_capability(found: tuple[int, int] | None) -> tuple[int, int] | None:
    """The device's compute capability, or the older one that the environment demands."""
    if not (text := os.environ.get(_CAPABILITY)):
        return found
    demanded = _version(text)
    if demanded is None or found is None or demanded > found:
        at_most = "an NVIDIA GPU" if found is None else f"at most the device's {found[0]}.{found[1]}"
        raise UserError(f"{_CAPABILITY}: expected a compute capability such as 8.0 and {at_most}; found {text!r}")
    return demanded


def _anywhere(device: Device) -> None:
    return None


def _needs_capability(
    at_least: tuple[int, int], below: tuple[int, int] | None = None
) -> Callable[[Device], str | None]:
    def unsupported(device: Device) -> str | None:
        found = device.compute_capability
        if found is not None and found >= at_least and (below is None or found < below):
            return None
        wanted = f"{at_least[0]}.x" if below else f"{at_least[0]}.{at_least[1]} or newer"
        return f"needs an NVIDIA GPU of compute capability {wanted}, found {device}"

    return unsupported


def _runs_pallas_triton(device: Device) -> str | None:
    """JAX has announced that it will remove this backend; XLA's implementations then take over."""
    if find_spec("jax.experimental.pallas.triton") is None:
        return f"needs Pallas' Triton backend, which jax {jax.__version__} lacks"
    return _needs_capability((8, 0))(device)


# In order of preference. What stands after the first one that runs anywhere is selected by name only.
OPERATIONS: Mapping[str, Mapping[str, Implementation]] = {
    "attention": {
        "cudnn": Implementation(
            "cuDNN's flash attention, packed sequences by segment offsets",
            _needs_capability((9, 0)),
            "jaxmoe.ops.attention_cudnn:CUDNN",
        ),
        "flash": Implementation(
            "flash attention by mma.sync, packed sequences by their bounds",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.flash.attention:FLASH",
        ),
        "blocks": Implementation(
            "pure JAX in chunks of queries, causal half only, exact for packed sequences",
            _anywhere,
            "jaxmoe.ops.attention_chunked:CHUNKED",
        ),
    },
    "context_attention": {
        "cudnn": Implementation(
            "cuDNN's flash attention over pairs of chunks, which their log-sum-exp joins",
            _needs_capability((9, 0)),
            "jaxmoe.ops.attention_context_cudnn:PAIRS",
        ),
        "tiles": Implementation(
            "pure JAX over pairs of tiles, exact for packed sequences", _anywhere, "jaxmoe.ops.attention_context:TILES"
        ),
    },
    "cached_attention": {
        "triton": Implementation(
            "Pallas Triton kernel for one new token, from its projections on, over the filled slots",
            _runs_pallas_triton,
            "jaxmoe.ops.kernels.cached_attention:FLASH",
        ),
        "xla": Implementation("all slots under a mask", _anywhere, "jaxmoe.ops.cached_attention:MASKED"),
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel for one new token, from its projections on, by name only",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.cached_attention_mosaic:FLASH",
        ),
    },
    "grouped_matmul": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel by wgmma over expert-aligned spans of rows",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.grouped_matmul.hopper:HOPPER",
        ),
        "mma": Implementation(
            "Pallas Mosaic GPU kernel by mma.sync over expert-aligned spans of rows",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.grouped_matmul.ampere:AMPERE",
        ),
        "tiled": Implementation(
            "pure JAX loop over expert-aligned row tiles", _anywhere, "jaxmoe.ops.kernels.grouped_matmul.xla:XLA"
        ),
        "ragged_dot": Implementation(
            "jax.lax.ragged_dot, by name only", _anywhere, "jaxmoe.ops.kernels.grouped_matmul.ragged:RAGGED"
        ),
    },
    "row_copies": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel that reads a token's row once, where nothing reads padding",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.row_copies:COPIES",
        ),
        "xla": Implementation("a gather", _anywhere, "jaxmoe.ops.schedule:GATHER"),
    },
    "top_experts": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel that takes the largest score k times, in registers",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.top_experts:TOP",
        ),
        "xla": Implementation("a sort", _anywhere, "jaxmoe.ops.router:SORT"),
    },
    "fp8_products": {
        "registers": Implementation(
            "Pallas Mosaic GPU kernel that decodes the experts' FP8 codes in registers",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.grouped_matmul.hopper_e4m3:REGISTERS",
        ),
        "decoded": Implementation(
            "weights in FP8 decoded to 16 bits, one layer's experts at a time",
            _anywhere,
            "jaxmoe.ops.coded_products:DECODED",
        ),
        "mosaic": Implementation(
            "the same, but forwards without a low-rank term rows are quantised and multiplied in FP8, by name only",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.grouped_matmul.hopper_fp8:ROWS_IN_FP8",
        ),
        "xla": Implementation(
            "the numbers of mosaic in plain JAX, decoded to float32", _anywhere, "jaxmoe.ops.fp8_products:ORACLE"
        ),
    },
    "nf4_products": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel that decodes the experts' NF4 codes in registers",
            _needs_capability((9, 0), (10, 0)),
            "jaxmoe.ops.kernels.grouped_matmul.hopper_nf4:IN_REGISTERS",
        ),
        "decoded": Implementation(
            "a layer's experts decoded to 16 bits for each product", _anywhere, "jaxmoe.ops.coded_products:DECODED"
        ),
    },
    "few_rows": {
        "triton": Implementation(
            "Pallas Triton kernel that reads only the chosen matrices, in place",
            _runs_pallas_triton,
            "jaxmoe.ops.kernels.few_rows:KERNEL",
        ),
        "xla": Implementation("one row after the other, as XLA runs it", _anywhere, "jaxmoe.ops.few_rows:GATHERED"),
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel that reads only the chosen matrices, in place, by name only",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.few_rows_mosaic:KERNEL",
        ),
    },
    "norm_rotary": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel, one pass each way",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.norm_rotary:ONE_PASS",
        ),
        "xla": Implementation("norm, then rotation, as XLA fuses them", _anywhere, "jaxmoe.ops.rotary:TWO_STEPS"),
    },
    "swiglu_gradient": {
        "mosaic": Implementation(
            "Pallas Mosaic GPU kernel, one pass, for unrolled layers",
            _needs_capability((8, 0)),
            "jaxmoe.ops.kernels.swiglu_gradient:ONE_PASS",
        ),
        "xla": Implementation("two or three passes, as XLA fuses them", _anywhere, "jaxmoe.ops.swiglu:PLAIN"),
    },
}

_CAPABILITY = "JAXMOE_COMPUTE_CAPABILITY"
_forced: ContextVar[Mapping[str, str]] = ContextVar("forced", default=MappingProxyType({}))


def _check(operation: str, name: str, source: str) -> None:
    if name not in OPERATIONS[operation]:
        raise UserError(f"{source}: expected one of {', '.join(OPERATIONS[operation])}; found {name!r}")


@contextmanager
def forced(**names: str) -> Iterator[None]:
    """Selects the named implementations inside the context, whatever the environment says.

    JAX does not know that a trace depends on the choice, so its caches of compiled functions are cleared at both ends.

    Raises:
        UserError: no such operation, or no such implementation of it.
    """
    for operation, name in names.items():
        if operation not in OPERATIONS:
            raise UserError(f"forced: expected operations among {', '.join(OPERATIONS)}; found {operation!r}")
        _check(operation, name, f"forced {operation}")
    token = _forced.set({**_forced.get(), **names})
    jax.clear_caches()
    try:
        yield
    finally:
        _forced.reset(token)
        jax.clear_caches()


def _demanded(operation: str) -> tuple[str, str] | None:
    """(name, where it is demanded), or None; the context overrides the environment."""
    if (name := _forced.get().get(operation)) is not None:
        return name, f"forced {operation}"
    variable = f"JAXMOE_{operation.upper()}"
    if name := os.environ.get(variable):
        _check(operation, name, variable)
        return name, variable
    return None


def choose(operation: str, *operands: Any) -> Choice:
    """The implementation of `operation` for the default device and these operands, decided while tracing.

    Args:
        operation: a key of `OPERATIONS`.
        operands: the arguments of its implementations' `unsupported`; without any, only the device decides.

    Raises:
        UserError: the environment or `forced` names an implementation that does not exist or cannot run here.
    """
    device = default_device()
    choices = OPERATIONS[operation]

    def unsupported(implementation: Implementation) -> str | None:
        reason = implementation.unsupported(device)
        return reason or (implementation.load().unsupported(*operands) if operands else None)

    if (demand := _demanded(operation)) is not None:
        name, source = demand
        if (why := unsupported(choices[name])) is not None:
            raise UserError(f"{source}: {name} cannot run here: {why}")
        return Choice(name, f"{choices[name].what}; selected by {source}", choices[name].load())
    passed = []
    for name, implementation in choices.items():
        if (why := unsupported(implementation)) is None:
            return Choice(name, "; ".join([implementation.what, *passed]), implementation.load())
        passed.append(f"{name} {why}")
    raise AssertionError(f"{operation}: one of its implementations has to run anywhere")


def explain() -> list[tuple[str, str, str]]:
    """(operation, implementation, reason) of each operation on the default device, for operands in bfloat16.

    Raises:
        UserError: as `choose`.
    """
    return [
        (operation.replace("_", " "), selected.name, selected.reason)
        for operation in OPERATIONS
        for selected in [choose(operation)]
    ]
