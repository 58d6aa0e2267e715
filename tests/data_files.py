"""Data sets read with all options off, files to damage, and a website that is not there."""

from pskd.data.catalog import load

NOWHERE = "http://127.0.0.1:9/"  # the discard port: refused at once, with or without a network


def read(name, root=None, *, download=False, held_out=0, limit=0, pad_to=0):
    """`catalog.load` with everything off."""
    root = None if root is None else str(root)
    return load(name, root=root, download=download, held_out=held_out, limit=limit, pad_to=pad_to)


def flip(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
