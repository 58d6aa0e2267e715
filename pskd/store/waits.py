"""How long training has waited for a disk."""

from dataclasses import dataclass


@dataclass
class Waits:
    """times: how often. seconds: for how long in all."""

    times: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """One more."""
        self.times += 1
        self.seconds += seconds
