"""The training step and the evaluation step, compiled while the weights are read."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import jax
import optax

from jaxmoe.data.packing import Batch
from jaxmoe.distributed.copy_engines import compiler_options
from jaxmoe.model.interface import Params
from jaxmoe.train.prepare import Plan
from jaxmoe.train.step import EvalSums, StepMetrics, TrainState, make_eval_step, make_train_step


class CompiledSteps:
    """The training step and, if the run evaluates, the evaluation step, compiled while the weights are read.

    They are compiled from shapes alone, while the slow reading of the weights goes on. XLA tries products on its own
    buffers, and this way it need not find room for them next to all the weights.
    """

    def __init__(
        self, plan: Plan, optimizer: optax.GradientTransformation, rate: optax.Schedule, state: TrainState
    ) -> None:
        """`state` is that of `state_to_compile`."""
        shapes, trainable = plan.source.shapes
        # The new state lies like the old one. What lies in the host's memory, the step puts there itself.
        everywhere = plan.model.placement.everywhere
        shardings = jax.tree.map(lambda leaf: leaf.sharding if isinstance(leaf, jax.ShapeDtypeStruct) else None, state)
        step = make_train_step(plan.model, optimizer, rate, plan.objective)
        options = compiler_options(plan.model.mesh)
        train_step = jax.jit(step, donate_argnums=1, out_shardings=(shardings, everywhere), compiler_options=options)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="compile")
        frozen, batch = plan.fed(shapes, plan.batch(0))
        self._train = self._begin(train_step, frozen, state, batch)
        self._evaluate = None
        if plan.data.held_out is not None:
            frozen, batch = plan.fed(shapes, next(plan.held_out_batches()))
            step = make_eval_step(plan.model, plan.objective[0].loss)
            evaluate = jax.jit(step, out_shardings=everywhere, compiler_options=options)
            self._evaluate = self._begin(evaluate, frozen, trainable, batch)

    def _begin(self, step: Any, *shapes: Any) -> Future[Any]:
        # The choice of implementations may depend on a variable of this thread's context.
        return self._pool.submit(copy_context().run, lambda: step.lower(*shapes).compile())

    def cancel(self) -> None:
        """Cancels compilations that have not begun; the process waits for the others before it ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Returns when all is compiled: weights that leave little memory are better read afterwards."""
        for step in filter(None, (self._train, self._evaluate)):
            step.result()

    @property
    def train_step(self) -> Callable[[Params, TrainState, Batch], tuple[TrainState, StepMetrics]]:
        """See `make_train_step`."""
        return self._train.result()

    @property
    def eval_step(self) -> Callable[[Params, Params, Batch], tuple[EvalSums, jax.Array]]:
        """See `make_eval_step`."""
        assert self._evaluate is not None
        return self._evaluate.result()
