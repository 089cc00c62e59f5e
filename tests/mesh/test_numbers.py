"""Losses, every gradient, the routing and what was trained are the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxmoe.train import step
from tests.mesh import trial
from tests.tolerances import bound

MESHES = [
    ("data=8", "adapters"),
    ("data=2", "mixed layers, accumulation"),
    ("data=4", "dropout, accumulation"),
    ("data=2", "all parameters"),
]


def check(mesh: str, name: str) -> None:
    found, expected = trial.train(trial.CASES[name], mesh), trial.on_one_device(name)
    np.testing.assert_array_equal(found.counts, expected.counts)
    error, where = trial.worst_error(found, expected)
    assert error <= bound("mesh_fp32"), where


@pytest.mark.parametrize(("mesh", "name"), MESHES)
def test_a_mesh_changes_no_number(mesh: str, name: str) -> None:
    check(mesh, name)


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


@pytest.mark.parametrize("fault", [not_summed, read_twice])
def test_a_planted_fault_is_noticed(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trial.on_one_device("adapters")
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        check("data=2", "adapters")
