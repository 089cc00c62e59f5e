"""Which versions are installed."""

from __future__ import annotations

import platform

import numpy as np

from jaxmoe.environment import versions


def test_versions_are_those_of_what_is_imported() -> None:
    found = versions(["numpy", "python", "no-such-distribution-of-anything"])
    assert list(found) == ["numpy", "python", "no-such-distribution-of-anything"]
    assert found == {
        "numpy": np.__version__,
        "python": platform.python_version(),
        "no-such-distribution-of-anything": None,
    }
