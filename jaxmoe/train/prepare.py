"""Everything a run needs, read and checked before anything is written: `prepare` makes the plan of the run.

Cheap checks come first. The plan holds only the shapes of the weights and a function that reads them, since the steps
are compiled while that function works.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from jaxmoe import cuda
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets, read_config
from jaxmoe.control.expert_choice import chosen_experts
from jaxmoe.data.packing import Batch, Sequences
from jaxmoe.distributed import launch
from jaxmoe.distributed.mesh import AUTO, ONE_DEVICE, SEQUENCE_AXES, MeshShape, named
from jaxmoe.distributed.placement import Placement
from jaxmoe.errors import UserError, counted
from jaxmoe.lora import adapts_experts, modules_to_save
from jaxmoe.memory import (
    FLOAT32,
    HOST_ROOM,
    ROOM,
    Remat,
    Workload,
    adapter_count,
    check_fits,
    choose_remat,
    device_bytes,
    embedding_on_host,
    format_bytes,
    host_bytes,
    offloaded_bytes,
    parameter_count,
    training_forecast,
    training_forecasts,
)
from jaxmoe.memory_advice import advice
from jaxmoe.mesh_choice import ON_A_MESH, choose_mesh
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.model.interface import Params
from jaxmoe.model.mesh_flag import usable_devices
from jaxmoe.model.opening import load_adapter, open_checkpoint
from jaxmoe.model.selection import fallbacks, selected_implementations
from jaxmoe.parameters import CHOICE_BIAS, Quantization, choice_bias_spec
from jaxmoe.store.digest import WeightsDigest
from jaxmoe.store.expert_adapters import without_void_experts
from jaxmoe.store.loading import OnLayer, load_stacks, stack_shapes
from jaxmoe.train.data import Data, read_data
from jaxmoe.train.host_memory import EMBEDDING, looked_up
from jaxmoe.train.identity import Identity, identity_of
from jaxmoe.train.loss import Loss, NextTokenCrossEntropy, Objective, Term, objective
from jaxmoe.train.preferences import DirectPreference, OddsRatioPreference
from jaxmoe.train.router_losses import RouterZLoss, RoutingPenalty
from jaxmoe.train.settings import TrainConfig
from jaxmoe.train.step import Model

_ROOM_TO_COMPILE = 0.85  # share of the device's memory; XLA tries out products of up to the size of the logits
_UNROLLING_PAYS = 3000  # steps of Qwen3-30B-A3B on an H200 that save as much time as compiling its layers takes


class Weights(NamedTuple):
    """Arrays, or their shapes, by path."""

    frozen: Any
    trainable: Any


@dataclass(frozen=True)
class Source:
    """A model whose weights have not been read: what a step computes, the weights' shapes, how to read them.

    Weights that were read lie where the model's placement says; shapes say so, too."""

    model: Model
    shapes: Weights
    # The digest collects what is read from a checkpoint; the paths are those of arrays that stay on the host.
    read: Callable[[MeshShape, OnLayer, WeightsDigest, Collection[str]], Weights]
    from_folder: bool = True  # False: random weights, of which the digest collects nothing
    quantization: Quantization | None = None

    def on(self, mesh: MeshShape) -> Source:
        """The same with every array where it lies on a mesh."""
        there = replace(self, model=self.model._replace(mesh=mesh))
        return replace(there, shapes=there._placed(self.shapes))

    def load(self, on_layer: OnLayer, digest: WeightsDigest, on_host: Collection[str]) -> Weights:
        """Reads the weights, or makes them."""
        return self._placed(self.read(self.model.mesh, on_layer, digest, on_host))

    def _placed(self, weights: Weights) -> Weights:
        return Weights(*map(self.model.placement.place, weights))


@dataclass(frozen=True)
class Plan:
    """What a run does: its model, its data, how many steps, which losses."""

    settings: TrainConfig
    source: Source
    data: Data
    objective: Objective
    total_steps: int
    warmup_steps: int
    notices: list[str]
    identity: Identity  # without the entry "model", which needs the weights
    workload: Workload  # what the forecast of the device's memory is for

    @property
    def model(self) -> Model:
        """What a step computes."""
        return self.source.model

    def batch(self, step: int) -> Batch:
        """The input of a step, from 0 on."""
        shape = (self.settings.accumulation, self.settings.batch_size)
        batch = self.data.sequences.batch(step, shape, self.model.placement.lines_of_process)
        for captured in self.data.captured:
            batch = captured.on(batch)
        return self.model.placement.place_batch(batch, tokens=3)

    def held_out_batches(self) -> Iterator[Batch]:
        """The inputs of an evaluation; there are held-out records."""
        held_out, size = self.data.held_out, self.settings.batch_size
        assert held_out is not None
        placement = self.model.placement
        for number in range(held_out.steps(1, size)):
            yield placement.place_batch(held_out.batch(number, (size,), placement.lines_of_process), tokens=2)

    @property
    def on_host(self) -> tuple[str, ...]:
        """Paths of the frozen arrays that stay in the host's memory."""
        model = self.model
        return (EMBEDDING,) if embedding_on_host(model.config, model.lora, model.remat) else ()

    def fed(self, frozen: Any, batch: Batch) -> tuple[Any, Batch]:
        """The frozen arrays, or their shapes, and a batch, as a step takes them."""
        return looked_up(frozen, batch) if self.on_host else (frozen, batch)

    def smaller_steps(self) -> str:
        """What would fit into the device's memory instead of this run's steps."""
        return _way_out(self.workload, jax.local_devices()[0])

    @property
    def is_tight(self) -> bool:
        """Whether the steps leave too little of the device's memory to try out products beside the weights."""
        available = device_bytes(jax.local_devices()[0])
        return available is not None and training_forecast(self.workload).total > _ROOM_TO_COMPILE * available


def prepare(settings: TrainConfig, previous: Mapping[str, Any] | None, shared: pathlib.Path | None = None) -> Plan:
    """Reads and checks everything; `previous` is the identity of the run that is resumed. Several processes read the
    data together, by way of the folder `shared`, which all of them see.

    Raises:
        UserError: bad input.
    """
    config = _model_config(settings)
    lora = _new_lora(settings, config)
    if config.attention_dropout:
        raise UserError(f"attention_dropout: expected 0 (training applies none), found {config.attention_dropout}")
    if settings.seq_length > config.max_position_embeddings:
        raise UserError(
            f"seq_length: expected at most the model's max_position_embeddings ({config.max_position_embeddings}), "
            f"found {settings.seq_length}"
        )
    # Five arrays of a batch, four bytes for each token (`jaxmoe.data.packing.Batch`).
    tokens = settings.batch_size * settings.accumulation * settings.seq_length
    check_fits("batch_size x accumulation x seq_length", 20 * tokens * (2 if settings.learns_from_pairs else 1))
    if settings.trains_all:
        check_fits("the model's parameters", FLOAT32 * parameter_count(config))
    elif lora is not None:
        check_fits("lora_r: the adapters", FLOAT32 * adapter_count(config, lora))
    named_mesh, about_mesh = _named_mesh(settings, config)
    data = read_data(settings, config, previous, shared)
    total_steps = settings.max_steps
    if data.epochs is not None:
        assert isinstance(data.sequences, Sequences), "the length of a stream is unknown"
        total_steps = data.sequences.steps(data.epochs, settings.batch_size * settings.accumulation)
    assert total_steps is not None
    warmup_steps = settings.warmup_steps
    if warmup_steps is None:
        warmup_steps = round(settings.warmup_ratio * total_steps)
    aux_coefficient = settings.router_aux_loss_coef
    if aux_coefficient is None:
        aux_coefficient = 0.0 if settings.router_bias_rate else config.router_aux_loss_coef

    opened = _open(settings, config, lora)
    model = opened.model._replace(
        packed=data.packed,
        unroll=settings.unroll_layers,
        reference=settings.has_reference,
        optimizer=settings.optimizer,
        router_logits=bool(settings.router_z_loss or settings.routing_penalty),
        base_router=bool(settings.routing_penalty) and settings.routing_base is None,
        dense_router=settings.dense_mixer,
    )
    _check_router(settings, config)
    workload = _workload(settings, model, opened.quantization)
    if named_mesh is None:
        mesh, why = _automatic_mesh(settings, workload, previous)
        about_mesh = [why]
    else:
        mesh = named_mesh
    source, model = opened.on(mesh), model._replace(mesh=mesh)
    workload = replace(workload, mesh=mesh, batch_size=settings.batch_size // mesh.product(SEQUENCE_AXES))
    workload, notices = _with_remat(settings, workload, previous, mesh)
    model = model._replace(remat=workload.remat)
    notices = data.notices + about_mesh + notices + fallbacks(config, model.dtype, mesh)
    if previous is None or settings.unroll_layers:  # a resumed run cannot change it
        notices += _about_unrolling(settings, total_steps, jax.default_backend() == "gpu")
    worked_out = data.digests | {
        "lora": model.lora.to_dict() | {"base_model_name_or_path": None} if model.lora else None,
        "dtype": model.dtype,
        "remat": model.remat,
        "unroll_layers": settings.unroll_layers or None,  # runs from before this flag have no such entry
        "router_aux_loss_coef": aux_coefficient,
        "max_steps": total_steps,
        "loss": _loss_entry(settings),
        "optimizer": settings.optimizer if settings.optimizer != "adamw" else None,
        "router_training": _router_entry(settings),
        "warmup_steps": warmup_steps,
    }
    return Plan(
        settings,
        replace(source, model=model),
        data,
        objective(_loss(settings), aux_coefficient if config.sparse_layers else 0.0) + _router_terms(settings),
        total_steps,
        warmup_steps,
        notices,
        identity_of(settings, worked_out),
        workload,
    )


def _loss(settings: TrainConfig) -> Loss:
    """What is minimised, besides load balancing."""
    match settings.loss:
        case "dpo":
            return DirectPreference(settings.beta, settings.label_smoothing)
        case "orpo":
            return OddsRatioPreference(settings.beta)
        case "next-token":
            return NextTokenCrossEntropy()


def _loss_entry(settings: TrainConfig) -> dict[str, Any] | None:
    """The loss in the identity; runs from before this flag have no such entry."""
    if not settings.learns_from_pairs:
        return None
    entry: dict[str, Any] = {"name": settings.loss, "beta": settings.beta}
    if settings.has_reference:
        entry |= {"label_smoothing": settings.label_smoothing, "stores_reference": settings.stores_reference}
    return entry


def _check_router(settings: TrainConfig, config: Qwen3MoeConfig) -> None:
    for name in ("router_z_loss", "routing_penalty", "dense_mixer", "router_bias_rate"):
        if getattr(settings, name) and not config.sparse_layers:
            raise UserError(f"{name}: expected a model with mixture-of-experts layers, found none")


def _router_terms(settings: TrainConfig) -> Objective:
    """The losses on the router's logits; none whose weight is 0."""
    terms = Term(RouterZLoss(), settings.router_z_loss), Term(RoutingPenalty(), settings.routing_penalty)
    return tuple(term for term in terms if term.coefficient)


def _router_entry(settings: TrainConfig) -> dict[str, float] | None:
    """How routers are trained, in the identity; runs from before these flags have no such entry."""
    names = ("router_z_loss", "routing_penalty", "dense_mixer", "router_bias_rate")
    return {name: value for name in names if (value := getattr(settings, name))} or None


def _named_mesh(settings: TrainConfig, config: Qwen3MoeConfig) -> tuple[MeshShape | None, list[str]]:
    """The mesh of the settings, and what to say about it; None if it is to be chosen."""
    found, processes = jax.device_count(), launch.this().count
    if settings.mesh is None and processes == 1:
        idle = [f"idle: {counted(found - 1, 'more device')}; --mesh auto uses all {found}"] if found > 1 else []
        return ONE_DEVICE, idle
    if settings.mesh in (None, AUTO):
        return None, []
    mesh = named(settings.mesh, found, config)
    mesh.check_used(found, processes)
    return mesh, []


def _automatic_mesh(
    settings: TrainConfig, workload: Workload, previous: Mapping[str, Any] | None
) -> tuple[MeshShape, str]:
    """The mesh that `--mesh auto` means, and a line that says which and why."""
    policies: Any = ON_A_MESH if settings.remat == "auto" else (settings.remat,)
    if settings.remat == "auto" and previous is not None and previous.get("remat") in ON_A_MESH:
        policies = (previous["remat"],)
    choice, why = choose_mesh(workload, settings.batch_size, usable_devices(), policies)
    choice.mesh.check_used(jax.device_count(), launch.this().count)
    return choice.mesh, why


def _model_config(settings: TrainConfig) -> Qwen3MoeConfig:
    if settings.from_scratch is not None:
        return read_config(settings.from_scratch)[0]
    assert settings.model is not None
    return Qwen3MoeConfig.from_pretrained(settings.model)


def _new_lora(settings: TrainConfig, config: Qwen3MoeConfig) -> LoraConfig | None:
    """The configuration of new adapters; None if all parameters are trained, or an adapter is given."""
    if settings.trains_all or settings.adapter is not None:
        return None
    targets, experts = expand_targets(settings.lora_targets), ()
    if settings.lora_experts is not None:
        if not any(map(adapts_experts, targets)):
            raise UserError(
                f"lora_experts: expected lora_targets with experts, found {','.join(settings.lora_targets)}"
            )
        experts = chosen_experts(settings.lora_experts, settings.lora_capture, config)
    lora = LoraConfig(
        r=settings.lora_r,
        alpha=settings.lora_alpha,
        use_rslora=settings.rslora,
        targets=targets,
        adapted_experts=experts,
        base_model_name_or_path=str(settings.model),
        dropout=settings.lora_dropout or 0.0,
        full_router=settings.router == "full",
        **modules_to_save(settings.modules_to_save, config),
    )
    lora.check_against(config)
    lora.check_dropout()
    return lora


def _open(settings: TrainConfig, config: Qwen3MoeConfig, lora: LoraConfig | None) -> Source:
    """The model of the settings; `lora` is the configuration of new adapters, if any. A checkpoint's weights are read
    where they lie on the mesh: no device could hold all of a large model."""
    key = jax.random.key(settings.seed)
    if settings.from_scratch is not None:
        fresh = partial(jax.jit(init_parameters, static_argnums=(0, 2)), config, key, jnp.dtype("float32"))
        draw = partial(_with_choice_bias, fresh, config) if settings.router_bias_rate else fresh
        model = Model(config, None, settings.dtype or "float32", choice_bias_rate=settings.router_bias_rate)
        return Source(model, Weights({}, jax.eval_shape(draw)), lambda *_: Weights({}, draw()), False)
    assert settings.model is not None
    dtype = "float32" if settings.full else settings.dtype
    checkpoint_config, checkpoint = open_checkpoint(settings.model, dtype, settings.quantize, settings.dequantize)
    shapes = stack_shapes(checkpoint_config, checkpoint)

    def read(mesh: MeshShape, on_layer: OnLayer, digest: WeightsDigest, on_host: Collection[str]) -> Params:
        placement = Placement(mesh, checkpoint_config, None)
        return load_stacks(
            checkpoint_config, checkpoint, on_layer=on_layer, digest=digest, on_host=on_host, placement=placement
        )

    if settings.full:
        if checkpoint.quantization is not None:
            form = checkpoint.quantization.form.upper()
            raise UserError(
                f"full: expected weights that can be trained, found {form} in {settings.model}; "
                "python -m convert hf2jax --dequantize writes such"
            )
        model = Model(config, None, settings.dtype or "float32")
        return Source(model, Weights({}, shapes), lambda *how: Weights({}, read(*how)))
    if settings.merge and checkpoint.quantization is not None:
        form = checkpoint.quantization.form.upper()
        raise UserError(f"merge: expected weights to merge into, found {form}; merge with python -m convert afterwards")
    if settings.adapter is not None:
        lora, loaded = without_void_experts(*load_adapter(settings.adapter, checkpoint_config, checkpoint))
        if settings.lora_dropout is not None or settings.learns_from_pairs:  # as in TRL, pairs are compared without it
            lora = replace(lora, dropout=settings.lora_dropout or 0.0)
        lora.check_dropout()
        adapters: Callable[[Params], Params] = lambda base: loaded
    else:
        assert lora is not None
        adapters = partial(_fresh_adapters, config, lora, key)
    model = Model(config, lora, str(shapes["embed_tokens"].dtype), seed=settings.seed)

    def load(mesh: MeshShape, on_layer: OnLayer, digest: WeightsDigest, on_host: Collection[str]) -> Weights:
        base = read(mesh, on_layer, digest, on_host)
        return Weights(base, adapters(base))

    return Source(model, Weights(shapes, jax.eval_shape(adapters, shapes)), load, quantization=checkpoint.quantization)


def _with_choice_bias(draw: Callable[[], Params], config: Qwen3MoeConfig) -> Params:
    return draw() | {CHOICE_BIAS: jnp.zeros(choice_bias_spec(config).shape, jnp.float32)}


def _fresh_adapters(config: Qwen3MoeConfig, lora: LoraConfig, key: jax.Array, base: Params) -> Params:
    """New adapters for a model with the parameters `base`, which they never alias: the state is donated later."""
    copied = {path: base[path] for path in ("embed_tokens", *lora.saved_paths) if path in base}
    copied = copied if lora.saved_paths else {}
    return jax.jit(init_adapters, static_argnums=(0, 1))(config, lora, key, base=copied)


def _workload(settings: TrainConfig, model: Model, quantization: Quantization | None) -> Workload:
    """What the memory of a step depends on, before the recomputation policy is chosen."""
    selected: Any = selected_implementations(model.config, model.dtype)
    return Workload(
        model.config,
        model.lora,
        settings.batch_size // model.mesh.product(SEQUENCE_AXES),
        settings.seq_length,
        model.dtype,
        accumulation=settings.accumulation,
        quantize=quantization and quantization.form,
        quantization=quantization,
        packed=model.packed,
        mesh=model.mesh,
        pairs=settings.learns_from_pairs,
        optimizer=settings.optimizer,
        # The logits and their gradient, and the base's; those of a capture come with all micro-batches.
        router_logits=2 * model.router_logits
        + (settings.accumulation if settings.routing_base is not None else int(model.base_router)),
        **selected,
    )


def _with_remat(
    settings: TrainConfig, workload: Workload, previous: Mapping[str, Any] | None, mesh: MeshShape
) -> tuple[Workload, list[str]]:
    """The workload with its recomputation policy; a notice if `auto` chose it, and one if the step will hardly fit.

    A resumed run keeps its policy.

    Raises:
        UserError: "offload" on a mesh of several devices.
    """
    device = jax.local_devices()[0]
    available = device_bytes(device)
    notices = []
    if settings.remat != "auto":
        workload = replace(workload, remat=settings.remat)
    elif previous is not None and previous.get("remat") in get_args(Remat):
        workload = replace(workload, remat=previous["remat"])
    else:
        forecasts = training_forecasts(workload)
        on_cpu = device.platform == "cpu"
        may_offload = (
            mesh.size == 1 and not on_cpu and not settings.unroll_layers and _host_holds(offloaded_bytes(workload))
        )
        room = HOST_ROOM if on_cpu else ROOM
        workload = replace(workload, remat=choose_remat(forecasts, available, room=room, may_offload=may_offload))
        there = "the available memory is unknown" if available is None else f"{format_bytes(available)} of memory"
        if workload.remat == "offload":
            there += f", and {format_bytes(offloaded_bytes(workload))} of the host's"
        total = format_bytes(forecasts[workload.remat].total)
        notices = [f"--remat auto picks {workload.remat}: forecast {total}, {there}"]
    if workload.remat == "offload" and mesh.size > 1:
        raise UserError(f"remat: expected fast, balanced or low-memory on several devices ({mesh}), found offload")
    if available is not None and training_forecast(workload).total > available:
        notices.append(f"the device's memory may not be enough: {_way_out(workload, device)}")
    return workload, notices


def _way_out(workload: Workload, device: Any) -> str:
    """What would fit into the device's memory, by forecast; first more of the memory, if JAX has not taken it all."""
    available, total = device_bytes(device), cuda.total_bytes() if device.platform == "gpu" else None
    more = ""
    if available is not None and total is not None and total - cuda.OUTSIDE_POOL > available / ROOM:
        more = f"--memory-limit {total / cuda.GIB:.3g} gives it all of the GPU's memory; "
    return more + advice(workload, available)


def _host_holds(needed: int) -> bool:
    """Whether half of the host's memory is enough; the rest is for reading weights and for other programs."""
    there = host_bytes()
    return there is not None and needed <= there // 2


def _about_unrolling(settings: TrainConfig, steps: int, on_gpu: bool) -> list[str]:
    """The cost of `--unroll-layers`, or its gain for a run that is long enough."""
    if settings.unroll_layers:
        return ["--unroll-layers: compiling every layer takes about one more minute before the first step"]
    if on_gpu and steps >= _UNROLLING_PAYS and not settings.trains_all and settings.remat != "offload":
        return [
            f"{steps:,} steps: --unroll-layers would make each 4 to 5 % faster, for about one more minute of compiling"
        ]
    return []
