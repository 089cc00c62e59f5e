"""The parts that benchmarks share: the time of a step by stage, the limits, and the timing of sides in turn."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from benchmarks import limits, stages
from benchmarks.timing import Side, seconds_in_turn
from jaxmoe.config import LoraConfig, expand_targets
from jaxmoe.data.packing import Batch
from jaxmoe.model.init import init_adapters, init_parameters
from jaxmoe.presets import PRESETS
from jaxmoe.train.loss import next_token_objective
from jaxmoe.train.optimizers import adamw, learning_rate
from jaxmoe.train.step import Model, initial_state, make_train_step
from peers.configs import config_of
from tests.tolerances import bound

HLO = """
  %fusion.1 = bf16[8,4]{1,0} fusion(%p0), kind=kLoop, metadata={op_type="mul" op_name="jit(f)/jvp(while)/body/attention/mul"}
  ROOT %gemm.2 = f32[8,8]{1,0} custom-call(%fusion.1), metadata={op_name="jit(f)/transpose(jvp(while))/body/attention/dot_product_attention/dot" stack_frame_id=7}
  %sort.3 = s32[8]{0} sort(%p1), metadata={op_name="jit(f)/transpose(jvp(while))/body/rematted_computation/experts/permute/sort"}
  %copy.4 = f32[8]{0} copy(%p2)
"""  # noqa: E501 - as XLA prints it


def event(name, start, duration, **more):
    return {"ph": "X", "pid": 1, "tid": 7, "name": name, "ts": start, "dur": duration, "args": more}


TRACE = {
    "traceEvents": [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": "/device:GPU:0"}},
        {"ph": "M", "pid": 2, "name": "process_name", "args": {"name": "/host:CPU"}},
        {"ph": "M", "pid": 3, "name": "process_name", "args": {"name": "/device:GPU:1"}},
        event("loop_fusion", 0.0, 2000.0, hlo_op="fusion.1", correlation_id=1),
        event("flash", 2000.0, 3000.0, hlo_op="gemm.2", correlation_id=2),
        event("sort", 4000.0, 4000.0, hlo_op="sort.3", correlation_id=3),
        event("MemcpyD2D", 9000.0, 1000.0, correlation_id=4),
        event("ncclDevKernel_AllGather", 9500.0, 1500.0, hlo_op="fusion.1", correlation_id=5),
        {**event("sort", 0.0, 9999.0, hlo_op="sort.3", correlation_id=6), "pid": 3},
        event("a derived line", 0.0, 9999.0, hlo_op="fusion.1"),
        {**event("host", 0.0, 9999.0, hlo_op="fusion.1", correlation_id=1), "pid": 2},
    ]
}


def test_a_trace_by_stage():
    events, paths = stages.kernels(TRACE), stages.scopes(HLO)
    assert stages.by_stage(events, paths, steps=2) == {
        ("attention", "forward"): 1.0,
        ("dot_product_attention", "backward"): 1.5,
        ("permute", "recomputed"): 2.0,
        ("other", "forward"): 0.5,
        ("exchange", "forward"): 0.75,
    }
    assert stages.busy(events) == 10.0  # one of the eleven milliseconds is idle, one is two kernels at once
    assert stages.only_exchanging(events) == 1.0
    assert stages.slowest(events, paths, 1, 1)[0][:3] == ("sort.3", 4.0, 1)


def test_table_adds_up():
    found = {"stages": [["attention", "forward", 1.0], ["head", "backward", 3.0]], "busy": 4.0}
    lines = stages.table(found, step=5.0)
    assert [line.split()[0] for line in lines] == ["stage", "attention", "head", "no"]
    assert [line.split()[-1] for line in lines[1:]] == ["20.0%", "60.0%", "20.0%"]


def test_every_stage_is_named_in_a_compiled_step():
    config = config_of("plain")
    lora = LoraConfig(r=2, targets=expand_targets(["attention", "router", "experts"]))
    model = Model(config, lora, "float32", "fast")
    rate = learning_rate("constant", 1e-4, 0, 1)
    optimizer = adamw(rate, model, max_grad_norm=1.0, weight_decay=0.0, beta1=0.9, beta2=0.999, epsilon=1e-8)
    params = jax.eval_shape(partial(init_parameters, config), jax.random.key(0))
    state = jax.eval_shape(lambda key: initial_state(init_adapters(config, lora, key), optimizer), jax.random.key(0))
    ids = np.zeros((1, 2, 64), np.int32)
    batch = Batch(ids, ids, ids.astype(np.float32), ids, ids)
    step = jax.jit(make_train_step(model, optimizer, rate, next_token_objective()))
    compiled = step.lower(params, state, batch).compile()
    text = compiled.as_text()
    assert text is not None
    found = {stages.stage_of(path) for path in stages.scopes(text).values()}
    # Parts of the mixture may be fused into each other; then only the scope of the whole remains.
    assert {stage for stage, _ in found} >= {"dot_product_attention", "attention", "router", "head", "optimizer"}
    assert {stage for stage, _ in found} & {"permute", "gate_up", "down", "combine"}
    assert {which for _, which in found} == {"forward", "recomputed", "backward"}


@pytest.mark.parametrize(
    ("length", "step", "prefill"), [(2048, 54_200, 126_000), (4096, 46_500, 112_000), (8192, 36_200, 91_000)]
)
def test_limits_of_the_published_shape(length, step, prefill):
    """Tokens per second at 790 TFLOP/s, worked out by hand from the shape."""
    config = PRESETS["qwen3-30b-a3b"]
    assert 790e12 / limits.step_flops(config, length) == pytest.approx(step, rel=bound("published_limits"))
    assert 790e12 / limits.forward_flops(config, length, head=False) == pytest.approx(
        prefill, rel=bound("published_limits")
    )


def test_a_matmul_is_timed():
    assert limits.matmul_flops_per_second(size=64, repeat=2) > 0


def test_sides_take_turns(monkeypatch):
    """On a clock that only calls advance: a round is every side's calls in a row, and each side's time is its own."""
    clock, order = [0.0], []
    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: clock[0])
    monkeypatch.setattr("benchmarks.timing.time.sleep", lambda s: clock.__setitem__(0, clock[0] + s))

    def side(name: str, seconds: float) -> Side:
        def call() -> str:
            order.append(name)
            clock[0] += seconds
            return name

        def wait(result: str) -> None:
            assert result == name
            clock[0] += 0.5  # what the host waits for at the end of a round

        return Side(call, wait)

    found = seconds_in_turn({"a": side("a", 1), "b": side("b", 3)}, queued=2, rounds=8, rest=100)
    assert found == {"a": 1.25, "b": 3.25}
    # After one call each to warm up, either side may be first in a round: what ran before sets the card's clock.
    assert order[:2] == ["a", "b"]
    rounds = ["".join(order[start : start + 4]) for start in range(2, len(order), 4)]
    assert len(rounds) == 8
    assert set(rounds) == {"aabb", "bbaa"}
