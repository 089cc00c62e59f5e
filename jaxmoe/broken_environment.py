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
# Libraries start as many threads as these say; with millions they never begin to work.
_THREADS = ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MOST_THREADS = 65_536
# Settings of JAX under which working programs raise, also this package's.
_STRICT = ("jax_numpy_rank_promotion", "jax_numpy_dtype_promotion")
_NO_MEMORY = ("failed to map segment", "cannot allocate memory", "Cannot allocate memory")


def report_in_one_line() -> None:
    """From now on such an error ends the process with one line and exit code 2; any other keeps its traceback.

    A number of threads that no library can start ends it at once.
    """
    if (reason := too_many_threads()) is not None:
        print(f"{_command()}: {reason}", file=sys.stderr, flush=True)
        sys.exit(_EXIT_USER_ERROR)
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (reason := explanation(error)) is None:
            before(kind, error, trace)
            return
        print(f"{_command()}: {' '.join(reason.split())}", file=sys.stderr, flush=True)
        os._exit(_EXIT_USER_ERROR)

    sys.excepthook = hook


def _command() -> str:
    return pathlib.Path(sys.argv[0]).parent.name if sys.argv[0].endswith("__main__.py") else sys.argv[0]


def too_many_threads() -> str | None:
    """Which variable asks for more threads than a machine has room for, or None."""
    for name in _THREADS:
        text = os.environ.get(name, "").strip()
        if text.isascii() and text.isdigit() and (len(text) > 18 or int(text) > _MOST_THREADS):
            return f"{name}: expected at most {_MOST_THREADS} threads, found {text[:40]}"
    return None


def explanation(error: BaseException) -> str | None:
    """What in the environment is the cause, and what JAX or the system says about it; None if the cause is another."""
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, ImportError) and any(word in text for word in _NO_MEMORY)):
        return f"out of memory: {text}" if text else "out of memory"
    if setting := next((name for name in _STRICT if name in text), None):
        return f"{setting.upper()}: expected JAX's default, under which this package runs; JAX says: {text}"
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
