"""The file of an index: its layout, damage, when it is out of date, and where it lies."""

import json
import logging
import os
import shutil
import subprocess
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pskd.cli import main
from pskd.data.folder import as_text, entries
from pskd.data.index import (
    NAME,
    build,
    find,
    load_or_build,
    open_index,
    out_of_date,
    places,
    save,
    write,
)
from tests.indices import image, relatives, same, saved, synthetic
from tests.photos import ODD_NAMES
from tests.refusals import refusal

pytestmark = pytest.mark.usefixtures("cache")


# --- the file --------------------------------------------------------------------------------


@settings(deadline=None)  # a write waits for the disk
@given(
    paths=st.lists(st.binary(min_size=1, max_size=70), min_size=1, max_size=20),
    class_names=st.lists(st.binary(max_size=9).map(as_text), max_size=5),
)
def test_a_file_gives_back_what_was_written(paths, class_names):
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "index")
        index = synthetic(Path("/photos"), paths, class_names=tuple(class_names))
        write(index, file)
        found = open_index(file, Path("/photos"))
        assert same(index, found)
        assert relatives(found) == paths
        ids_B = np.array([len(paths) - 1, 0, 0])
        wanted = [b"/photos/" + paths[k] for k in ids_B]
        assert [row.tobytes() for row in found.path_bytes(ids_B)] == wanted
        assert [os.fsencode(found.path(k)) for k in ids_B] == wanted
        assert found.path_bytes(ids_B[:0]) == []


def test_paths_of_a_relative_root_are_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    for index in (build(Path("folder")), load_or_build(Path("folder"))):
        assert index.path(0) == f"{folder}/class000/image00000.JPEG"
        assert index.path_bytes(np.array([0]))[0].tobytes() == os.fsencode(index.path(0))


def test_arrays_of_an_open_index_are_aligned_and_cannot_be_written(folder):
    index = load_or_build(folder)
    for name in ("labels_N", "widths_N", "heights_N", "bytes_N", "paths", "offsets_N"):
        array = getattr(index, name)
        assert array.ctypes.data % 64 == 0, name
        assert not array.flags.writeable
        assert type(array) is np.ndarray
    paths = index.path_bytes(np.arange(3))
    assert all(path.flags.c_contiguous and path.dtype == np.uint8 for path in paths)


def test_the_layout_of_the_file_is_as_specified(folder):
    """Read by hand, from the specification."""
    content = load_or_build(folder).file.read_bytes()
    assert content[:8] == b"PSKDIDX\x01"
    length = int.from_bytes(content[8:12], "little")
    facts = json.loads(content[16 : 16 + length].decode("ascii"))
    start = -(-(16 + length) // 64) * 64
    arrays = {
        name: np.frombuffer(content, kind, count, start + offset)
        for name, kind, offset, count in facts["arrays"]
    }
    assert {name: array.dtype.str for name, array in arrays.items()} == {
        "paths": "|u1",
        "offsets": "<i8",
        "labels": "<i4",
        "widths": "<i4",
        "heights": "<i4",
        "bytes": "<i8",
    }
    assert arrays["labels"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert arrays["paths"].tobytes()[: arrays["offsets"][1]] == b"class000/image00000.JPEG"
    assert facts["class_names"] == ["class000", "class001", "class002"]
    assert [row[:2] for row in facts["snapshot"]["directories"]] == [
        [f"class00{k}", 4] for k in range(3)
    ]
    assert start + facts["arrays"][-1][2] + 12 * 8 == len(content)


def damaged(content, damage):
    length = int.from_bytes(content[8:12], "little")
    match damage:
        case "version":
            return content[:7] + b"\x02" + content[8:]
        case "json":
            at = 16 + length // 2
            return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        case "length":
            return content[:8] + b"\xff\xff\xff\xff" + content[12:]
        case "crc":
            return content[:12] + bytes([content[12] ^ 1]) + content[13:]
        case "longer":
            return content + b"\0"
        case cut:
            return content[: round(cut * len(content)) if isinstance(cut, float) else cut]


DAMAGES = [
    ("version", "format version 2, this program reads version 1"),
    ("json", "damaged header (crc differs)"),
    ("length", "damaged header (crc differs)"),
    ("crc", "damaged header (crc differs)"),
    ("longer", "damaged: "),
    (0, "damaged: only 0 bytes"),
    (15, "damaged: only 15 bytes"),
    (0.3, "damaged"),
    (0.7, "damaged"),
    (-1, "damaged: "),
]


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("damage", "says"), DAMAGES)
def test_a_damaged_index_is_refused_and_built_again(folder, caplog, damage, says, explicit):
    place = folder.parent / "elsewhere" if explicit else None
    file, whole = load_or_build(folder, place).file, build(folder)
    content = file.read_bytes()
    file.write_bytes(damaged(content, damage))
    text = refusal(open_index, file, folder)
    assert text.startswith(f"{file}: ")
    assert says in text
    assert f"`pskd index {folder}`" in text
    with caplog.at_level(logging.INFO, "pskd"):
        assert same(load_or_build(folder, place), whole)
    (line,) = caplog.messages
    assert line == f"looking at the images of {folder}: {text.partition('. Run')[0]}"
    assert file.read_bytes() == content


@settings(deadline=None)
@given(cut=st.integers(0, 5000))
def test_an_index_cut_anywhere_is_refused_before_it_is_mapped(cut):
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "index")
        write(synthetic(Path("/r"), [b"%d" % k for k in range(100)]), file)
        content = file.read_bytes()
        assert len(content) < 5000
        file.write_bytes(content[: min(cut, len(content) - 1)])
        assert "damaged" in refusal(open_index, file, Path("/r"))


def test_a_file_that_is_no_index_is_not_overwritten(folder, tmp_path):
    other = tmp_path / "thesis.txt"
    other.write_text("years of work")
    for function in (save, write):
        text = refusal(function, build(folder), other)
        assert text == f"{other} is not an index, so it is not overwritten. Name another file."
    assert "not an index" in refusal(open_index, other, folder)
    assert "not overwritten" in refusal(load_or_build, folder, other)
    assert main(["index", str(folder), "--index-path", str(other)]) == 1
    assert other.read_text() == "years of work"


def test_opening_a_large_index_holds_no_memory_for_each_entry(tmp_path):
    n = 1_281_167
    width = len(b"n01234567/n01234567_01234567.JPEG")
    digits_ND = (np.arange(n)[:, None] // 10 ** np.arange(width)[::-1].clip(0, 8) % 10) + 48
    index = replace(
        synthetic(Path("/data/train"), [b"x"]),
        labels_N=np.zeros(n, "<i4"),
        widths_N=np.full(n, 500, "<i4"),
        heights_N=np.full(n, 375, "<i4"),
        bytes_N=np.full(n, 110_000, "<i8"),
        paths=digits_ND.astype(np.uint8).ravel(),
        offsets_N=(np.arange(n + 1) * width).astype("<i8"),
    )
    del digits_ND
    write(index, tmp_path / "index")
    expected = index.path(n - 1)
    del index
    tracemalloc.start()
    found = open_index(tmp_path / "index", Path("/data/train"))
    ids_B = np.random.default_rng(0).integers(0, n, 256)
    assert len(found.path_bytes(ids_B)) == 256
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e6
    assert found.path(n - 1) == expected


def test_dali_reads_what_an_index_names(nasty):
    """Odd names included."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def

    root, files = nasty
    index = saved(root, drop_bad=True)
    rows = [k for k in range(len(index)) if index.path(k) in {str(files[w]) for w in ODD_NAMES}]
    assert len(rows) == len(ODD_NAMES)

    @pipeline_def(batch_size=len(rows), num_threads=1, device_id=None)
    def reader():
        paths = fn.external_source(lambda: index.path_bytes(np.array(rows)), batch=True)
        return fn.io.file.read(paths, dont_use_mmap=True)

    pipeline = reader()
    pipeline.build()
    (contents,) = pipeline.run()
    for k, row in enumerate(rows):
        assert np.array(contents[k]).tobytes() == Path(index.path(row)).read_bytes()


# --- out of date -----------------------------------------------------------------------------


def remove(folder):
    (folder / "class001/image00002.JPEG").unlink()


def rename(folder):
    (folder / "class001/image00002.JPEG").rename(folder / "class001/x.jpg")


def replace_class(folder):
    shutil.rmtree(folder / "class001")
    shutil.copytree(folder / "class000", folder / "class001")


CHANGES = [
    ("added", lambda f: image(f / "class002/new.png"), "folder class002 has changed"),
    ("removed", remove, "folder class001 has changed"),
    ("renamed", rename, "folder class001 has changed"),
    ("class added", lambda f: image(f / "new/x.png"), "other class folders lie in"),
    ("class removed", lambda f: shutil.rmtree(f / "class001"), "other class folders lie in"),
    ("class renamed", lambda f: (f / "class001").rename(f / "b"), "other class folders lie in"),
    ("class replaced", replace_class, "folder class001 has changed"),
    ("deep", lambda f: image(f / "class000/deep/x.png"), "folder class000 has changed"),
]


@pytest.mark.parametrize(("change", "says"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_an_index_of_a_changed_folder_is_built_again(folder, caplog, change, says):
    time.sleep(0.02)  # longer than a tick of the clock that dates folders
    before = load_or_build(folder)
    assert out_of_date(before) is None
    change(folder)
    assert says in out_of_date(before)
    with caplog.at_level(logging.INFO, "pskd"):
        after = load_or_build(folder)
    assert [says in line for line in caplog.messages] == [True]
    assert out_of_date(after) is None
    assert same(after, build(folder))
    assert not same(after, before)


def test_a_nested_folder_that_changes_or_goes_is_noticed(folder):
    deep = image(folder / "class000/deep/x.png").parent
    time.sleep(0.02)
    index = load_or_build(folder)
    image(deep / "y.png")
    assert out_of_date(index) == "folder class000/deep has changed"
    index = load_or_build(folder)
    shutil.rmtree(deep)
    os.utime(folder / "class000", ns=(0, index.snapshot.directories[0][2]))
    assert out_of_date(index) == "folder class000/deep: No such file or directory"
    deep.touch()
    os.utime(folder / "class000", ns=(0, index.snapshot.directories[0][2]))
    assert out_of_date(index) == "folder class000/deep has changed"


def test_a_current_index_is_neither_built_nor_written(folder, monkeypatch, caplog):
    first = load_or_build(folder)
    monkeypatch.setattr("pskd.data.index.build", lambda *a, **o: pytest.fail("built"))
    (folder / "README.txt").touch()  # beside the classes: no sample
    status = first.file.stat()
    with caplog.at_level(logging.INFO, "pskd"):
        again = load_or_build(folder)
    assert caplog.messages == []
    assert same(first, again)
    assert first.file.stat().st_mtime_ns == status.st_mtime_ns
    moved = folder.rename(folder.with_name("moved"))
    assert load_or_build(moved).path(0) == f"{moved}/class000/image00000.JPEG"


def test_a_file_added_while_the_folder_is_indexed_is_noticed_later(folder):
    time.sleep(0.02)
    index = build(folder, progress=lambda *at: image(folder / "class001/late.png"))
    assert out_of_date(index) == "folder class001 has changed"


def test_a_file_added_while_its_folder_is_listed_is_noticed_later(folder, monkeypatch):
    time.sleep(0.02)

    def slow_entries(directory):
        yield from list(entries(directory))
        if directory.endswith(b"class001"):
            image(folder / "class001/late.png")

    with monkeypatch.context() as patch:
        patch.setattr("pskd.data.folder.entries", slow_entries)
        index = build(folder)
    assert len(index) == 12
    assert out_of_date(index) == "folder class001 has changed"


# --- where it lies ---------------------------------------------------------------------------


def test_the_index_lies_beside_the_classes(folder, cache):
    assert load_or_build(folder).file == folder / NAME
    assert not cache.exists()
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == [NAME]


@pytest.fixture
def read_only_folder(read_only_directory, folder):
    subprocess.run(["mount", "-o", "remount,rw", read_only_directory], check=True)
    shutil.copytree(folder, read_only_directory, dirs_exist_ok=True)
    subprocess.run(["mount", "-o", "remount,ro", read_only_directory], check=True)
    return read_only_directory


def test_the_index_of_a_read_only_folder_lies_in_the_cache(read_only_folder, cache, monkeypatch):
    index = load_or_build(read_only_folder)
    assert index.file.parent == cache
    assert out_of_date(index) is None
    assert index.file == places(read_only_folder)[1] != places(cache)[1]
    with monkeypatch.context() as patch:
        patch.setattr("pskd.data.index.build", lambda *a, **o: pytest.fail("built"))
        assert same(load_or_build(read_only_folder), index)
        link = read_only_folder.with_name("link")
        link.symlink_to(read_only_folder)
        assert load_or_build(link).path(0) == f"{link}/class000/image00000.JPEG"


def test_without_a_place_to_write_the_remedy_is_named(read_only_folder, cache):
    cache.parent.write_text("a file in the way")
    text = refusal(load_or_build, read_only_folder)
    assert f"{read_only_folder / NAME}: Read-only file system; {cache}" in text
    assert "--index-path FILE" in text


def test_without_xdg_the_cache_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places(tmp_path)[1].parent == tmp_path / ".cache/pskd"


def test_the_index_lies_where_it_is_told_to(folder, tmp_path, cache):
    place = tmp_path / "new" / "x.index"
    assert load_or_build(folder, place).file == place
    assert find(folder, place)[1] is None
    assert find(folder) == (None, "it has no index yet")
    assert not (folder / NAME).exists()


def test_a_current_index_in_the_cache_goes_before_a_stale_one_beside(folder):
    time.sleep(0.02)
    load_or_build(folder)
    image(folder / "class000/new.png")
    cached = places(folder)[1]
    write(build(folder), cached)
    index, reason = find(folder)
    assert (index.file, reason) == (cached, None)
