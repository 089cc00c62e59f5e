"""One training step and one evaluation step, as pure functions; `jaxmoe.train.loop` jits them and feeds them.

What is trained is either the adapters of a frozen model or all of its parameters. Frozen parameters are an argument
that is never differentiated: they have neither gradients nor optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.data.packing import Batch
from jaxmoe.memory import Remat, loss_chunk
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import Options, Params, RouterStats, Tokens
from jaxmoe.ops.router import RoutingControl, load_balancing_loss
from jaxmoe.parameters import parameter_specs
from jaxmoe.train.loss import cross_entropy

Schedule = Literal["cosine", "linear", "constant"]


class TrainState(NamedTuple):
    """What a step changes, and all that a checkpoint holds: steps done, float32 master weights, optimizer state."""

    step: Int[Array, ""]
    trainable: Params
    optimizer: PyTree


class StepMetrics(NamedTuple):
    """Numbers of one step, on the device: mean token loss (nats), load-balancing loss (before its coefficient),
    gradient norm before clipping, learning rate, tokens that are not padding, rows per MoE layer and expert."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    expert_counts: Int[Array, "Ls E"]


class Model(NamedTuple):
    """What the forward pass needs beside arrays; `lora` None means that every parameter is trained, computed in `dtype`
    from float32 masters (adapters are always float32 and `dtype` is then that of the frozen parameters). `packed` says
    whether a row may hold several documents, `unroll` whether a training step is compiled layer by layer."""

    config: Qwen3MoeConfig
    lora: LoraConfig | None
    dtype: str = "float32"
    remat: Remat = "low-memory"
    packed: bool = True
    unroll: bool = False

    def run(self, frozen: Params, trainable: Params, batch: Batch, *, train: bool) -> tuple[Array, RouterStats]:
        """(sum of the weighted token losses in nats, router statistics) of B rows of T tokens."""
        if self.lora is not None:
            params, adapters = frozen, trainable
        else:
            params, adapters = {path: array.astype(self.dtype) for path, array in trainable.items()}, {}
        control = None
        if batch.experts is not None:
            control = RoutingControl(experts=jnp.moveaxis(batch.experts, -2, 0).astype(jnp.int32))
        out = forward(
            params,
            adapters,
            Tokens(batch.input_ids, batch.position_ids, batch.segment_ids),
            config=self.config,
            options=Options(
                lora=self.lora,
                trainable="none" if not train else "all" if self.lora is None else "adapters",
                remat=self.remat,
                unroll=self.unroll and train,
                packed=self.packed,
            ),
            control=control,
        )
        hidden = out.hidden.reshape(-1, out.hidden.shape[-1])
        head = head_weight(params, self.config)
        labels, weights = batch.labels.reshape(-1), batch.weights.reshape(-1)
        chunk = loss_chunk(self.remat)
        return cross_entropy(hidden, head, labels, weights, chunk, frozen_head=self.lora is not None), out.stats


def learning_rate(schedule: Schedule, peak: float, warmup_steps: int, total_steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_steps`, already above zero at step 0, then the schedule down to zero at the end."""
    rest = max(total_steps - warmup_steps, 1)
    decay = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[schedule]()
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def adamw(
    rate: optax.Schedule,
    model: Model,
    *,
    max_grad_norm: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter 2019) behind clipping by the global norm (0: none).

    Weight decay acts on matrices: adapters, or projections and embeddings, not norms and biases.
    """
    matrices = None  # adapters are
    if model.lora is None:
        matrices = {path: spec.init == "normal" for path, spec in parameter_specs(model.config).items()}
    steps = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    steps.append(optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=matrices))
    return optax.chain(*steps)


def initial_state(trainable: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(trainable))


def loss_and_gradients(
    model: Model, frozen: Params, trainable: Params, batch: Batch, aux_coefficient: float
) -> tuple[Float[Array, ""], RouterStats, Params]:
    """Mean token loss, router statistics and gradients over a batch [accumulation, B, T], as if it were one batch.

    The token loss of each micro-batch is divided by the weights of all of them. The load-balancing loss is a product of
    two means over the whole batch, f_e (routed rows, without a gradient) and P_e (probabilities): summing each
    micro-batch's own product would be another loss. So with more than one micro-batch and a coefficient a first forward
    pass counts the rows; then E * sum_e f_e P_e is linear in what each micro-batch adds to P_e.
    """
    steps = batch.input_ids.shape[0]
    total_weight = jnp.sum(batch.weights)
    balanced = aux_coefficient != 0 and bool(model.config.sparse_layers)

    def micro_loss(trainable: Params, micro: Batch, load: RouterStats | None):
        summed, stats = model.run(frozen, trainable, micro, train=True)
        loss = summed / total_weight
        share = jnp.zeros(())
        if balanced:
            whole = stats if load is None else load
            share = load_balancing_loss(whole.counts, stats.prob_sums, whole.tokens)
        return loss + aux_coefficient * share, (loss, stats)

    gradient = jax.grad(micro_loss, has_aux=True)
    if steps == 1:
        gradients, (loss, stats) = gradient(trainable, jax.tree.map(lambda a: a[0], batch), None)
        return loss, stats, gradients

    def zeros_of(function: Callable, *args: PyTree) -> PyTree:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, *args))

    def add(total: PyTree, part: PyTree) -> PyTree:
        return jax.tree.map(jnp.add, total, part)

    def scan_sum(function: Callable[[Batch], PyTree]) -> PyTree:
        start = zeros_of(function, jax.tree.map(lambda a: a[0], batch))
        return jax.lax.scan(lambda total, micro: (add(total, function(micro)), None), start, batch)[0]

    load = scan_sum(lambda micro: model.run(frozen, trainable, micro, train=False)[1]) if balanced else None
    gradients, (loss, stats) = scan_sum(lambda micro: gradient(trainable, micro, load))
    return loss, stats, gradients


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, rate: optax.Schedule, aux_coefficient: float
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """(frozen, state, batch [accumulation, B, T]) -> (new state, metrics): a pure function; donate the state."""

    def train_step(frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        loss, stats, gradients = loss_and_gradients(model, frozen, state.trainable, batch, aux_coefficient)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
            trainable = jax.tree.map(jnp.add, state.trainable, updates)
        metrics = StepMetrics(
            loss=loss,
            aux_loss=load_balancing_loss(*stats) if model.config.sparse_layers else jnp.zeros(()),
            grad_norm=optax.tree.norm(gradients),
            learning_rate=jnp.asarray(rate(state.step), jnp.float32),
            tokens=stats.tokens,
            expert_counts=stats.counts,
        )
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return train_step


def make_eval_step(model: Model) -> Callable[[Params, Params, Batch], tuple[Float[Array, ""], Float[Array, ""]]]:
    """(frozen, trainable, batch [B, T]) -> (sum of the weighted token losses in nats, sum of the weights)."""

    def eval_step(frozen: Params, trainable: Params, batch: Batch) -> tuple[Array, Array]:
        return model.run(frozen, trainable, batch, train=False)[0], jnp.sum(batch.weights)

    return eval_step
