"""The configuration section of the store. Imports no torch, so that `--help` is fast."""

from dataclasses import dataclass
from typing import Literal

from pskd.fields import numerics, require, speed
from pskd.store.registry import check_encoding


@dataclass(frozen=True)
class StoreSection:
    """How rows are kept and read, for the methods that need them."""

    encoding: str = numerics(
        "float16", "how a row is kept on disk: float16, float32, uint8-log or top<k>"
    )
    read: Literal["mmap", "pread"] = speed(
        "mmap", "read rows through a mapping, or with one system call each"
    )
    readahead_bytes: int = speed(
        0, "read so much of a generation from front to back as its epoch begins; 0: nothing"
    )

    def check(self) -> None:
        """The encoding exists."""
        check_encoding(self.encoding)
        require(
            self.readahead_bytes >= 0,
            "store.readahead_bytes",
            self.readahead_bytes,
            "use 0 or more.",
        )
