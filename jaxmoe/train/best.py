"""The lowest held-out loss of a run: which evaluation it was, and how many evaluations have passed since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxmoe.errors import counted


@dataclass
class Best:
    """The evaluation with the lowest held-out loss after the first step (None: none yet), and the number of evaluations
    since that were not lower."""

    step: int | None = None
    loss: float = float("inf")
    since: int = 0

    @classmethod
    def stored_in(cls, metadata: Mapping[str, Any]) -> Best:
        """What `stored` gave; earlier versions stored nothing."""
        found = metadata.get("best")
        return cls(**found) if isinstance(found, dict) and found.keys() == {"step", "loss", "since"} else cls()

    def stored(self) -> dict[str, Any]:
        """The entries for a checkpoint's metadata."""
        return {} if self.step is None else {"best": {"step": self.step, "loss": self.loss, "since": self.since}}

    def evaluated(self, step: int, loss: float) -> None:
        """Takes note of one evaluation; a loss that is not a number is not lower."""
        if loss < self.loss:
            self.step, self.loss, self.since = step, loss, 0
        else:
            self.since += 1

    def words(self) -> str:
        """The evaluation, as a line for the user."""
        since = counted(self.since, "evaluation")
        return f"{since} since the lowest held-out loss, {self.loss:.4f} at step {self.step}"

    def is_over(self, patience: int | None) -> bool:
        """Whether the last `patience` evaluations (None: no limit) were not lower."""
        return patience is not None and self.step is not None and self.since >= patience
