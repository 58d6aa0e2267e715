"""What a run has measured so far."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """Part of every checkpoint.

    lines: of metrics.jsonl. best: the line of lowest top-1 error, the earliest of equals.
    loss_sum, samples: over the steps of the epoch in progress. grey: samples of it, of all ranks,
    that a grey image stood in for. absent: ids of images that could not be decoded, of this rank
    only until they are gathered.
    """

    lines: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    loss_sum: float = 0.0
    samples: int = 0
    grey: int = 0
    absent: list[int] = field(default_factory=list)

    def state_dict(self) -> dict[str, Any]:
        """All fields."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All fields."""
        vars(self).update(state)
