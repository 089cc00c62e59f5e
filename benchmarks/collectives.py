"""What the devices of a mesh exchange in a LoRA training step, read from the compiled program; runs on a CPU.

    python -m benchmarks.collectives --mesh data=8 --mesh expert=8 --mesh fsdp=8

The program is compiled for virtual CPU devices and never run, so no weights exist. "MB sent" are the bytes that a
device sends in a step, with the usual rings: of an array of `size` bytes, 2 (n - 1) / n for an all-reduce, (n - 1) / n
for the others. The table has the sizes on GPUs: on a CPU the ragged exchange of rows is padded to n times its size, and
bfloat16 is exchanged as float32, which the program before XLA's passes tells.

Beside it stands what expert parallelism without an exchange of rows sends at the same shape, as in SkyRL tx: every
device has all tokens of its group, computes those of its experts, and the results are summed.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks import shapes
from jaxmoe.cli.arguments import ArgumentParser, run
from jaxmoe.config import LoraConfig, Qwen3MoeConfig, expand_targets
from jaxmoe.distributed.mesh import AXES, SEQUENCE_AXES, MeshShape

_KINDS = "all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) .*\{\s*$")
_COLLECTIVE = re.compile(rf"= (?P<type>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")
# An operation of StableHLO; the type of its result follows the first arrow.
_LOWERED = re.compile(
    r"stablehlo\.(?P<kind>all_reduce|all_gather|reduce_scatter|all_to_all)\b.*?"
    r"-> tensor<(?P<dims>(?:\d+x)*)(?P<dtype>\w+)>",
    re.DOTALL,
)
_CALLED = re.compile(r"(?:to_apply|body|condition|calls|true_computation|false_computation)=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}


@dataclass(frozen=True)
class Exchange:
    """A collective operation of a program: its kind, the mesh axes of its groups, how many devices a group has, how
    often a step runs it, and the bytes of its results on a device."""

    kind: str
    axes: tuple[str, ...]
    devices: int
    times: int
    bytes: int

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a step, with rings; rows that are exchanged count without their padding."""
        n = self.devices
        size = {"reduce-scatter": n * self.bytes, "all-reduce": 2 * self.bytes, "all-to-all": self.bytes // n}
        return self.times * size.get(self.kind, self.bytes) * (n - 1) // n


class Program(NamedTuple):
    """A program's text: compiled, and as it was before XLA's passes."""

    compiled: str
    lowered: str


def exchanges(program: Program, mesh: MeshShape) -> list[Exchange]:
    """Every collective operation of a compiled program; what stands in a loop counts as often as it runs."""
    sixteen = {
        (match["kind"].replace("_", "-"), math.prod(map(int, match["dims"].split("x")[:-1])))
        for match in _LOWERED.finditer(program.lowered)
        if match["dtype"] in ("bf16", "f16")
    }
    found: dict[str, list[Exchange]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry = name = ""
    for line in program.compiled.splitlines():
        if begins := _COMPUTATION.match(line):
            name = begins["name"]
            entry = name if line.startswith("ENTRY") else entry
            found[name], calls[name] = [], []
            continue
        trips = int(match[1]) if (match := _TRIPS.search(line)) else 1
        calls.get(name, []).extend((called, trips) for called in _CALLED.findall(line))
        if match := _COLLECTIVE.search(line):
            axes, devices = _axes(line, mesh)
            found[name].append(Exchange(match["kind"], axes, devices, 1, _size(match["kind"], match["type"], sixteen)))

    def of(name: str, times: int) -> Iterator[Exchange]:
        for each in found.get(name, []):
            yield Exchange(each.kind, each.axes, each.devices, times, each.bytes)
        for called, trips in calls.get(name, []):
            yield from of(called, times * trips)

    return list(of(entry, 1))


def _size(kind: str, text: str, sixteen: set[tuple[str, int]]) -> int:
    """Bytes of arrays; `sixteen` are the kinds and numbers of elements of those of 16 bits."""
    arrays = [(dtype, math.prod(map(int, filter(None, dims.split(","))))) for dtype, dims in _ARRAY.findall(text)]
    together = sum(count for _, count in arrays)  # XLA may write a result as several arrays
    return sum(
        count * (2 if dtype == "f32" and {(kind, count), (kind, together)} & sixteen else _BYTES[dtype])
        for dtype, count in arrays
    )


def _axes(line: str, mesh: MeshShape) -> tuple[tuple[str, ...], int]:
    """(the mesh axes that the groups of an operation go along, devices of a group)."""
    import numpy as np

    wanted = {frozenset(group) for group in _groups(line, mesh)}
    devices = np.arange(mesh.size).reshape([mesh[axis] for axis in AXES])
    for count in range(1, len(mesh.used) + 1):
        for axes in itertools.combinations(mesh.used, count):
            along = _along(devices, [AXES.index(axis) for axis in axes])
            if {frozenset(group) for group in along} == wanted:
                return axes, mesh.product(axes)
    raise AssertionError(f"groups along no axis: {line}")


def _along(devices: Any, axes: Sequence[int]) -> list[list[int]]:
    """The groups of devices that differ along these axes only."""
    rest = [axis for axis in range(devices.ndim) if axis not in axes]
    return devices.transpose(*rest, *axes).reshape(-1, math.prod(devices.shape[axis] for axis in axes)).tolist()


def _groups(line: str, mesh: MeshShape) -> list[list[int]]:
    """The groups of devices that exchange, in any of the three forms in which XLA writes them."""
    import numpy as np

    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        named = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", match[2])]
        return _along(np.arange(mesh.size).reshape(list(sizes.values())), named)
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims, order = ([int(n) for n in text.split(",")] if text else None for text in match.groups())
        groups: Any = np.arange(mesh.size).reshape(dims).transpose(order).reshape(shape)
        return groups.tolist()
    match = re.search(r"replica_groups=\{(\{[\d,{}]+\})\}", line)
    assert match is not None, line
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])]


def training_program(
    config: Qwen3MoeConfig, lora: LoraConfig, mesh: MeshShape, batch_size: int, length: int
) -> Program:
    """The training step."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxmoe.data.packing import Batch
    from jaxmoe.parameters import lora_specs, parameter_specs
    from jaxmoe.train.loss import next_token_objective
    from jaxmoe.train.optimizers import adamw, learning_rate
    from jaxmoe.train.step import Model, make_train_step, state_to_compile

    model = Model(config, lora, "bfloat16", remat="fast", mesh=mesh)
    specs = {path: (spec.shape, jnp.bfloat16) for path, spec in parameter_specs(config).items()}
    adapters = {path: (spec.shape, jnp.float32) for path, spec in lora_specs(config, lora).items()}
    frozen, trainable = (
        model.placement.place({path: jax.ShapeDtypeStruct(*each) for path, each in arrays.items()})
        for arrays in (specs, adapters)
    )
    integers, floats = (np.zeros((1, batch_size, length), dtype) for dtype in (np.int32, np.float32))
    batch = model.placement.place_batch(Batch(integers, integers, floats, integers, integers), tokens=3)
    rate = learning_rate("constant", 1e-4, 0, 100)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    state = state_to_compile(model, trainable, optimizer)
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective(0.001)), donate_argnums=1)
    return _program(step.lower(frozen, state, batch))


def _program(lowered: Any) -> Program:
    return Program(lowered.compile().as_text(), lowered.as_text())


def replicated_program(config: Qwen3MoeConfig, mesh: MeshShape, tokens: int) -> Program:
    """Forward and backward pass of layers whose experts are shared without an exchange of rows: every device of the
    `expert` axis has the `tokens` of all, and their results are summed. The experts' work itself is left out."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    from jaxmoe.distributed.placement import devices_of

    def layers(weights: Any, x: Any) -> Any:
        @jax.checkpoint
        def layer(x: Any, weight: Any) -> tuple[Any, None]:
            return x + jax.lax.psum((x * weight).astype(jnp.bfloat16), "expert"), None

        return jax.lax.scan(layer, x, weights)[0]

    def gradient(weights: Any, x: Any) -> Any:
        return jax.grad(lambda w, x: jnp.sum(layers(w, x).astype(jnp.float32)), argnums=(0, 1))(weights, x)

    step = jax.shard_map(
        gradient, mesh=devices_of(mesh), in_specs=(P(None, "expert"), P()), out_specs=(P(None, "expert"), P())
    )
    weights = jax.ShapeDtypeStruct((len(config.sparse_layers), mesh.expert), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((tokens, config.hidden_size), jnp.bfloat16)
    return _program(jax.jit(step).lower(weights, x))


def table(found: Sequence[Exchange]) -> list[dict[str, Any]]:
    """The operations of a step by axis and kind."""
    times: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for each in found:
        place = " x ".join(each.axes), each.kind
        times[place] += each.times
        sent[place] += each.sent
    return [{"axes": axes, "kind": kind, "times": times[axes, kind], "sent": sent[axes, kind]} for axes, kind in times]


def _print(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    print(title)
    for row in rows:
        print(f"  {row['axes']:<16} {row['kind']:<16} {row['times']:6} times a step {row['sent'] / 1e6:12,.1f} MB sent")


def main() -> None:
    """Prints a table for each mesh."""
    parser = ArgumentParser(description="What devices exchange in a training step, read from the compiled program.")
    shapes.add_arguments(parser)
    parser.add_argument(
        "--mesh", action="append", metavar="MESH", help="such as data=2,expert=4; several times for several"
    )
    parser.add_argument("--batch-size", type=int, default=2, metavar="N", help="sequences a device (default: 2)")
    parser.add_argument(
        "--seq-length", type=int, default=4096, metavar="N", help="tokens of a sequence (default: 4096)"
    )
    parser.add_argument(
        "--lora-targets", default="attention", help="groups or targets, with commas (default: attention)"
    )
    args = parser.parse_args()
    meshes = [MeshShape.parse(text) for text in args.mesh or ["data=8", "fsdp=8", "expert=8"]]
    count = max(mesh.size for mesh in meshes)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    config, record = shapes.config_of(args), []
    lora = LoraConfig(r=16, targets=expand_targets(args.lora_targets.split(",")))
    for mesh in meshes:
        sequences = args.batch_size * mesh.product(SEQUENCE_AXES)
        rows = table(exchanges(training_program(config, lora, mesh, sequences, args.seq_length), mesh))
        _print(f"{mesh}: {args.batch_size} x {args.seq_length} tokens on each device", rows)
        record.append({"mesh": str(mesh), "rows": rows})
        if mesh.expert > 1:
            group = MeshShape(expert=mesh.expert)
            tokens = args.batch_size * args.seq_length * mesh.expert
            rows = table(exchanges(replicated_program(config, group, tokens), group))
            _print(f"expert={mesh.expert}, replicate and sum: the experts' results alone, same tokens", rows)
            record[-1]["replicate and sum"] = rows
    shapes.write_json(args.json, record)


if __name__ == "__main__":
    run(main)
