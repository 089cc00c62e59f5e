"""Ten LoRA steps on the demo checkpoint give the recorded losses; `tests/golden/record.py` compares bits."""

import json

import pytest

from tests.golden import record
from tests.tolerances import bound

RECORDED = json.loads((record.ROOT / "tests/golden/losses.json").read_text(encoding="utf-8"))


TESTED = ("all_targets", "nf4")  # they contain what the other runs compute; `record.py` has all


@pytest.fixture(scope="module")
def losses():
    return record.losses(TESTED)


@pytest.mark.long
@pytest.mark.parametrize("run", TESTED)
def test_ten_steps_give_the_recorded_losses(run, losses):
    assert losses[run] == pytest.approx(RECORDED[run], rel=bound("golden_losses_fp32"))
    assert len(losses[run]) == record.STEPS


def test_a_record_that_differs_in_a_bit_is_noticed():
    import numpy as np

    array = np.ones(3, np.float32)
    assert record.compare({"a": array}, {"a": array.copy()}) == []
    assert record.compare({"a": array}, {"a": np.nextafter(array, 2)}) != []
    assert record.compare({"a": array}, {}) == ["a: only in one record"]
