"""The worst error under each bound of `tests/tolerances.py`: `python -m pytest -p tests.measured tests/...`.

A plugin of pytest, for revising the table. Errors above their bound are left out: they come from planted faults, or
they fail their test anyway.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests import tolerances

WORST: dict[str, float] = {}


class _Recorded(float):
    """A bound that remembers what was compared with it."""

    __array_ufunc__ = None  # so that NumPy's scalars leave comparisons to this class
    name: str

    def __new__(cls, name: str) -> _Recorded:
        self = super().__new__(cls, tolerances.TOLERANCES[name].bound)
        self.name = name
        return self

    def note(self, error: Any) -> None:
        """Keeps the worst error within the bound."""
        for each in np.ravel(np.asarray(error, np.float64)):
            if each <= float(self):
                WORST[self.name] = max(WORST.get(self.name, 0.0), float(each))

    def __ge__(self, error: Any) -> Any:
        self.note(error)
        return float(self) >= error

    def __gt__(self, error: Any) -> Any:
        self.note(error)
        return float(self) > error

    def __lt__(self, other: Any) -> Any:  # a margin above a bound is not an error
        return float(self) < other

    def __le__(self, other: Any) -> Any:
        return float(self) <= other

    def __hash__(self) -> int:
        return hash(float(self))

    def __radd__(self, other: Any) -> Any:
        return other + float(self)

    def __rsub__(self, other: Any) -> Any:
        return other - float(self)

    def __mul__(self, other: Any) -> Any:
        return float(self) * other

    __rmul__ = __mul__


def _note_close(found: Any, expected: Any, relative: float, absolute: float) -> None:
    """Notes the worst error as a share of what is allowed, in the unit of each bound that allows it."""
    bounds = [limit for limit in (relative, absolute) if isinstance(limit, _Recorded)]
    if bounds:
        found, expected = (np.asarray(a, np.float64) for a in (found, expected))
        allowed = float(absolute) + float(relative) * np.abs(expected)
        error = np.abs(found - expected)
        share = np.where(error == 0, 0, error / np.where(allowed == 0, np.nan, allowed))
        for limit in bounds:
            limit.note(np.nanmax(share, initial=0) * float(limit))


class _Approximately:
    """`pytest.approx` with bounds that remember."""

    __array_ufunc__ = None
    __array_priority__ = 100

    def __init__(self, expected: Any, rel: Any = None, abs: Any = None, nan_ok: bool = False) -> None:
        self._expected, self._rel, self._abs = expected, rel, abs
        numbers = {name: None if limit is None else float(limit) for name, limit in (("rel", rel), ("abs", abs))}
        self._plain = _APPROX(expected, **numbers, nan_ok=nan_ok)

    def __eq__(self, found: object) -> bool:
        if isinstance(self._rel, _Recorded) or isinstance(self._abs, _Recorded):
            _note_close(found, self._expected, self._rel or 0.0, self._abs or 0.0)
        return found == self._plain

    def __hash__(self) -> int:
        return id(self)


_APPROX, _ALLCLOSE, _ASSERT_ALLCLOSE = pytest.approx, np.allclose, np.testing.assert_allclose


def _allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, **options: Any) -> bool:
    _note_close(a, b, rtol, atol)
    return _ALLCLOSE(a, b, float(rtol), float(atol), **options)


def _assert_allclose(actual: Any, desired: Any, rtol: float = 1e-7, atol: float = 0, **options: Any) -> None:
    _note_close(actual, desired, rtol, atol)
    _ASSERT_ALLCLOSE(actual, desired, float(rtol), float(atol), **options)


def pytest_configure() -> None:
    """Installs the recording, before a test module imports `bound`."""
    replaced: Any = tolerances, np, np.testing, pytest
    replaced[0].bound = _Recorded
    replaced[1].allclose = _allclose
    replaced[2].assert_allclose = _assert_allclose
    replaced[3].approx = _Approximately


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the measured errors beside those in the table of tolerances."""
    terminalreporter.section("worst errors")
    for name, worst in sorted(WORST.items()):
        limit, known, _ = tolerances.TOLERANCES[name]
        terminalreporter.write_line(
            f"{name:32} bound {limit:.1e}  table {known if known is not None else '-'}  now {worst:.2e}"
        )
