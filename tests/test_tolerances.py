"""The table of tolerances: every bound is used, none is below its measured error, and there are none elsewhere."""

from __future__ import annotations

import ast
import pathlib
import re
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT
from tests.tolerances import TOLERANCES

FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if path.name != "tolerances.py")
LIMITS = {"rtol", "atol", "rel", "abs", "rel_tol", "abs_tol"}
# function -> its first argument that is a limit
POSITIONAL = {"approx": 1, "allclose": 2, "assert_allclose": 2, "isclose": 2}
SMALL = 0.01  # from here on a number beside "<" is a share or a size, not an error


def mentions() -> Iterator[re.Pattern[str]]:
    """Patterns of every string in the tests that may name a bound: in an f-string any text may stand for a value."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [re.escape(str(p.value)) if isinstance(p, ast.Constant) else ".+" for p in node.values]
                if parts[0] != ".+":
                    yield re.compile("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.compile(re.escape(node.value))


def test_every_bound_is_used() -> None:
    patterns = set(mentions())
    assert [name for name in TOLERANCES if not any(pattern.fullmatch(name) for pattern in patterns)] == []


@pytest.mark.parametrize("name", TOLERANCES)
def test_no_error_was_measured_above_its_bound(name: str) -> None:
    bound, measured, what = TOLERANCES[name]
    assert bound > 0 and what
    if measured is not None:
        assert 0 <= measured <= bound
        assert measured > 0 or "same bits" in what, "0.0 is for equal bits; what was not recorded is None"


def literals(tree: ast.AST) -> Iterator[ast.expr]:
    """Expressions that hold a tolerance as a number: a limit of `approx` and its like, or a small number beside "<"."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first = POSITIONAL.get(ast.unparse(node.func).split(".")[-1], len(node.args))
            limits = [*node.args[first:], *(word.value for word in node.keywords if word.arg in LIMITS)]
            yield from (limit for limit in limits if any(number != 0 for number in _numbers(limit)))
        elif isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for operand, operator in zip(operands, [*node.ops, node.ops[-1]], strict=True):
                is_less = isinstance(operator, ast.Lt | ast.LtE) and operand is not node.left
                is_slack = isinstance(operand, ast.BinOp) and isinstance(operand.op, ast.Add | ast.Sub)
                if (is_less or is_slack) and any(0 < number < SMALL for number in _numbers(operand)):
                    yield operand


def _numbers(node: ast.AST) -> list[float]:
    """Numbers in an expression, outside of its calls: `bound("name")` holds none."""
    if isinstance(node, ast.Constant):
        is_number = isinstance(node.value, int | float) and not isinstance(node.value, bool)
        return [node.value] if is_number else []  # pyright: ignore[reportReturnType]
    if isinstance(node, ast.Call | ast.Compare):
        return []
    return [number for child in ast.iter_child_nodes(node) for number in _numbers(child)]


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.name)
def test_no_tolerance_stands_beside_the_table(path: pathlib.Path) -> None:
    found = literals(ast.parse(path.read_text(encoding="utf-8")))
    bare = [f"{path.name}:{node.lineno}: {ast.unparse(node)}: give it a name in tests/tolerances.py" for node in found]
    assert not bare, "\n".join(bare)


@pytest.mark.parametrize(
    "line",
    [
        "assert x == pytest.approx(y, rel=1e-6)",
        "assert x == pytest.approx(y, 1e-6)",
        "np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 if exact else 1e-2)",
        "assert np.allclose(x, y, 1e-5)",
        "assert error(x) <= 1e-6 * norm(x)",
        "assert (x <= y + 1e-12).all()",
        "assert (x >= y - 1e-3).all()",
        "assert abs(x - y).max() < 1e-4",
    ],
)
def test_a_bare_tolerance_is_found(line: str) -> None:
    assert list(literals(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        'assert x == pytest.approx(y, rel=bound("a"))',
        "np.testing.assert_allclose(x, y, rtol=0, atol=limit)",
        "assert x == pytest.approx(0.5)",
        "assert max(errors) > 1e-2",
        "assert share < 0.95",
        'assert x <= y + bound("a")',
    ],
)
def test_what_is_no_bare_tolerance(line: str) -> None:
    assert not list(literals(ast.parse(line)))
