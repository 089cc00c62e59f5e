"""The mesh: how many devices share each dimension of a run. Standard library only.

The batch is split over all axes of the mesh, so each device runs the forward and the backward pass on tokens of its
own. The axes `data`, `fsdp` and `expert` split the sequences; they differ in what else the devices share:

    data      nothing: every device holds all weights
    fsdp      the layers' weights: each holds a share, and puts a layer together when it comes to it
    context   the tokens of a sequence: each holds two chunks of it, and gathers the keys and values of all
    expert    the experts: each holds E / n of them, and the routed rows of its tokens travel to those that they need
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.errors import UserError, shown

AUTO = "auto"


@dataclass(frozen=True)
class MeshShape:
    """How many devices each axis of the mesh has; 1 for an axis that is not used."""

    data: int = 1
    fsdp: int = 1
    context: int = 1
    expert: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshShape:
        """The mesh of a text such as "data=2,expert=4".

        Raises:
            UserError: the text names an unknown axis, or one twice, or a size that is not a whole number from 1 on.
        """
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, _, size = (each.strip() for each in part.partition("="))
            if axis not in AXES or axis in sizes:
                once = " once" if axis in sizes else ""
                raise UserError(
                    f"mesh: expected auto, or axes{once} among {', '.join(AXES)} (data=2), found {shown(text)}"
                )
            if not (size.isascii() and size.isdigit() and int(size[:7]) >= 1 and len(size) < 7):
                raise UserError(f"mesh: {axis}: expected a whole number from 1 on, found {shown(size)}")
            sizes[axis] = int(size)
        return cls(**sizes)

    @property
    def size(self) -> int:
        """How many devices the mesh has."""
        return math.prod(dataclasses.astuple(self))

    @property
    def used(self) -> tuple[str, ...]:
        """The axes with more than one device."""
        return tuple(axis for axis in AXES if self[axis] > 1)

    def __getitem__(self, axis: str) -> int:
        return getattr(self, axis)

    def __str__(self) -> str:
        return ",".join(f"{axis}={self[axis]}" for axis in self.used) or "data=1"

    def product(self, axes: tuple[str, ...]) -> int:
        """How many devices these axes have together."""
        return math.prod(self[axis] for axis in axes)

    def check_devices(self, found: int) -> None:
        """Raises UserError if there are not enough devices."""
        if self.size > found:
            raise UserError(f"mesh: {self} needs {self.size} devices, found {found}")

    def check_used(self, found: int, processes: int) -> None:
        """Raises UserError if there are several processes and the mesh leaves out some of the devices found."""
        if processes > 1 and self.size < found:
            raise UserError(
                f"mesh: expected one of all {found} devices of {processes} processes, found {self}; name another mesh, "
                f"or a batch_size that is a multiple of {found}"
            )

    def check_experts(self, found: int) -> None:
        """Raises UserError unless the devices can share a layer's experts evenly; 0 for a model without experts."""
        if max(found, 1) % self.expert:
            divisors = ", ".join(str(each) for each in range(1, found + 1) if found % each == 0) or "1"
            raise UserError(
                f"mesh: expert: expected a divisor of the model's {found} experts ({divisors}), found {self.expert}"
            )

    def check_batch(self, batch_size: int) -> None:
        """Raises UserError unless the devices can share the sequences of a micro-batch evenly."""
        shares = self.product(SEQUENCE_AXES)
        if batch_size % shares:
            names = " x ".join(f"{axis}={self[axis]}" for axis in SEQUENCE_AXES if self[axis] > 1)
            raise UserError(
                f"batch_size: expected a multiple of {shares} (sequences are shared by {names}), found {batch_size}"
            )

    def check_length(self, seq_length: int) -> None:
        """Raises UserError unless the devices can share the tokens of a sequence evenly."""
        chunks = 2 * self.context  # a device holds two
        if self.context > 1 and seq_length % chunks:
            below = seq_length // chunks * chunks
            raise UserError(
                f"seq_length: expected a multiple of {chunks} (a sequence is shared by context={self.context}, two "
                f"chunks each), found {seq_length}; {f'{below} or ' if below else ''}{below + chunks} would do"
            )

    def check_sequences_whole(self) -> None:
        """Raises UserError if devices share the tokens of a sequence."""
        if self.context > 1:
            raise UserError(
                f"mesh: context: only valid in training and capture (each device generates whole sequences; "
                f"data, fsdp and expert share them), found {self.context}"
            )


# The outermost first: devices that are neighbours on the last axis exchange most.
AXES = tuple(field.name for field in dataclasses.fields(MeshShape))
SEQUENCE_AXES = ("data", "fsdp", "expert")  # the axes that the sequences of a batch are split over


ONE_DEVICE = MeshShape()


def named(text: str, devices: int, config: Qwen3MoeConfig) -> MeshShape:
    """The mesh of a text such as "data=2,expert=4".

    Raises:
        UserError: no mesh, or one that so many devices, or the model, do not allow.
    """
    mesh = MeshShape.parse(text)
    mesh.check_devices(devices)
    mesh.check_experts(config.num_experts if config.sparse_layers else 0)
    return mesh
