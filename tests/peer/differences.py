"""Tests of transformers and PEFT that pass on stock classes and fail on patched ones, each with its reason.

A reason names what differs by design. A wrong number is never a reason.
"""

from __future__ import annotations

_NO_PROXY = (
    "counts calls of the object with which PEFT adds an adapter to a copy of the weights; "
    "plain adapters are added to the product instead, with no such object"
)

# the end of a test's id -> the reason
DIFFERENCES: dict[str, str] = {
    "TestTargetParameters::test_target_multiple_parameters_on_same_module": _NO_PROXY,
    "TestTargetParameters::test_target_parameters_forward_under_autocast": _NO_PROXY,
    "TestTargetParameters::test_target_parameter_result_caching_works": _NO_PROXY,
}
