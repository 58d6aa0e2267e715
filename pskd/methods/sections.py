"""The configuration section of each method. Imports no torch, so that `--help` is fast."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from pskd.fields import numerics, require


@dataclass(frozen=True)
class MethodSection(ABC):
    """What any method's section has beside its options; a method is said here and nowhere else."""

    name: str = numerics("", "the training method")

    @property
    @abstractmethod
    def code(self) -> tuple[str, str]:
        """Module and class of the method: imported when a run needs it."""

    @property
    def keeps_predictions(self) -> bool:
        """Whether the method reads past predictions and returns those to remember."""
        return False

    def check(self) -> None:  # noqa: B027 (a default)
        """Refuse options that make no sense."""


@dataclass(frozen=True)
class BaselineSection(MethodSection):
    """Cross-entropy with the one-hot label."""

    name: str = numerics("baseline", "the training method")
    code = ("pskd.methods.baseline", "Baseline")


@dataclass(frozen=True)
class LabelSmoothingSection(MethodSection):
    """Cross-entropy with a smoothed label."""

    name: str = numerics("label_smoothing", "the training method")
    eps: float = numerics(0.1, "mass that the label gives away, 0 to 1")
    convention: Literal["k", "k-1"] = numerics(
        "k", "spread over all K classes (torch), or over the K-1 others (TF-KD's code)"
    )
    code = ("pskd.methods.label_smoothing", "LabelSmoothing")

    def check(self) -> None:
        """eps is a share."""
        require(0 <= self.eps < 1, "method.eps", self.eps, "use a value in [0, 1).")


@dataclass(frozen=True)
class CSKDSection(MethodSection):
    """CS-KD: predictions of two samples of one class are pulled together."""

    name: str = numerics("cskd", "the training method")
    temperature: float = numerics(4.0, "of both softmaxes")
    weight: float = numerics(1.0, "of the distillation term (lambda)")
    code = ("pskd.methods.cskd", "CSKD")

    def check(self) -> None:
        """Ranges."""
        require(
            self.temperature > 0, "method.temperature", self.temperature, "use a positive value."
        )
        require(self.weight >= 0, "method.weight", self.weight, "use 0 or more.")


_REDUCTION = "mean: over batch and classes, as published; batchmean: K times as much"


@dataclass(frozen=True)
class TFKDSelfSection(MethodSection):
    """TF-KD self: a teacher of the same architecture, trained before."""

    name: str = numerics("tfkd_self", "the training method")
    teacher: str = numerics("", "weights of the teacher: an export or run of ours, or a state dict")
    alpha: float = numerics(0.95, "weight of the teacher, 0 to 1")
    temperature: float = numerics(6.0, "of both softmaxes")
    multiplier: float = numerics(50.0, "of the distillation term")
    kl_reduction: Literal["mean", "batchmean"] = numerics("mean", _REDUCTION)
    code = ("pskd.methods.tfkd", "TFKDSelf")

    def check(self) -> None:
        """Ranges, and that there is a teacher."""
        require(
            self.teacher != "", "method.teacher", "not set", "name the weights of a trained model."
        )
        _check_tfkd(self)


@dataclass(frozen=True)
class TFKDRegSection(MethodSection):
    """TF-KD reg: a teacher made by hand, 0.99 on the label."""

    name: str = numerics("tfkd_reg", "the training method")
    alpha: float = numerics(0.1, "weight of the teacher, 0 to 1")
    temperature: float = numerics(20.0, "of the teacher's softmax")
    multiplier: float = numerics(100.0, "of the distillation term")
    kl_reduction: Literal["mean", "batchmean"] = numerics("mean", _REDUCTION)
    code = ("pskd.methods.tfkd", "TFKDReg")

    def check(self) -> None:
        """Ranges."""
        _check_tfkd(self)


def _check_tfkd(section: TFKDSelfSection | TFKDRegSection) -> None:
    alpha, temperature = section.alpha, section.temperature
    require(0 <= alpha <= 1, "method.alpha", alpha, "use a value in [0, 1].")
    require(temperature > 0, "method.temperature", temperature, "use a positive value.")
    require(section.multiplier >= 0, "method.multiplier", section.multiplier, "use 0 or more.")


@dataclass(frozen=True)
class PSKDSection(MethodSection):
    """PS-KD: targets softened with the model's own prediction of the previous epoch."""

    name: str = numerics("pskd", "the training method")
    alpha_T: float = numerics(0.8, "weight of the past prediction in the last epoch, 0 to 1")
    schedule: Literal["linear", "constant", "cosine"] = numerics(
        "linear", "of alpha over epochs: linear is as published"
    )
    teacher: Literal["table", "model"] = numerics(
        "table", "past predictions from the store, or by last epoch's model on this epoch's image"
    )
    averaging: float = numerics(
        0.0, "table: share of the older row that a new one keeps (temporal ensembling)"
    )

    @property
    def code(self) -> tuple[str, str]:
        """One class for each kind of teacher."""
        return "pskd.methods.pskd", "PSKD" if self.teacher == "table" else "PSKDByModel"

    @property
    def keeps_predictions(self) -> bool:
        """Those are the table."""
        return self.teacher == "table"

    def check(self) -> None:
        """Convex weights."""
        require(0 <= self.alpha_T <= 1, "method.alpha_T", self.alpha_T, "use a value in [0, 1].")
        require(
            0 <= self.averaging < 1, "method.averaging", self.averaging, "use a value in [0, 1)."
        )


# name -> section; a method of one's own can be added from outside.
METHODS: dict[str, type[MethodSection]] = {
    "baseline": BaselineSection,
    "label_smoothing": LabelSmoothingSection,
    "cskd": CSKDSection,
    "tfkd_self": TFKDSelfSection,
    "tfkd_reg": TFKDRegSection,
    "pskd": PSKDSection,
}
