"""One training step and one evaluation step, as pure functions; `jaxmoe.train.compiled_steps` compiles them.

Either the adapters of a frozen model (with the weights that they hold in full) or all of its parameters are trained.
Frozen parameters are an argument that is never differentiated: they have neither gradients nor optimizer state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, Integer, Key, PyTree

from jaxmoe.config import LoraConfig, Qwen3MoeConfig
from jaxmoe.data.packing import Batch
from jaxmoe.distributed.collectives import sum_over_devices
from jaxmoe.distributed.mesh import ONE_DEVICE, MeshShape
from jaxmoe.distributed.placement import Placement, mesh_axes
from jaxmoe.memory import OptimizerName, Remat, loss_chunk, moments_on_host
from jaxmoe.model.adapted import weights_of
from jaxmoe.model.decoder import forward, head_weight
from jaxmoe.model.interface import DecoderOutput, Options, Params, RouterStats, Tokens
from jaxmoe.ops.low_rank import DropoutKeys
from jaxmoe.ops.router import RoutingControl, load_balancing_loss, moved_choice_bias
from jaxmoe.parameters import CHOICE_BIAS
from jaxmoe.train.log_probs import learned_log_probs
from jaxmoe.train.loss import BatchTotal, Loss, Objective, OfOutputs, Outputs, Term

BatchKeys = Key[Array, "accumulation B"]  # a random key for each sequence of a whole batch
_DROPOUT = 0x64726F70  # tells dropout's random keys from those of fresh weights, which have the same seed


class TrainState(NamedTuple):
    """What a step changes, and all that a checkpoint holds: steps done, float32 master weights, optimizer state."""

    step: Int[Array, ""]
    trainable: Params
    optimizer: PyTree


class StepMetrics(NamedTuple):
    """Numbers of one step, on the device: the objective's first loss (nats for next tokens), load-balancing loss
    (before its coefficient), gradient norm before clipping, learning rate, tokens that are not padding, routed rows
    per MoE layer and expert, and what the losses report besides their values."""

    loss: Float[Array, ""]
    aux_loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    tokens: Int[Array, ""]
    expert_counts: Int[Array, "Ls E"]
    further: dict[str, Float[Array, ""]]


class EvalSums(NamedTuple):
    """Sums over a batch: of a loss, and of what it reports besides."""

    loss: Float[Array, ""]
    further: Mapping[str, Float[Array, ""]]


class ProbeRouting(NamedTuple):
    """What the router does with a batch [B, T]: its float32 logits, and the experts that each token uses. Arrays are
    JAX's within a step and NumPy's on the host."""

    logits: Float[Any, "Ls B T E"]
    experts: Integer[Any, "Ls B T k"]


class LossAndGradients(NamedTuple):
    """What `loss_and_gradients` computes; `metrics` are what the losses report besides their values."""

    loss: Float[Array, ""]
    stats: RouterStats
    gradients: Params
    metrics: dict[str, Float[Array, ""]]


class Model(NamedTuple):
    """What the forward pass needs besides arrays.

    With `lora`, adapters are trained in float32, and `dtype` is the dtype of the frozen parameters. Without it, all
    parameters are trained, and the model computes in `dtype` from float32 master weights. `packed` says whether a
    sequence may hold several documents, `unroll` whether a training step compiles each layer separately. `seed` is for
    the adapters' dropout. `mesh` are the devices that share a step; its results do not depend on them. With
    `reference`, a forward pass also says what the model without its adapters says, unless the batch knows it; with
    `router_logits` what its routers say, and with `base_router` what those of the model without adapters say.
    With `dense_router`, routers also learn from the experts that a token does not use. With a `choice_bias_rate`,
    which is for training from scratch, the trained arrays include `CHOICE_BIAS`, which moves so much in a step.
    `optimizer` updates what is trained.
    """

    config: Qwen3MoeConfig
    lora: LoraConfig | None
    dtype: str = "float32"
    remat: Remat = "low-memory"
    packed: bool = True
    unroll: bool = False
    seed: int = 0
    mesh: MeshShape = ONE_DEVICE
    reference: bool = False
    optimizer: OptimizerName = "adamw"
    router_logits: bool = False
    base_router: bool = False
    dense_router: bool = False
    choice_bias_rate: float = 0.0

    @property
    def moments_on_host(self) -> bool:
        """Whether the optimizer's moments lie in the host's memory."""
        return moments_on_host(self.config, self.lora, self.remat, self.optimizer)

    @property
    def placement(self) -> Placement:
        """Where the arrays of a step lie."""
        return Placement(self.mesh, self.config, self.lora)

    def dropout_keys(self, step: Int[Array, ""], sequences: tuple[int, int]) -> BatchKeys | None:
        """The random keys of the sequences [accumulation, B] of a step; None for a model without dropout.

        They depend on the seed, the step and the sequence's place in the whole batch: a resumed run, another division
        into micro-batches, and a second forward pass over the same sequences drop the same elements.
        """
        if self.lora is None or not self.lora.dropout:
            return None
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.seed), _DROPOUT), step)
        places = jnp.arange(sequences[0] * sequences[1])
        return jax.vmap(lambda place: jax.random.fold_in(key, place))(places).reshape(sequences)

    def run(
        self,
        frozen: Params,
        trainable: Params,
        batch: Batch,
        *,
        train: bool,
        dropout_keys: DropoutKeys | None = None,
    ) -> Outputs:
        """The forward pass over B sequences of T tokens, on one device; `train` if it will be differentiated."""
        params, adapters = self._arrays(frozen, trainable)
        outputs = self._outputs(self.lora, params, adapters, batch, train=train, dropout_keys=dropout_keys)
        reference, base = self._reference(frozen, batch), self._base_router_logits(frozen, batch)
        return replace(outputs, reference=reference, base_router_logits=base)

    def routing(self, frozen: Params, trainable: Params, batch: Batch) -> ProbeRouting:
        """What the router does with B sequences of T tokens, on one device."""
        params, adapters = self._arrays(frozen, trainable)
        out = self._decoded(
            self.lora, params, adapters, batch, Options(router_logits=True, keep_logits=1, until_last_router=True)
        )
        assert out.router_logits is not None and out.routing is not None
        return ProbeRouting(out.router_logits, out.routing.experts)

    def _arrays(self, frozen: Params, trainable: Params) -> tuple[Params, Params]:
        """The model's parameters in the dtype to compute in, and its adapters."""
        if self.lora is not None:
            return frozen, trainable
        own = {path: array.astype(self.dtype) for path, array in with_gradient(trainable).items()}
        return own | {path: trainable[path] for path in trainable.keys() - own.keys()}, {}

    def _reference(self, frozen: Params, batch: Batch) -> Float[Array, "B T"] | None:
        """What the batch knows of the reference model, or what the frozen parameters say without adapters."""
        if not self.reference or batch.reference is not None:
            return batch.reference
        with jax.named_scope("reference"):
            outputs = self._outputs(None, frozen, {}, batch, train=False)
            return jax.lax.stop_gradient(learned_log_probs(outputs, batch))

    def _outputs(
        self,
        lora: LoraConfig | None,
        params: Params,
        adapters: Params,
        batch: Batch,
        *,
        train: bool,
        dropout_keys: DropoutKeys | None = None,
    ) -> Outputs:
        trainable = "none" if not train else "all" if lora is None else lora.trained_in_layers or "adapters"
        options = Options(trainable=trainable, unroll=self.unroll and train, router_logits=self.router_logits)
        options = replace(options, dense_router=self.dense_router and train)
        out = self._decoded(lora, params, adapters, batch, options, dropout_keys)
        head = head_weight(weights_of(params, adapters, lora))
        frozen_head = lora is not None and not lora.trains_head
        return Outputs(
            out.hidden,
            head,
            out.stats,
            chunk=loss_chunk(self.remat),
            frozen_head=frozen_head,
            router_logits=out.router_logits,
        )

    def _base_router_logits(self, frozen: Params, batch: Batch) -> Float[Array, "Ls B T E"] | None:
        """What the batch knows of the base's routers, or what those of the frozen parameters say without adapters."""
        if batch.base_logits is not None:
            return jnp.moveaxis(batch.base_logits, -2, 0)
        if not self.base_router:
            return None
        with jax.named_scope("base_router"):
            out = self._decoded(None, frozen, {}, batch, Options(router_logits=True))
            return jax.lax.stop_gradient(out.router_logits)

    def _decoded(
        self,
        lora: LoraConfig | None,
        params: Params,
        adapters: Params,
        batch: Batch,
        options: Options,
        dropout_keys: DropoutKeys | None = None,
    ) -> DecoderOutput:
        """The decoder over a batch; `options` say what to return and what will be differentiated."""
        control = RoutingControl(choice_bias=params.get(CHOICE_BIAS))
        if batch.experts is not None:
            control = control._replace(experts=jnp.moveaxis(batch.experts, -2, 0).astype(jnp.int32))
        return forward(
            with_gradient(params),
            adapters,
            Tokens(batch.input_ids, batch.position_ids, batch.segment_ids),
            config=self.config,
            options=replace(options, lora=lora, remat=self.remat, packed=self.packed, mesh=self.mesh),
            control=control if any(field is not None for field in control) else None,
            dropout_keys=dropout_keys,
        )


def with_gradient(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arrays that have a gradient and an optimizer state: all but `CHOICE_BIAS`."""
    return {path: array for path, array in arrays.items() if path != CHOICE_BIAS}


def initial_state(trainable: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; of shapes, if the optimizer takes them."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(with_gradient(trainable)))


def state_to_compile(model: Model, trainable: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The shapes of the state before the first step, for those of the trained arrays, where they lie on the mesh.

    Moments in the host's memory are the arrays themselves, since a shape does not say where an array lies.
    """
    if model.moments_on_host:
        return initial_state(trainable, optimizer)
    shapes = jax.eval_shape(partial(initial_state, optimizer=optimizer), trainable)
    return model.placement.place_state(shapes, trainable)


def loss_and_gradients(
    model: Model,
    frozen: Params,
    trainable: Params,
    batch: Batch,
    objective: Objective,
    dropout_keys: BatchKeys | None = None,
) -> LossAndGradients:
    """The objective's first loss, router statistics and the objective's gradients over a batch [accumulation, B, T].

    Several micro-batches yield the same result as one batch of the same sequences. Each loss's sum is divided by the
    weight of the whole batch, and totals over the whole batch that a loss needs are collected in a first forward pass.
    With one micro-batch the totals are its own, without that pass. `dropout_keys` [accumulation, B] are those of
    `Model.dropout_keys`; both passes use them. The devices of `model.mesh` share the sequences, and add up what they
    find.

    Raises:
        ValueError: two losses report a number of the same name, or the devices cannot share B sequences evenly.
    """
    placement, everywhere = model.placement, PartitionSpec()
    split = placement.specs(trainable)
    shared = placement.batch_specs((batch, dropout_keys), tokens=3)
    whole = _Whole([term.loss.weight(batch) for term in objective], _of_batch(objective, batch))

    def on_a_device(frozen: Params, trainable: Params, parts: _Parts, whole: _Whole) -> LossAndGradients:
        found = _loss_and_gradients(model, frozen, trainable, parts, objective, whole)
        gradients = {
            path: sum_over_devices(gradient, model.mesh, but=mesh_axes(split[path]))
            for path, gradient in found.gradients.items()
        }
        loss, stats, metrics = sum_over_devices((found.loss, found.stats, found.metrics), model.mesh)
        return LossAndGradients(loss, stats, gradients, metrics)

    run = placement.run(
        on_a_device,
        (placement.specs(frozen), split, shared, everywhere),
        LossAndGradients._make([everywhere, everywhere, split, everywhere]),
    )
    return run(frozen, trainable, (batch, dropout_keys), whole)


_Parts = tuple[Batch, BatchKeys | None]


class _Whole(NamedTuple):
    """What is known of the whole batch before a forward pass: the losses' weights, totals by name."""

    weights: list[Array]
    totals: dict[str, PyTree]


def _of_batch(objective: Objective, batch: Batch) -> dict[str, PyTree]:
    """The totals that depend on the batch alone."""
    needs = {name: total for term in objective for name, total in term.loss.needs.items()}
    return {name: total.of(batch) for name, total in needs.items() if isinstance(total, BatchTotal)}


def _loss_and_gradients(
    model: Model, frozen: Params, trainable: Params, parts: _Parts, objective: Objective, whole: _Whole
) -> LossAndGradients:
    """What the sequences on this device add to `loss_and_gradients`."""
    all_needs = {name: total for term in objective for name, total in term.loss.needs.items()}
    needs = {name: total for name, total in all_needs.items() if not isinstance(total, BatchTotal)}

    def micro_loss(trainable: Params, part: tuple[Batch, DropoutKeys | None], totals: dict[str, PyTree] | None):
        micro, keys = part
        outputs = model.run(frozen, trainable, micro, train=True, dropout_keys=keys)
        if totals is None:
            totals = sum_over_devices(_totals(needs, outputs, micro), model.mesh)
        objective_share, values, metrics = jnp.zeros(()), [], {}
        for term, weight in zip(objective, whole.weights, strict=True):
            summed, further = term.loss(outputs, micro, whole.totals | totals)
            if twice := metrics.keys() & further.keys():
                raise ValueError(f"objective: expected metrics of different names, found {min(twice)!r} twice")
            values.append(summed / weight)
            metrics |= {name: value / weight for name, value in further.items()}
            objective_share += term.coefficient * values[-1]
        return objective_share, (values[0], outputs.router, metrics)

    gradient = jax.grad(micro_loss, has_aux=True)
    if parts[0].input_ids.shape[0] == 1:
        gradients, (loss, stats, metrics) = gradient(trainable, jax.tree.map(lambda a: a[0], parts), None)
        return LossAndGradients(loss, stats, gradients, metrics)

    def first_pass(part: tuple[Batch, DropoutKeys | None]) -> dict[str, PyTree]:
        micro, keys = part
        return _totals(needs, model.run(frozen, trainable, micro, train=False, dropout_keys=keys), micro)

    totals = sum_over_devices(_sum_over_micro_batches(first_pass, parts), model.mesh) if needs else {}
    gradients, (loss, stats, metrics) = _sum_over_micro_batches(lambda part: gradient(trainable, part, totals), parts)
    return LossAndGradients(loss, stats, gradients, metrics)


def _totals(needs: Mapping[str, OfOutputs], outputs: Outputs, batch: Batch) -> dict[str, PyTree]:
    """What one micro-batch adds to each total, without a gradient."""
    return jax.lax.stop_gradient({name: total(outputs, batch) for name, total in needs.items()})


def _sum_over_micro_batches(function: Callable[[Any], PyTree], parts: PyTree) -> PyTree:
    """The sum of `function` over the micro-batches, the first axis of all `parts`, one after the other."""
    shapes = jax.eval_shape(function, jax.tree.map(lambda a: a[0], parts))
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


def make_train_step(
    model: Model, optimizer: optax.GradientTransformation, rate: optax.Schedule, objective: Objective
) -> Callable[[Params, TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """(frozen, state, batch [accumulation, B, T]) -> (new state, metrics): a pure function; donate the state."""

    def train_step(frozen: Params, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        keys = model.dropout_keys(state.step, batch.input_ids.shape[:2])
        loss, stats, gradients, further = loss_and_gradients(model, frozen, state.trainable, batch, objective, keys)
        with jax.named_scope("optimizer"):
            gradients, trained = with_gradient(gradients), with_gradient(state.trainable)
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, trained)
            trainable = jax.tree.map(jnp.add, trained, updates)
            if (bias := state.trainable.get(CHOICE_BIAS)) is not None:
                trainable[CHOICE_BIAS] = moved_choice_bias(bias, stats.counts, model.choice_bias_rate)
        aux = jnp.zeros(())
        if model.config.sparse_layers:
            aux = load_balancing_loss(stats.counts, stats.prob_sums, stats.tokens)
        metrics = StepMetrics(
            loss=loss,
            aux_loss=aux,
            grad_norm=optax.tree.norm(gradients),
            learning_rate=jnp.asarray(rate(state.step), jnp.float32),
            tokens=stats.tokens,
            expert_counts=stats.counts,
            further=further,
        )
        return TrainState(state.step + 1, trainable, optimizer_state), metrics

    return train_step


def make_eval_step(model: Model, loss: Loss) -> Callable[[Params, Params, Batch], tuple[EvalSums, Float[Array, ""]]]:
    """(frozen, trainable, batch [B, T]) -> (sums, their weight); add up both over batches and divide.

    Raises:
        ValueError: a loss that needs totals over all batches, which evaluation does not collect; those that depend on a
            batch alone are those of each batch.
    """
    if needs := [name for name, total in loss.needs.items() if not isinstance(total, BatchTotal)]:
        raise ValueError(f"loss: expected one without totals to evaluate, found one that needs {', '.join(needs)}")

    placement = model.placement

    def on_a_device(frozen: Params, trainable: Params, batch: Batch, totals: dict[str, PyTree]) -> EvalSums:
        outputs = model.run(frozen, trainable, batch, train=False)
        return sum_over_devices(EvalSums(*loss(outputs, batch, totals)), model.mesh)

    def eval_step(frozen: Params, trainable: Params, batch: Batch) -> tuple[EvalSums, Array]:
        specs = placement.specs(frozen), placement.specs(trainable), placement.batch_specs(batch, tokens=2)
        run = placement.run(on_a_device, (*specs, PartitionSpec()), PartitionSpec())
        return run(frozen, trainable, batch, _of_batch((Term(loss),), batch)), loss.weight(batch)

    return eval_step


def make_reference_step(model: Model) -> Callable[[Params, Params, Batch], Float[Array, "B T"]]:
    """(frozen, trainable, batch [B, T]) -> the log-probability of each learned token, 0 for the others."""
    placement, plain = model.placement, model._replace(reference=False)

    def on_a_device(frozen: Params, trainable: Params, batch: Batch) -> Array:
        return learned_log_probs(plain.run(frozen, trainable, batch, train=False), batch)

    def reference_step(frozen: Params, trainable: Params, batch: Batch) -> Array:
        of_batch = placement.batch_specs(batch, tokens=2)
        specs = placement.specs(frozen), placement.specs(trainable), of_batch
        return placement.run(on_a_device, specs, of_batch.weights)(frozen, trainable, batch)

    return reference_step
