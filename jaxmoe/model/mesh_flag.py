"""What `--mesh` means where a model runs and is not trained, on the devices that JAX finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxmoe.config import Qwen3MoeConfig
from jaxmoe.distributed import launch
from jaxmoe.distributed.mesh import AUTO, ONE_DEVICE, MeshShape, named
from jaxmoe.distributed.placement import devices_per_node
from jaxmoe.memory import HOST_ROOM, ROOM, Workload, device_bytes, generation_forecast
from jaxmoe.mesh_choice import Devices, choose_mesh
from jaxmoe.model.selection import selected_implementations
from jaxmoe.store.checkpoint import Checkpoint


class Inputs(NamedTuple):
    """How many sequences a model runs at once, of how many tokens each, and whether more of them may be added, so that
    all devices have some."""

    sequences: int
    length: int
    more: bool = False


def usable_devices() -> Devices:
    """The devices that JAX finds, and how many bytes of one a forecast may fill."""
    device = jax.local_devices()[0]
    room = device_bytes(device)
    if room is not None:
        # The devices of a CPU have its memory together.
        room = int(HOST_ROOM * room / jax.local_device_count() if device.platform == "cpu" else ROOM * room)
    return Devices(jax.device_count(), devices_per_node(), room)


def inference_mesh(
    text: str | None,
    config: Qwen3MoeConfig,
    opened: Callable[[], tuple[Qwen3MoeConfig, Checkpoint]],
    inputs: Inputs,
    devices: Devices | None = None,
) -> tuple[MeshShape, list[str]]:
    """(the mesh that the flag names, without it one device, of several processes all; what to say about it).

    `auto` asks the forecast of generation, for which `opened` opens the checkpoint. `devices` are by default those that
    JAX finds.

    Raises:
        UserError: no mesh, or one that the devices or the model do not allow.
    """
    processes = launch.this().count
    if text is None and processes == 1:
        return ONE_DEVICE, []
    devices = devices or usable_devices()
    if text not in (None, AUTO):
        mesh = named(text, devices.count, config)
        mesh.check_used(devices.count, processes)
        return mesh, []
    config, checkpoint = opened()
    dtype = str(checkpoint.dtypes["embed_tokens"])
    form = checkpoint.quantization
    quantized: Any = {"quantize": form and form.form, "quantization": form}
    work = Workload(config, None, 1, inputs.length, dtype, **quantized, **selected_implementations(config, dtype))
    choice, why = choose_mesh(work, inputs.sequences, devices, forecast=generation_forecast)
    if inputs.more and (not choice.fits or processes > 1):
        sequences = -(-inputs.sequences // devices.count) * devices.count
        choice, why = choose_mesh(work, sequences, devices, forecast=generation_forecast)
    choice.mesh.check_used(devices.count, processes)
    return choice.mesh, [why]
