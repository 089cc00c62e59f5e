"""Which tokens of a sequence a device of the `context` axis holds.

The n devices of the axis cut a sequence of T tokens into 2n chunks. Device i holds chunk i and chunk 2n - 1 - i, one
after the other. A token attends to the tokens before it, so a late chunk takes more work than an early one; together
the two chunks take the same work on every device.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped

from jaxmoe.distributed.collectives import gather


def order(length: int, devices: int) -> Int[np.ndarray, " T"]:
    """The tokens of a sequence in the order in which the devices hold them, the first device's first."""
    chunks = np.arange(length).reshape(2 * devices, -1)
    return chunks[[chunk for device in range(devices) for chunk in (device, 2 * devices - 1 - device)]].reshape(-1)


def own(devices: int) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """The numbers of this device's two chunks."""
    me = jax.lax.axis_index("context")
    return me, 2 * devices - 1 - me


def own_part(whole: Shaped[Array, "T ..."], devices: int) -> Shaped[Array, "share ..."]:
    """Of an array over the tokens of a whole sequence, which `devices` share, the part for this device's tokens."""
    if devices == 1:
        return whole
    chunks = whole.reshape(2 * devices, -1, *whole.shape[1:])
    return jnp.concatenate([chunks[chunk] for chunk in own(devices)])


def gather_chunks(share: Shaped[Array, "chunks ..."], devices: int) -> Shaped[Array, "all ..."]:
    """The chunks of all devices in the order of the sequence, given this device's two; each may be cut further, into
    equally many parts. The gradient of a share is the sum over the devices."""
    parts = gather(share, 0, over="context").reshape(devices, 2, share.shape[0] // 2, *share.shape[1:])
    return jnp.concatenate([parts[:, 0], parts[::-1, 1]]).reshape(-1, *share.shape[1:])


def whole_sequences(share: Shaped[Array, "B T ..."], devices: int) -> Shaped[Array, "B S ..."]:
    """All tokens of the sequences in their order, given this device's."""
    return share if devices == 1 else jnp.moveaxis(gather_chunks(jnp.moveaxis(share, 1, 0), devices), 0, 1)
