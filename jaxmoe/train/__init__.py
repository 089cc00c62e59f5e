"""Fine-tuning and training: `python -m jaxmoe.train --help`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxmoe.lazy import exports

if TYPE_CHECKING:
    from jaxmoe.train.loop import train
    from jaxmoe.train.settings import TrainConfig

__all__ = ["TrainConfig", "train"]

__getattr__, __dir__ = exports(
    __name__,
    {
        "TrainConfig": "jaxmoe.train.settings",
        "train": "jaxmoe.train.loop",
    },
)
