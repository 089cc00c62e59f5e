"""One small training on a mesh, and how far its numbers are from those of a single device."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.data.packing import Batch
from jaxmoe.distributed.copy_engines import compiler_options
from jaxmoe.distributed.mesh import MeshShape
from jaxmoe.distributed.placement import Placement, whole
from jaxmoe.fp8 import codec as fp8
from jaxmoe.nf4.codec import NF4, dynamic_map, encode
from jaxmoe.parameters import (
    CHOICE_BIAS,
    NESTED_QUANT_MAP,
    ParameterSpec,
    choice_bias_spec,
    lora_specs,
    matrix_shape,
    parameter_specs,
    quantizable,
)
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.optimizers import adamw, learning_rate
from jaxmoe.train.step import Model, TrainState, initial_state, make_train_step
from peers.make_checkpoint import TINY
from tests.parity import COMPILER_OPTIONS

PLAIN = TINY.replace(num_hidden_layers=2)
FOUR = PLAIN.replace(num_experts_per_tok=4)  # with expert=2 tokens are gathered, with the two of the others rows travel
MIXED = TINY.replace(num_hidden_layers=3, mlp_only_layers=(1,), sliding_window=5)
LORA = LoraConfig(r=2, targets=expand_targets(["attention", "router", "experts"]))
FEW = LoraConfig(r=2, targets=expand_targets(["q_proj", "experts"]))
SOME = LoraConfig(r=2, targets=expand_targets(["q_proj", "experts"]), adapted_experts=((1, 3, 6), (0, 7)))
MIXED_LORA = LoraConfig(r=2, targets=expand_targets(["q_proj", "experts", "dense"]))
ALL_AXES = "data=2,fsdp=2,context=2,expert=2"
STEPS, SEQUENCES, LENGTH = 5, 8, 16
BETA1 = 0.9


class Case(NamedTuple):
    """A model, how its batches are divided, and experts that all tokens are sent to, if not the router's choice."""

    config: Qwen3MoeConfig = PLAIN
    lora: LoraConfig | None = LORA
    accumulation: int = 1
    aux: float = 0.1
    imposed: tuple[int, ...] = ()
    nf4: bool = False
    fp8: bool = False
    bias_rate: float = 0.0


CASES = {
    "adapters": Case(),
    "few adapters": Case(lora=FEW),
    "adapters on some experts": Case(lora=SOME),
    "queries": Case(lora=LoraConfig(r=2, targets=("q_proj",))),
    "mixed layers, accumulation": Case(MIXED, MIXED_LORA, accumulation=2),
    "dropout, accumulation": Case(lora=LoraConfig(r=2, targets=("q_proj", "o_proj"), dropout=0.25), accumulation=2),
    "all parameters": Case(lora=None, aux=0.0),
    "all to two experts": Case(lora=LoraConfig(r=2, targets=expand_targets(["v_proj", "experts"])), imposed=(1, 0)),
    "NF4": Case(lora=FEW, nf4=True),
    "FP8": Case(lora=FEW, fp8=True),
    "NF4, all to four experts": Case(FOUR, FEW, nf4=True, imposed=(1, 0, 3, 2)),
    "all parameters, four experts": Case(FOUR, lora=None, aux=0.0, bias_rate=0.02),
}


class Numbers(NamedTuple):
    """What five steps leave: losses and routed rows per expert of each step, the gradients of the first, the trained
    arrays after the last."""

    losses: np.ndarray
    counts: np.ndarray
    gradients: dict[str, np.ndarray]
    trained: dict[str, np.ndarray]

    def named(self) -> dict[str, np.ndarray]:
        """All but the counts, by name."""
        found = {f"losses of step {i + 1}": losses for i, losses in enumerate(self.losses)}
        found |= {f"gradients: {path}": array for path, array in self.gradients.items()}
        return found | {f"trained: {path}": array for path, array in self.trained.items()}


def weights(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """(frozen arrays, trained arrays) of a case; large enough that the router has clear favourites."""
    rng = np.random.default_rng(7)

    def draw(specs: dict[str, ParameterSpec]) -> dict[str, np.ndarray]:
        size = {path: 1.0 if spec.init == "ones" else 0.1 for path, spec in specs.items()}
        return {
            path: np.asarray(size[path] * (1 + 0.1 * (noise - 1) if spec.init == "ones" else noise), np.float32)
            for path, spec in specs.items()
            for noise in [rng.standard_normal(spec.shape)]
        }

    params = draw(parameter_specs(case.config))
    if case.bias_rate:
        params[CHOICE_BIAS] = np.zeros(choice_bias_spec(case.config).shape, np.float32)
    if case.lora is None:
        return {}, params
    adapters = draw(lora_specs(case.config, case.lora))
    if case.fp8:
        return _in_fp8(case.config, params), adapters
    return _in_nf4(case.config, params) if case.nf4 else params, adapters


def _in_fp8(config: Qwen3MoeConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with everything that FP8 is used for in FP8."""
    found = {}
    for path, array in params.items():
        if path not in quantizable(config):
            found[path] = array
            continue
        *lead, matrices, elements = len(array), *matrix_shape(config, path)
        packed = fp8.encode(array.reshape(*lead, matrices, elements // array.shape[-1], array.shape[-1]))
        found |= {f"{path}.codes": packed.codes.reshape(array.shape), f"{path}.scales": packed.scales}
    return found


def _in_nf4(config: Qwen3MoeConfig, params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters with everything that NF4 is used for in NF4."""
    found = {NESTED_QUANT_MAP: dynamic_map()}
    for path, array in params.items():
        if path not in quantizable(config):
            found[path] = array
            continue
        *lead, elements = len(array), *matrix_shape(config, path)
        matrices = [encode(matrix, dynamic_map()) for matrix in array.reshape(-1, elements)]
        packed = NF4(*(np.stack(parts).reshape(*lead, *parts[0].shape) for parts in zip(*matrices, strict=True)))
        found |= packed.named(path)
    return found


def batch(case: Case, step: int) -> Batch:
    """Packed sequences [accumulation, B, T] of two documents and padding; each has its own number of learned tokens."""
    rng = np.random.default_rng(step)
    shape = case.accumulation, SEQUENCES, LENGTH
    place = np.arange(LENGTH)
    first = rng.integers(1, LENGTH, (*shape[:2], 1))
    end = rng.integers(first, LENGTH + 1)
    segment_ids = np.where(place < first, 1, np.where(place < end, 2, 0)).astype(np.int32)
    learned = rng.random(shape) < rng.uniform(0.2, 1.0, (*shape[:2], 1))
    return Batch(
        input_ids=rng.integers(0, case.config.vocab_size, shape, np.int32),
        labels=rng.integers(0, case.config.vocab_size, shape, np.int32),
        weights=(learned & (segment_ids > 0)).astype(np.float32),
        segment_ids=segment_ids,
        position_ids=np.where(place < first, place, np.maximum(place - first, 0)).astype(np.int32),
        experts=np.tile(np.asarray(case.imposed, np.int16), (*shape, len(case.config.sparse_layers), 1))
        if case.imposed
        else None,
    )


class Prepared(NamedTuple):
    """The lowered step of a case on a mesh, its frozen arrays, the state before the first step, where arrays lie."""

    step: Any
    frozen: Any
    state: TrainState
    place: Placement


def prepared(case: Case, mesh: str) -> Prepared:
    """A case on a mesh, ready to be compiled."""
    model = Model(case.config, case.lora, remat="balanced", mesh=MeshShape.parse(mesh), choice_bias_rate=case.bias_rate)
    place = model.placement
    frozen, trainable = (place.place(arrays) for arrays in weights(case))
    trainable = jax.tree.map(jnp.asarray, trainable)  # on one device, placing leaves NumPy arrays alone
    rate = learning_rate("constant", 1e-3, 0, STEPS)
    optimizer = adamw(rate, model, max_grad_norm=0, weight_decay=0.1, beta1=BETA1, beta2=0.99, epsilon=1e-3)
    state = place.place_state(initial_state(trainable, optimizer), trainable)
    step = make_train_step(model, optimizer, rate, next_token_objective(case.aux))
    step = jax.jit(step, compiler_options=compiler_options(model.mesh))
    return Prepared(step.lower(frozen, state, place.place_batch(batch(case, 0), tokens=3)), frozen, state, place)


def train(case: Case, mesh: str) -> Numbers:
    """Five steps on a mesh."""
    lowered, frozen, state, place = prepared(case, mesh)
    step = lowered.compile(COMPILER_OPTIONS)
    losses, counts, gradients = [], [], {}
    for number in range(STEPS):
        state, metrics = step(frozen, state, place.place_batch(batch(case, number), tokens=3))
        losses.append([metrics.loss, metrics.aux_loss])
        counts.append(metrics.expert_counts)
        if not number:
            # AdamW's first moment after one step is the gradient times 1 - beta1.
            moments = next(
                each.mu for each in jax.tree.leaves(state.optimizer, is_leaf=_has_moments) if _has_moments(each)
            )
            gradients = {path: whole(moment) / (1 - BETA1) for path, moment in moments.items()}
    trained = {path: whole(array) for path, array in state.trainable.items()}
    return Numbers(np.asarray(losses), np.asarray(counts), gradients, trained)


def _has_moments(tree: Any) -> bool:
    return hasattr(tree, "mu")


@functools.cache
def on_one_device(name: str) -> Numbers:
    """The numbers of a case on one device."""
    return train(CASES[name], "data=1")


def worst_error(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """(the largest relative error, where it is) of the arrays of `Numbers.named`, by L2 norm."""
    assert found.keys() == expected.keys()
    errors = {name: _error(found[name], array) for name, array in expected.items()}
    where = max(errors, key=errors.__getitem__)
    return errors[where], where


def _error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
