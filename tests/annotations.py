"""The checker of array annotations that the suite installs: beartype that takes an int for a float, as PEP 484 says."""

from __future__ import annotations

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
