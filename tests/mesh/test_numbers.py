"""Losses, every gradient, the routing and what was trained are the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.distributed import collectives
from jaxmoe.ops import dispatch
from jaxmoe.train import step
from tests.mesh import trial
from tests.tolerances import bound

pytestmark = pytest.mark.wide

CASES = [
    (trial.ALL_AXES, "mixed layers, accumulation"),
    (trial.ALL_AXES, "NF4"),
    ("data=2,fsdp=2,context=2", "mixed layers, accumulation"),
    ("data=2,context=2,expert=2", "mixed layers, accumulation"),
    ("fsdp=2,expert=2", "NF4, all to four experts"),
    ("fsdp=4", "mixed layers, accumulation"),
    ("expert=4", "all to two experts"),
    ("data=2,context=2,expert=2", "all to two experts"),
    ("fsdp=2,expert=2", "NF4"),
    ("context=8", "adapters"),
    ("context=4", "mixed layers, accumulation"),
    ("context=2", "all parameters"),
    ("context=2,expert=2", "dropout, accumulation"),
    ("fsdp=2,context=2,expert=2", "NF4"),
    ("fsdp=2,context=4", "all parameters"),
    ("data=2,expert=4", "dropout, accumulation"),
    ("data=8", "adapters"),
    ("data=4", "dropout, accumulation"),
    ("data=2", "mixed layers, accumulation"),
    ("data=2", "all parameters"),
    ("context=2,expert=2", "all parameters, four experts"),
    ("expert=8", "adapters"),
    ("expert=2", "mixed layers, accumulation"),
    ("data=2,expert=4", "all parameters"),
    ("data=2,expert=2", "NF4"),
    ("fsdp=2,expert=2", "adapters on some experts"),
    ("fsdp=2", "all parameters"),
    ("data=2,fsdp=2,expert=2", "all parameters"),
    ("fsdp=8", "NF4"),
    ("fsdp=2,expert=2", "FP8"),
    ("data=2,expert=2", "FP8"),
    ("data=2,fsdp=2", "dropout, accumulation"),
]


def check(mesh: str, name: str) -> None:
    found, expected = trial.train(trial.CASES[name], mesh), trial.on_one_device(name)
    np.testing.assert_array_equal(found.counts, expected.counts)
    error, where = trial.worst_error(found.named(), expected.named())
    assert error <= bound("mesh_fp32"), where


@pytest.mark.parametrize(("mesh", "name"), CASES)
def test_a_mesh_changes_no_number(mesh: str, name: str) -> None:
    check(mesh, name)


def test_gathered_tokens_change_no_number_where_rows_would_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs of several processes, between which rows cannot travel."""
    case = trial.CASES["all to two experts"]
    assert not dispatch.gathering_sends_less(2, case.config.num_experts_per_tok)
    monkeypatch.setattr(collectives.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(collectives.jax, "process_count", lambda: 2)
    assert collectives.rows_can_travel(4) and not collectives.rows_can_travel(32)
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "rows_can_travel", lambda _: False)
    monkeypatch.setattr(dispatch, "travel", None)
    check("expert=2", "all to two experts")


def test_no_reduce_scatter_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that are shared, and the gradient of a gather, without gloo's reduce-scatter; numbers stay the same."""
    mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    share, other = jax.random.normal(jax.random.key(0), (16, 3)), jax.random.normal(jax.random.key(1), (64, 3))

    def outcome(share: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
        def loss(share: jax.Array) -> jax.Array:
            return jnp.sum(collectives.shares_of_sum(collectives.gather(share, 0) * other, "fsdp") ** 3)

        return jax.grad(loss)(share), collectives.shares_of_sum(other, "fsdp")

    def run() -> tuple[str, list[np.ndarray]]:
        spec = jax.sharding.PartitionSpec("fsdp")
        program = jax.jit(jax.shard_map(outcome, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
        return program.lower(share, other).compile().as_text() or "", [*map(np.asarray, program(share, other))]

    text, expected = run()
    monkeypatch.setattr(collectives.jax.distributed, "is_initialized", lambda: True)
    without, found = run()
    assert "reduce-scatter" in text and "reduce-scatter" not in without
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=bound("mesh_fp32"))


def not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each device keeps the gradient of its own tokens."""
    right = step.sum_over_devices

    def wrong(tree: Any, mesh: Any, but: Any = ()) -> Any:
        is_gradient = isinstance(tree, jax.Array) and tree.ndim > 1
        return tree if is_gradient else right(tree, mesh, but)

    monkeypatch.setattr(step, "sum_over_devices", wrong)


def read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device reads the sequences of the first."""
    right = step.Model.run

    def wrong(self: step.Model, frozen: Any, trainable: Any, batch: Any, **options: Any) -> Any:
        of_first = jax.tree.map(lambda a: jax.lax.all_gather(a, "data")[0], batch)
        return right(self, frozen, trainable, of_first, **options)

    monkeypatch.setattr(step.Model, "run", wrong)


def swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows go to the device beside the one that holds their expert."""
    right = dispatch.travel
    monkeypatch.setattr(dispatch, "travel", lambda rows, most, sizes, axis: right(rows, most, jnp.roll(sizes, 1), axis))


@pytest.mark.parametrize(
    ("fault", "mesh"),
    [
        (not_summed, "data=2"),
        (not_summed, "context=2"),
        (read_twice, "data=2"),
        (swapped, "expert=2"),
    ],
)
def test_a_planted_fault_is_noticed(fault: Any, mesh: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.on_one_device("all to two experts")
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check(mesh, "all to two experts")
