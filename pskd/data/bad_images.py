"""Images that cannot be used: which they are, why, and what helps.

Letters: R rows of a batch.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pskd.data.graph import ImageOptions, Rows, make_pipeline
from pskd.data.imagefolder import EncodedSplit
from pskd.data.index import command


class Probe:
    """Finds out which rows fail by themselves, in a pipeline of one row.

    One that has failed is not used again: DALI does not say what it would do.
    """

    def __init__(
        self, options: ImageOptions, *, device_id: int | None, largest: tuple[int, ...], whole: bool
    ) -> None:
        """See `make_pipeline`."""
        self._options, self._device_id = replace(options, threads=1), device_id
        self._largest, self._whole = largest, whole
        self._pipeline: Any = None
        self._row: Rows | None = None

    def failing(self, rows: Rows, places: list[int]) -> tuple[int, ...]:
        """Those of these places whose row cannot be read or decoded."""
        return tuple(row for row in places if self._fails(rows.part(slice(row, row + 1))))

    def _fails(self, row: Rows) -> bool:
        if self._pipeline is None:
            self._pipeline = make_pipeline(
                self._next,
                self._options,
                1,
                device_id=self._device_id,
                largest=self._largest,
                whole=self._whole,
                ahead=1,  # a row is decoded when it is asked for
            )
            self._pipeline.build()
        self._row = row
        try:
            self._pipeline.run()
        except RuntimeError:
            self._pipeline = None
            return True
        return False

    def _next(self) -> tuple[Any, ...]:
        assert self._row is not None, "nothing is decoded before it is asked for"
        return self._row.feed(self._whole)


def unreadable(path: str) -> str | None:
    """Why a file cannot be opened, or None: it is gone, and so may the others be."""
    try:
        with Path(path).open("rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def remedies(split: EncodedSplit, sample: int) -> str:
    """What helps against an image that does not decode, so that the run can go on."""
    index = f"`{command(split.index.root, split.index.labels_from)}`"
    size = _other_size(split, sample)
    if size is not None:
        return f"It is {size}: renew the index with {index} and start again, the run goes on."
    return (
        f"Mend the file and start again, the run goes on (if its width or height changes, renew "
        f"the index with {index} first)."
    )


def left_out(split: EncodedSplit) -> str:
    """The remedy that makes another data set."""
    index = command(split.index.root, split.index.labels_from)
    return f"Leaving it out (`{index} --drop-bad --verify`) makes another data set: a new run."


def _other_size(split: EncodedSplit, sample: int) -> str | None:
    """How the size of an image differs from its index, if it does."""
    row = int(split.rows_N[sample])
    then = (int(split.index.widths_N[row]), int(split.index.heights_N[row]))
    try:
        with Image.open(split.path(sample)) as image:
            now = image.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None  # the header does not say
    if now == then:
        return None
    return f"{now[0]}x{now[1]} pixels, in its index {then[0]}x{then[1]}"
