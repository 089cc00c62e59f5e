"""What devices exchange inside a function that runs on all of them; on a mesh of one device, nothing."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeVar

import jax

from jaxmoe.distributed.mesh import MeshShape

T = TypeVar("T")


def sum_over_devices(tree: T, mesh: MeshShape, but: Collection[str] = ()) -> T:
    """The sum of each array over the devices, of all axes of the mesh `but` these; every device has the result."""
    axes = tuple(axis for axis in mesh.used if axis not in but)
    return jax.lax.psum(tree, axes) if axes else tree
