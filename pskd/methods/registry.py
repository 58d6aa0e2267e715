"""The method of a configuration section."""

from pskd.methods.baseline import Baseline
from pskd.methods.cskd import CSKD
from pskd.methods.interface import Method, Network, Stateless
from pskd.methods.label_smoothing import LabelSmoothing
from pskd.methods.pskd import PSKD, PSKDByModel
from pskd.methods.sections import (
    BaselineSection,
    CSKDSection,
    LabelSmoothingSection,
    MethodSection,
    PSKDSection,
    TFKDRegSection,
    TFKDSelfSection,
)
from pskd.methods.tfkd import TFKDReg, TFKDSelf

_KINDS: dict[type[MethodSection], type[Stateless]] = {
    BaselineSection: Baseline,
    LabelSmoothingSection: LabelSmoothing,
    CSKDSection: CSKD,
    TFKDSelfSection: TFKDSelf,
    TFKDRegSection: TFKDReg,
    PSKDSection: PSKD,
}


def kind(section: MethodSection) -> type[Stateless]:
    """The class of the section's method, which says what it needs."""
    if isinstance(section, PSKDSection) and section.teacher == "model":
        return PSKDByModel
    return _KINDS[type(section)]


def create(section: MethodSection, network: Network) -> Method:
    """Build the method that the section describes.

    Raises:
        PskdError: a teacher cannot be read.
    """
    match section:
        case BaselineSection():
            return Baseline(section)
        case LabelSmoothingSection():
            return LabelSmoothing(section)
        case CSKDSection():
            return CSKD(section)
        case TFKDSelfSection():
            return TFKDSelf(section, network)
        case TFKDRegSection():
            return TFKDReg(section)
        case PSKDSection(teacher="model"):
            return PSKDByModel(section, network)
        case PSKDSection():
            return PSKD(section)
