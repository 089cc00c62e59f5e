"""The learning rate and the optimizers of a run, from optax. All clip by the global norm, and decay matrices only.

A stack [L, E, out, in] holds many matrices. What an optimizer knows of a matrix as a whole, such as Adafactor's rows
and columns, it knows of each one alone: the leading axes, layers and experts, are batch axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, muon

from jaxmoe.memory import SMALLEST_FACTORED, batch_axes, is_orthogonalised
from jaxmoe.model.interface import Params
from jaxmoe.parameters import ParameterSpec, lora_specs, parameter_specs
from jaxmoe.train.host_memory import in_host_memory
from jaxmoe.train.settings import Schedule, TrainConfig
from jaxmoe.train.step import Model

# Root mean square of Muon's update over the learning rate, about that of AdamW's (Liu et al. 2025, arXiv 2502.16982).
_MUON_RMS = 0.2
_MATRIX = MuonDimensionNumbers(reduction_axis=-1, output_axis=-2)  # weights are [..., out, in]


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


def make_optimizer(settings: TrainConfig, model: Model, rate: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of the settings, after clipping by the global norm (0: no clipping).

    For all of them an update is -rate * (direction + weight_decay * weight), the second part for matrices only.
    Adafactor (Shazeer and Stern 2018) has no momentum, relative steps or parameter scale. Lion: Chen et al. 2023. Muon
    (Jordan 2024) moves the layers' matrices; AdamW moves everything else, embedding and head included.
    """
    adam = {"beta1": settings.adam_beta1, "beta2": settings.adam_beta2, "epsilon": settings.adam_epsilon}
    if settings.optimizer == "adamw":
        norm = settings.max_grad_norm
        return adamw(rate, model, max_grad_norm=norm, weight_decay=settings.weight_decay, **adam)
    specs = parameter_specs(model.config) if model.lora is None else lora_specs(model.config, model.lora)
    decays = {path: model.lora is not None or spec.init == "normal" for path, spec in specs.items()}
    if settings.optimizer == "lion":
        chosen = optax.lion(rate, weight_decay=settings.weight_decay, mask=decays)
    elif settings.optimizer == "adafactor":
        chosen = _by_matrix(lambda path: _adafactor(rate, settings.weight_decay if decays[path] else 0.0), specs)
    else:
        chosen = _muon(settings, rate, specs, decays)
    clipped = [optax.clip_by_global_norm(settings.max_grad_norm)] if settings.max_grad_norm else []
    return optax.chain(*clipped, chosen)


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
    """AdamW (Loshchilov and Hutter 2019) after clipping by the global norm (0: no clipping).

    Weight decay acts on matrices: adapters, or projections and embeddings, not norms and biases.
    """
    matrices = None  # all that an adapter holds are
    if model.lora is None:
        matrices = {path: spec.init == "normal" for path, spec in parameter_specs(model.config).items()}
    steps = [optax.clip_by_global_norm(max_grad_norm)] if max_grad_norm else []
    adam = optax.adamw(rate, b1=beta1, b2=beta2, eps=epsilon, weight_decay=weight_decay, mask=matrices)
    steps.append(in_host_memory(adam) if model.moments_on_host else adam)
    return optax.chain(*steps)


def _adafactor(rate: optax.Schedule, weight_decay: float) -> optax.GradientTransformation:
    """Adafactor for one matrix or vector. The second moment of a matrix with two long sides is kept as its means over
    rows and columns."""
    return optax.chain(
        optax.scale_by_factored_rms(min_dim_size_to_factor=SMALLEST_FACTORED),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )


def _muon(
    settings: TrainConfig, rate: optax.Schedule, specs: Mapping[str, ParameterSpec], decays: Mapping[str, bool]
) -> optax.GradientTransformation:
    kinds = {path: "matrix" if is_orthogonalised(spec) else "other" for path, spec in specs.items()}
    matrices = muon(
        rate,
        weight_decay=settings.weight_decay,
        consistent_rms=_MUON_RMS,
        muon_weight_dimension_numbers=lambda params: jax.tree.map(lambda _: _MATRIX, params),
    )
    others = optax.adamw(
        rate,
        b1=settings.adam_beta1,
        b2=settings.adam_beta2,
        eps=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        mask=lambda params: jax.tree.map_with_path(lambda where, _: decays[where[-1].key], params),
    )
    return optax.partition({"matrix": matrices, "other": others}, kinds)


def _by_matrix(
    optimizer_of: Callable[[str], optax.GradientTransformation], specs: Mapping[str, ParameterSpec]
) -> optax.GradientTransformation:
    """An optimizer for each array, which sees every matrix of a stack alone; counters are shared by a stack's."""

    def state_axes(path: str, array: Any) -> PyTree:
        one = jax.ShapeDtypeStruct(array.shape[batch_axes(specs[path]) :], array.dtype)
        return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, jax.eval_shape(optimizer_of(path).init, one))

    def mapped(function: Any, path: str, in_axes: Any, out_axes: Any) -> Any:
        for _ in range(batch_axes(specs[path])):
            function = jax.vmap(function, in_axes, out_axes)
        return function

    def init(params: Params) -> dict[str, PyTree]:
        return {
            path: mapped(optimizer_of(path).init, path, (0,), state_axes(path, array))(array)
            for path, array in params.items()
        }

    def update(gradients: Params, state: dict[str, PyTree], params: Params) -> tuple[Params, dict[str, PyTree]]:
        updates, states = {}, {}
        for path, gradient in gradients.items():
            axes = state_axes(path, gradient)
            step = mapped(optimizer_of(path).update, path, (0, axes, 0), (0, axes))
            updates[path], states[path] = step(gradient, state[path], params[path])
        return updates, states

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
