"""The method of a configuration section."""

from importlib import import_module

from pskd.methods.interface import Method, Network
from pskd.methods.sections import MethodSection


def kind(section: MethodSection) -> type[Method]:
    """The class of the section's method, which says what it needs."""
    module, name = section.code
    method: type[Method] = getattr(import_module(module), name)
    return method


def create(section: MethodSection, network: Network) -> Method:
    """Build the method that the section describes.

    Raises:
        PskdError: a teacher cannot be read.
    """
    return kind(section)(section, network)
