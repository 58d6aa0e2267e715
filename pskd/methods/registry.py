"""The method of a configuration section."""

from pskd.methods.baseline import Baseline
from pskd.methods.interface import Method
from pskd.methods.pskd import PSKD
from pskd.methods.sections import BaselineSection, MethodSection, PSKDSection


def create(section: MethodSection) -> Method:
    """Build the method that the section describes."""
    match section:
        case BaselineSection():
            return Baseline(section)
        case PSKDSection():
            return PSKD(section)
