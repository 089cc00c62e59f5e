"""What both Hopper kernels share: the ring of shared memory between copying and multiplying, and the launch.

A kernel runs as one thread block per multiprocessor, with three warpgroups. Warpgroups 0 and 1 multiply, warpgroup 2
copies. The copying warpgroup (the producer) fills slots of shared memory in turn; the multiplying ones (the consumers)
read them in the same order. Step s of a thread block uses slot s % slots. Two barriers per slot keep the sides apart:

    filled   completes when all copies into the slot have landed
    free     completes when both consumers have finished reading the slot
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

CONSUMERS = 2  # warpgroups 0 and 1
# Registers per thread; together the 64 K registers of a multiprocessor.
REGISTERS = 40, 232  # producer, consumer


@dataclass(frozen=True)
class Ring:
    """Slots of shared memory that are filled and read in turn; see the top of this file."""

    slots: int
    filled: Any
    free: Any

    def slot(self, step: Array) -> Array:
        """The slot of a step."""
        return lax.rem(step, jnp.asarray(self.slots, step.dtype))

    def wait_until_free(self, step: Array) -> Array:
        """Producer: the slot of `step`, once what it held before has been read."""
        slot = self.slot(step)

        @pl.when(step >= self.slots)
        def _wait() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        return slot

    def drain(self, steps: Array) -> None:
        """Producer: waits until everything that was filled in `steps` steps has been read.

        A thread block must not end before every wait on its barriers is complete.
        """

        @pl.loop(jnp.maximum(steps - self.slots, 0), steps)
        def _wait(step: Array) -> None:
            plgpu.barrier_wait(self.free.at[self.slot(step)])

    def wait_until_filled(self, step: Array) -> Array:
        """Consumer: the slot of `step`, once its copies have landed."""
        slot = self.slot(step)
        plgpu.barrier_wait(self.filled.at[slot])
        return slot

    def arrive(self, step: Array) -> None:
        """Consumer: this warpgroup has finished reading the slot of `step`."""
        plgpu.barrier_arrive(self.free.at[self.slot(step)])

    def multiply(self, start: Array, steps: Any, multiply_slot: Callable[[Array], None], in_flight: int) -> None:
        """Consumer: calls `multiply_slot(slot)` for the steps from `start` on.

        A call starts `in_flight` matrix products. They may still run when the call returns, so a slot is given back one
        step later. The last slot is not given back: the caller does so (`arrive`) once it has read the accumulators.
        """

        @pl.loop(0, steps)
        def _step(k: Array) -> None:
            multiply_slot(self.wait_until_filled(start + k))
            plgpu.wgmma_wait(in_flight)

            @pl.when(k > 0)
            def _release() -> None:
                self.arrive(start + k - 1)


def run_warpgroups(
    produce: Callable[[], None],
    consume: Callable[[], None],
    warpgroup: Array,
    registers: tuple[int, int] = REGISTERS,
) -> None:
    """Runs `produce` in the copying warpgroup and `consume` in the multiplying ones, which get most registers."""

    @pl.when(warpgroup == CONSUMERS)
    def _produce() -> None:
        plgpu.set_max_registers(registers[0], action="decrease")
        produce()

    @pl.when(warpgroup < CONSUMERS)
    def _consume() -> None:
        plgpu.set_max_registers(registers[1], action="increase")
        consume()
        plgpu.wait_smem_to_gmem(0)


def swizzle_bytes(*sizes: int) -> int:
    """The widest shared-memory swizzle (32, 64 or 128 bytes) that divides rows of each of these many 2-byte values."""
    return 2 * math.gcd(64, *sizes)


def shared_memory(shape: tuple[int, ...], dtype: Any, swizzle: int = 128) -> Any:
    """Shared memory in the tiled, swizzled form that copies (TMA) write and matrix products (wgmma) read."""
    language: Any = plgpu  # jax 0.12 declares the two transforms abstract, though they are not
    tile = language.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tile, language.SwizzleTransform(swizzle)))


def launch(
    name: str,
    program: Callable[[tuple[Any, ...], Ring], None],
    out: jax.ShapeDtypeStruct,
    scratch: list[Any],
    *,
    slots: int,
    copies: int,
    interpret: Any,
) -> Callable[..., Array]:
    """The kernel `name`: a function of the operands that returns `out`.

    `program(refs, ring)` is its body; `refs` are the operands, the output and `scratch`. A slot of the ring is filled
    by `copies` copies.
    """

    def body(*refs: Any) -> None:
        *rest, filled, free = refs
        program(tuple(rest), Ring(slots, filled, free))

    body.__name__ = name
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=[
            *scratch,
            plgpu.Barrier(num_arrivals=copies, num_barriers=slots),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots),
        ],
        grid=(_multiprocessors(),),
        grid_names=("sm",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )


def _multiprocessors() -> int:
    # The interpreter runs two thread blocks.
    return jax.devices()[0].core_count if jax.default_backend() == "gpu" else 2
