"""How `benchmarks.collectives` reads a compiled program: loops, groups of devices, and bytes that a device sends."""

from __future__ import annotations

import pytest

from benchmarks.collectives import Program, exchanges, table
from jaxmoe.distributed.mesh import MeshShape

COMPILED = """\
%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}
%body (p: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %all-gather.1 = f32[8,4]{1,0} all-gather(%convert), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %all-to-all.1 = (f32[1,8]{1,0}, f32[1,8]{1,0}, f32[1,8]{1,0}, f32[1,8]{1,0}) all-to-all(%x), replica_groups=[2,4]<=[8]
}
ENTRY %main (q: f32[8,4]) -> f32[8,4] {
  %while.1 = (s32[], f32[8,4]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"48"}}
  %all-reduce.1 = (f32[100]{0}, f32[20]{0}) all-reduce(%g), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  %reduce-scatter.1 = f32[10]{0} reduce-scatter(%h), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}
}
"""
LOWERED = """
%1 = "stablehlo.all_gather"(%0) <{all_gather_dim = 0 : i64}> : (tensor<2x4xbf16>) -> tensor<8x4xbf16>
%2 = "stablehlo.all_reduce"(%1) ({
  stablehlo.return %3 : tensor<f32>
}) : (tensor<100xf32>) -> tensor<100xf32>
"""


def test_exchanges_are_counted_as_often_as_they_run() -> None:
    found = {each.kind: each for each in exchanges(Program(COMPILED, LOWERED), MeshShape(data=2, expert=4))}
    gather, rows = found["all-gather"], found["all-to-all"]
    assert (gather.axes, gather.times, gather.bytes) == (("expert",), 48, 8 * 4 * 2)  # 16 bits before XLA's passes
    assert gather.sent == 48 * 64 * 3 // 4
    assert (rows.axes, rows.times, rows.bytes) == (("expert",), 48, 4 * 8 * 4)
    assert rows.sent == 48 * (128 // 4) * 3 // 4  # without the padding of the exchange on a CPU
    total, scattered = found["all-reduce"], found["reduce-scatter"]
    assert (total.axes, total.times, total.sent) == (("data",), 1, 480)  # 2 (n - 1) / n of 480 bytes
    assert (scattered.axes, scattered.sent) == (("expert",), 40 * 3)
    assert {row["kind"]: row["sent"] for row in table(list(found.values()))}["all-reduce"] == 480


def test_groups_along_no_axis_are_an_error() -> None:
    odd = COMPILED.replace("{{0,4},{1,5},{2,6},{3,7}}", "{{0,5},{1,4},{2,6},{3,7}}")
    with pytest.raises(AssertionError, match="along no axis"):
        exchanges(Program(odd, LOWERED), MeshShape(data=2, expert=4))
