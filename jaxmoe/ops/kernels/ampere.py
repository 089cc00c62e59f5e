"""What the kernels by mma.sync and cp.async share: the cards' limits, copies, their pipeline, and the launch.

A thread block is one warpgroup, which copies and multiplies in turn. Its copies (cp.async) run ahead of the products by
all slots of a ring in shared memory but one. cp.async does not mask: the caller keeps copies inside the array.

Source of the limits: CUDA C++ Programming Guide, "Compute Capabilities", technical specifications.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from jaxmoe.ops.implementations import default_device

plgpu: Any = mosaic_gpu  # untyped: jax 0.10 lacks much of it

THREADS = 128  # of a thread block: one warpgroup
BARRIERS = 1024  # bytes of shared memory that Mosaic takes besides the scratch memory
BLOCK_RESERVE = 1024  # bytes of shared memory that CUDA keeps of each thread block
ITEM = 2  # bytes of a number in 16 bits


class Card(NamedTuple):
    """What a multiprocessor has: bytes of shared memory, the most that a thread block gets, 32-bit registers."""

    shared: int
    block_shared: int
    registers: int = 65_536


CARDS = {
    (8, 0): Card(164 * 1024, 163 * 1024),  # A100, A30
    (8, 6): Card(100 * 1024, 99 * 1024),  # RTX 3090, A40, A10
    (8, 9): Card(100 * 1024, 99 * 1024),  # RTX 4090, L40S, L4
    (9, 0): Card(228 * 1024, 227 * 1024),  # H100, H200
    (10, 0): Card(228 * 1024, 227 * 1024),  # B200
    (12, 0): Card(100 * 1024, 99 * 1024),  # RTX 5090, RTX PRO 6000
}


def card_of(capability: tuple[int, int]) -> Card:
    """The limits of a card; of one that is not listed, those of the listed ones of its generation that have least."""
    if capability in CARDS:
        return CARDS[capability]
    generation = [card for (major, _), card in CARDS.items() if major == capability[0]]
    return min(generation or CARDS.values())


def default_capability() -> tuple[int, int]:
    """The default device's; without an NVIDIA GPU that of the oldest card with these kernels."""
    return default_device().compute_capability or (8, 0)


def unsupported(dtype: Any) -> str | None:
    """Why no kernel here can run on operands of this dtype, or None."""
    if jax.__version_info__ < (0, 11):
        return f"needs jax 0.11 or newer (Python 3.12 or newer), found {jax.__version__}"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"needs bfloat16 or float16, found {jnp.dtype(dtype).name}"
    return None


def shared_memory(shape: tuple[int, ...], dtype: Any, tile: int) -> Any:
    """Shared memory in tiles of 8 rows of `tile` 16-bit numbers, swizzled so that no two rows meet in a bank.

    A copy has at least four tiles; one of 16 rows has them if a tile is half as wide as it.
    """
    transforms = (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(2 * tile))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def copy(source: Any, target: Any) -> None:
    """Starts a copy to shared memory. It must lie inside the array."""
    plgpu.copy_gmem_to_smem(source, target, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def store(value: Array, target: Any) -> None:
    """Writes sums to global memory. Their layout fills half of each 32 bytes, which jax from 0.12 on has to be told."""
    if hasattr(plgpu, "store"):
        plgpu.store(target, value, optimized=False)
    else:
        target[...] = value


def pipelined(
    steps: Array | int,
    slots: int,
    copies: int,
    start_copies: Callable[[Array, Array], None],
    step: Callable[[Array, Array, Any], Any],
    init: Any,
) -> Any:
    """Folds `step(number, slot, carry)` over the steps, after `start_copies(number, slot)` has filled the slot.

    A step makes `copies` copies. Past the last step it is copied again, so that the number of copies under way, for
    which the program waits, is known when it is compiled. `init` is the carry before the first step, or a function that
    forms it from copies that were started before these; it is called when they have arrived.
    """
    last = jnp.maximum(jnp.int32(steps) - 1, 0)
    for ahead in range(slots - 1):
        start_copies(jnp.minimum(jnp.int32(ahead), last), jnp.int32(ahead))
    if callable(init):
        plgpu.wait_gmem_to_smem((slots - 1) * copies)
        init = init()

    def body(number: Array, carry: Any) -> Any:
        plgpu.wait_gmem_to_smem((slots - 2) * copies)  # and for the other warps, which have read the slot before
        ahead = number + slots - 1
        start_copies(jnp.minimum(ahead, last), lax.rem(ahead, jnp.int32(slots)))
        return step(number, lax.rem(number, jnp.int32(slots)), carry)

    carry = lax.fori_loop(0, steps, body, init)
    plgpu.wait_gmem_to_smem(0)  # the slots will be filled anew
    return carry


def launch(
    name: str,
    body: Callable[..., None],
    out: Any,
    scratch: list[Any],
    grid: dict[str, int],
    interpret: Any,
    **options: Any,
) -> Callable[..., Any]:
    """The kernel `name`: a function of the operands that returns `out`. `body` gets operands, `out` and `scratch`.

    `options` are more of Mosaic's `CompilerParams`.
    """

    def program(*refs: Any) -> None:
        if interpret is None:
            _translate_for_ampere()
        body(*refs)

    program.__name__ = name
    return plgpu.kernel(
        program,
        out_type=out,
        scratch_types=scratch,
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane, **options
        ),
        interpret=interpret,
    )


def _translate_for_ampere() -> None:
    """Makes Mosaic translate the kernel that begins here as for compute capability 8.0, whatever the card.

    From 9.0 on it copies by TMA, which needs barriers and which mma.sync's layouts do not. The machine code is made for
    the card at hand all the same.
    """

    @plgpu.inline_mgpu()
    def older(context: Any) -> None:
        from jaxlib.mlir import ir

        attributes = context.module.operation.attributes
        number = ir.IntegerType.get_signless(32)
        for name, value in ("mosaic_gpu.arch_major", 8), ("mosaic_gpu.arch_minor", 0):
            attributes[name] = ir.IntegerAttr.get(number, value)

    older()
