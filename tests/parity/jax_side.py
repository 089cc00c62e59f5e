"""Runs a plan's cases in jaxmoe: its own loading, forward pass and training step, negative controls included.

python -m tests.parity.jax_side PLAN
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxmoe.model.decoder
import jaxmoe.train.loss
import jaxmoe.train.optimizers
import jaxmoe.train.step
from jaxmoe import Qwen3MoeForCausalLM
from jaxmoe.data.packing import Batch as TrainingBatch
from jaxmoe.distributed import copy_engines
from jaxmoe.ops.implementations import choose, forced
from jaxmoe.ops.router import CapturedRouting, Routing, RoutingControl
from tests import oracle
from tests.parity.batches import Batch
from tests.parity.environment import write_environment
from tests.parity.faults import FAULTS
from tests.parity.inprocess import COMPILER_OPTIONS, compiled_forward
from tests.parity.plan import Case, Plan, log, read_batch, run_cases
from tests.parity.trace import jax_trace

SIDE = "jaxmoe"


@contextlib.contextmanager
def weights_captured() -> Iterator[None]:
    """A captured routing holds the weights that a sparse layer receives, in place of router logits."""
    captured = jaxmoe.model.decoder.captured_routing

    def with_weights(routing: Routing, top: int) -> CapturedRouting:
        return captured(routing, top)._replace(top_logits=routing.weights)

    with mock.patch.object(jaxmoe.model.decoder, "captured_routing", with_weights):
        yield


def compiler_options(model: Qwen3MoeForCausalLM) -> dict[str, Any]:
    """Less optimisation on a CPU for models below ten million weights, which take longer to compile than to run."""
    small = sum(array.size for array in model.params.values()) < 10_000_000
    return COMPILER_OPTIONS if small else {}


def control_of(pinned: np.ndarray | None) -> RoutingControl | None:
    """The oracle's experts [Ls, B, T, k] in the form that the model accepts."""
    return None if pinned is None else RoutingControl(experts=jnp.asarray(pinned, jnp.int32))


def forward(model: Qwen3MoeForCausalLM, batch: Batch, pinned: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The arrays that every side writes."""
    config = model.config
    k = config.num_experts_per_tok if config.sparse_layers else 0
    run = compiled_forward(config, model.lora_config, compiler_options(model), model.mesh, keep_logits=k)
    with weights_captured():
        result = run(model.params, model.adapters, *map(jnp.asarray, batch), control_of(pinned))
        logits, out, aux = jax.device_get(result)
    hidden = [np.asarray(h, np.float32) for h in (*out.layer_inputs, out.hidden)]
    arrays = {"logits": logits, "hidden": np.stack(hidden)}
    if config.sparse_layers:
        selected, weights = out.routing.experts.astype(np.int32), out.routing.top_logits
        # what the router would have chosen: the most probable in float32; ties go to the lowest index
        probabilities = np.asarray(jax.nn.softmax(out.router_logits, axis=-1))
        chosen = oracle.top_k(probabilities, k).astype(np.int32)
        arrays |= {"router_logits": out.router_logits, "chosen": chosen, "selected": selected, "weights": weights}
        arrays["aux_loss"] = np.asarray(aux)
    return arrays


def keep_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the gradients that it received."""
    return optax.GradientTransformation(lambda params: params, lambda updates, state, params=None: (updates, updates))


def _check_pinned(counts: np.ndarray, pinned: np.ndarray, valid: np.ndarray) -> None:
    """Raises AssertionError if a step's rows per expert [Ls, E] are not those of the experts imposed on it."""
    expected = np.stack([np.bincount(layer[valid].ravel(), minlength=counts.shape[-1]) for layer in pinned])
    assert np.array_equal(counts, expected), "the training step did not route as it was told"


def train(
    model: Qwen3MoeForCausalLM, case: Case, batch: Batch, pinned: np.ndarray | None
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """By draw: its run, and loss, gradients and adapter after one step of jaxmoe's own training step with AdamW."""
    assert model.lora_config is not None
    spec = jaxmoe.train.step.Model(model.config, model.lora_config, case.dtype, mesh=model.mesh)
    rate = optax.constant_schedule(case.learning_rate)
    adamw = jaxmoe.train.optimizers.adamw(
        rate, spec, max_grad_norm=0.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8
    )
    optimizer = optax.chain(keep_gradients(), adamw)
    experts = None if pinned is None else np.moveaxis(pinned, 0, -2)
    objective = jaxmoe.train.loss.next_token_objective(case.aux_coefficient)
    stepped = jaxmoe.train.step.make_train_step(spec, optimizer, rate, objective)
    run = jax.jit(stepped, compiler_options=compiler_options(model) | copy_engines.compiler_options(model.mesh))
    place = spec.placement
    first = place.place_state(jaxmoe.train.step.initial_state(model.adapters, optimizer), model.adapters)
    for draw, name in enumerate(case.gradient_runs):
        labels = batch.labels_of(draw, case.draws)
        micro = TrainingBatch(
            input_ids=batch.input_ids,
            labels=np.maximum(labels, 0),
            weights=(labels >= 0).astype(np.float32),
            segment_ids=batch.segment_ids,
            position_ids=batch.position_ids,
            experts=experts,
        )
        whole = place.place_batch(jax.tree.map(lambda a: np.asarray(a)[None], micro), tokens=3)
        state, metrics = run(model.params, first, whole)
        if pinned is not None:
            _check_pinned(np.asarray(metrics.expert_counts), pinned, batch.segment_ids > 0)
        out = {"loss": np.asarray(metrics.loss + case.aux_coefficient * metrics.aux_loss, np.float32)}
        out |= {f"gradient.{path}": np.asarray(a) for path, a in state.optimizer[0].items()}
        yield name, out | {f"after.{path}": np.asarray(a) for path, a in state.trainable.items()}


def run_case(plan: Plan, case: Case) -> None:
    """Loads the case's model once and writes the arrays of all of its runs."""
    model = Qwen3MoeForCausalLM.from_pretrained(
        case.quantized or case.checkpoint, dtype=case.dtype, adapter=case.adapter, mesh=case.mesh
    )
    batch = read_batch(case.batch)
    pinned = plan.oracle_experts(case)
    for run in case.runs:
        if run == "gradients":
            for name, arrays in train(model, case, batch, pinned):
                plan.save(case, SIDE, name, arrays)
        elif run == "trace":
            plan.save(case, SIDE, run, jax_trace(model, batch))
        else:
            plan.save(case, SIDE, run, forward(model, batch, pinned if run == "pinned" else None))
    for fault in case.faults:
        log(SIDE, f"{case.name}: planted fault: {fault}")
        run, function = ("trace", jax_trace) if "trace" in case.runs else ("free", forward)
        with FAULTS[fault]():
            plan.save(case, SIDE, f"{run}+{fault}", function(model, batch))


def main() -> int:
    """Runs the named cases of a plan; without names, every case."""
    folder, *names = sys.argv[1:]
    plan = Plan.read(pathlib.Path(folder))
    plan = replace(plan, cases=tuple(case for case in plan.cases if not names or case.name in names))
    if jax.default_backend() != plan.device:
        raise SystemExit(f"device: expected {plan.device}, JAX runs on {jax.default_backend()}")

    def run(case: Case) -> None:
        in_kernel = case.dtype == "bfloat16" and choose("fp8_products").name == "registers"  # mosaic runs there, too
        rows_in_fp8 = forced(fp8_products="mosaic" if in_kernel else "xla")
        with rows_in_fp8 if case.rows_in_fp8 else contextlib.nullcontext():
            run_case(plan, case)

    failed = run_cases(plan, SIDE, run)
    write_environment(plan, SIDE)
    return failed


if __name__ == "__main__":
    sys.exit(main())
