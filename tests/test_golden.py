"""Ten LoRA steps on the demo checkpoint give the recorded losses; `tests/golden/record.py` compares bits."""

import json

import pytest

from tests.golden import record
from tests.tolerances import bound

RECORDED = json.loads((record.ROOT / "tests/golden/losses.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def losses():
    return record.losses()


@pytest.mark.long
@pytest.mark.parametrize("run", record.RUNS)
def test_ten_steps_give_the_recorded_losses(run, losses):
    limit = bound("golden_losses_bf16" if run == "bfloat16" else "golden_losses_fp32")
    assert losses[run] == pytest.approx(RECORDED[run], rel=limit)
    assert len(losses[run]) == record.STEPS


def test_a_record_that_differs_in_a_bit_is_noticed():
    import numpy as np

    array = np.ones(3, np.float32)
    assert record.compare({"a": array}, {"a": array.copy()}) == []
    assert record.compare({"a": array}, {"a": np.nextafter(array, 2)}) != []
    assert record.compare({"a": array}, {}) == ["a: only in one record"]
