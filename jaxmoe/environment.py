"""Which versions are installed, so that reports, runs and captures can record where their numbers come from."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib import metadata


def versions(names: Iterable[str]) -> dict[str, str | None]:
    """Name -> installed version, in the order of `names`: "python" or the name of a distribution; None: not installed.

    A source tree that is on the path without being installed has no version either.
    """
    return {name: platform.python_version() if name == "python" else _installed(name) for name in names}


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
