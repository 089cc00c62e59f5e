"""A device without memory left: XLA's report of it becomes one line that says what would fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jaxmoe.errors import UserError

_REPORT = "RESOURCE_EXHAUSTED"  # XLA's word, while it compiles and while it runs
_BYTES = re.compile(r"(\d+) ?(?:B\b|bytes)")


def exhausted(error: BaseException) -> str | None:
    """One line about the allocation that failed, if `error` is XLA's report of a full device; None: another error."""
    if not isinstance(error, RuntimeError) or _REPORT not in str(error):
        return None
    found = _BYTES.search(str(error))
    return f"out of device memory ({int(found[1]) / 2**30:.2f} GiB more)" if found else "out of device memory"


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turns XLA's report of a full device into a UserError that ends in `advice()`, what the user can do."""
    try:
        yield
    except RuntimeError as error:
        line = exhausted(error)
        if line is None:
            raise
        raise UserError(f"{line}: {advice()}") from error
