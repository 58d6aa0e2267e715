"""The configuration section of each method. Imports no torch, so that `--help` is fast."""

from dataclasses import dataclass

from pskd.fields import numerics, require


@dataclass(frozen=True)
class BaselineSection:
    """Cross-entropy with the one-hot label."""

    name: str = numerics("baseline", "the training method")

    def check(self) -> None:
        """Nothing to check."""


@dataclass(frozen=True)
class PSKDSection:
    """PS-KD: targets softened with the model's own prediction of the previous epoch."""

    name: str = numerics("pskd", "the training method")
    alpha_T: float = numerics(0.8, "weight of the past prediction in the last epoch, 0 to 1")

    def check(self) -> None:
        """alpha_T is a convex weight."""
        require(0 <= self.alpha_T <= 1, "method.alpha_T", self.alpha_T, "use a value in [0, 1].")


MethodSection = BaselineSection | PSKDSection

SECTIONS: dict[str, type[MethodSection]] = {"baseline": BaselineSection, "pskd": PSKDSection}
