"""What `pskd index` does with a folder, and what it says about it."""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pskd.data import index as indexes
from pskd.data.folder import as_text, enumerated, other_files, shown
from pskd.data.headers import bar
from pskd.data.index import Index, Labels
from pskd.data.index_check import check_same_classes, verify
from pskd.data.labels import GroundTruth, PathList
from pskd.data.splits import splits_in
from pskd.errors import PskdError
from pskd.words import counted


def reports(arguments: argparse.Namespace) -> Iterator[str]:
    """Index a folder of classes, or the splits in it (see `splits`); yields a report of each.

    Raises:
        PskdError: options that exclude each other, a folder that cannot be indexed, or a file that
            is not what the index says.
    """
    logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stderr)
    directory: Path = arguments.directory.absolute()
    labels = _labels(arguments)
    splits, others = splits_in(directory)
    if not splits:
        yield _report(_index(directory, labels, arguments), arguments.verify)
        return
    for option, value in (("--list", arguments.list), ("--index-path", arguments.index_path)):
        if value is not None:
            names = " or ".join(str(directory / name) for name in splits)
            raise PskdError(f"{option} is for one folder: use it with {names}.")
    if others:
        logging.getLogger("pskd").warning(
            "%s: only %s are read; left out: %s",
            shown(str(directory)),
            " and ".join(splits),
            enumerated(others),
        )
    indices = []
    for name in splits:
        given = labels if name == "val" else None
        indices.append(_index(directory / name, given, arguments))
        yield _report(indices[-1], arguments.verify)
    if len(indices) > 1:
        check_same_classes(*indices)


def _labels(arguments: argparse.Namespace) -> Labels | None:
    if arguments.list is not None:
        if arguments.ground_truth is not None:
            raise PskdError("--list and --ground-truth exclude each other.")
        return PathList(arguments.list, arguments.classes)
    if arguments.ground_truth is not None:
        if arguments.classes is None:
            raise PskdError("--ground-truth needs --classes: meta.mat, or a file of class names.")
        return GroundTruth(arguments.ground_truth, arguments.classes)
    if arguments.classes is not None:
        raise PskdError("--classes goes with --ground-truth or --list.")
    return None


def _index(root: Path, labels: Labels | None, arguments: argparse.Namespace) -> Index:
    """A new index, written. To verify and nothing else, the one there is; all files agree then."""
    place, workers = arguments.index_path, arguments.workers
    if arguments.verify and not arguments.drop_bad and labels is None:
        with bar(f"index {root.name}") as progress:
            index = indexes.load_or_build(root, place, workers=workers, progress=progress)
    else:
        with bar(f"index {root.name}") as progress:
            built = indexes.build(
                root,
                labels=labels,
                drop_bad=arguments.drop_bad,
                decode=arguments.verify and arguments.drop_bad,
                workers=workers,
                progress=progress,
            )
        index = indexes.open_index(indexes.save(built, place), root)
    if arguments.verify:
        _verify(index, workers)
    return index


def _verify(index: Index, workers: int | None) -> None:
    with bar(f"verify {index.root.name}") as progress:
        different = verify(index, workers=workers, progress=progress)
    if different:
        again = indexes.command(index.root, index.labels_from)
        raise PskdError(
            f"{len(different)} of {len(index)} files are not as {index.file} says, or do not "
            f"decode:\n{indexes.describe(different)}\nMend them and run `{again}`, or leave those "
            f"out that do not decode: `{again} --drop-bad --verify`."
        )


def _report(index: Index, verified: bool) -> str:
    pixels_N = index.widths_N.astype(np.int64) * index.heights_N
    largest = int(pixels_N.argmax())
    size = f"{index.widths_N[largest]}x{index.heights_N[largest]}"
    lines = [
        f"{shown(str(index.root))}: {counted(len(index), 'image')} of "
        f"{counted(len(index.class_names), 'class')}",
        f"  size         {index.bytes_N.sum() / 1e6:.1f} MB, {pixels_N.sum() / 1e6:.1f} megapixels",
        f"  largest      {size}, {shown(as_text(index.relative(largest)))}",
        f"  fingerprint  {index.fingerprint}",
        f"  index        {index.file}",
    ]
    if others := other_files(index.root, index.snapshot):
        kinds = ", ".join(f"{shown(kind)} {count}" for kind, count in others.items())
        lines.append(f"  no images    by their names, not read: {kinds}")
    if index.dropped:
        lines += [f"  left out     {len(index.dropped)}", indexes.describe(index.dropped)]
    if verified:
        lines.append("  verified     every file decodes and is as the index says")
    return "\n".join(lines)
