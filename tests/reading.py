"""Options of reading images, for tests: made without a configuration, changed by a field's name."""

from dataclasses import replace

from pskd.data.graph import ImageOptions
from pskd.data.sections import DataSection


def plain_options(**fields):
    """On the CPU by two threads; `fields` are those of the section."""
    section = DataSection(flip=True, **fields)
    return ImageOptions(section, mixed=False, threads=2, channels_last=False)


def changed(options, **fields):
    """With other fields, its own or those of its section."""
    own = {name: fields.pop(name) for name in list(fields) if name in vars(options)}
    return replace(options, section=replace(options.section, **fields), **own)
