"""Errors of the environment that no command can avoid, as one line: a variable that JAX cannot read, devices that it
cannot start, too little memory to load a library. They also happen during imports, before a command can catch anything.
"""

from __future__ import annotations

import os
import pathlib
import sys
import traceback
from types import TracebackType

_EXIT_USER_ERROR = 2
_NO_MEMORY = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")


def report_in_one_line() -> None:
    """From now on such an error ends the process with one line and exit code 2; any other keeps its traceback."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (reason := explanation(error)) is None:
            before(kind, error, trace)
            return
        name = pathlib.Path(sys.argv[0]).parent.name if sys.argv[0].endswith("__main__.py") else sys.argv[0]
        print(f"{name}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
        os._exit(_EXIT_USER_ERROR)

    sys.excepthook = hook


def explanation(error: BaseException) -> str | None:
    """What in the environment is the cause, and what JAX or the system says about it; None if the cause is another."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and any(word in text for word in _NO_MEMORY)):
        return f"out of memory: {text}" if text else "out of memory"
    frames = traceback.extract_tb(error.__traceback__)
    if frames and pathlib.PurePath(frames[-1].filename).parts[-3:] == ("jax", "_src", "config.py"):
        return f"a variable of the environment that JAX reads: {text}"
    return _missing_devices()


def _missing_devices() -> str | None:
    """Why JAX cannot start the devices that the environment asks for, or None if it can. JAX's own error may be an
    assertion, far from the cause."""
    asked, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not asked or jax is None:
        return None
    try:
        jax.devices()
    except Exception as error:
        return (
            f"JAX_PLATFORMS: expected devices that JAX can start, found {asked!r}: {str(error) or type(error).__name__}"
        )
    return None
