"""pskd.data.index: every image once, in bytewise order, of the right size and label; no bad one."""

import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pskd.data.folder import as_bytes, as_text
from pskd.data.index import build, load_or_build, open_index, out_of_date
from pskd.data.index_check import verify
from pskd.data.labels import PathList
from tests.indices import image, relatives, rewritten_later, same, saved
from tests.photos import BAD_BODIES, BAD_HEADERS
from tests.refusals import refusal

pytestmark = pytest.mark.usefixtures("cache")


# --- what is a sample ------------------------------------------------------------------------


def test_samples_of_class_folders(tmp_path):
    wanted = ["a-b/y.jpg", "a/b/c/x.TIFF", "a/x.JPEG", "a/z.pPm", "b/link.webp", "b/q.jpg/p.ppm"]
    others = ["a/.hidden.jpg", "a/.folder/x.jpg", ".git/x.jpg", "a/notes.txt", "a/jpg", "by.jpg"]
    for name in (*wanted, *others):
        image(tmp_path / name)
    (tmp_path / "b/link.webp").unlink()
    (tmp_path / "b/link.webp").symlink_to(tmp_path / "a/x.JPEG")
    elsewhere = image(tmp_path.parent / f"{tmp_path.name}-elsewhere" / "w.bmp").parent
    (tmp_path / "c").symlink_to(elsewhere)
    index = build(tmp_path)
    assert relatives(index) == [os.fsencode(name) for name in [*wanted, "c/w.bmp"]]
    assert index.class_names == ("a", "a-b", "b", "c")
    assert index.labels_N.tolist() == [1, 0, 0, 0, 2, 2, 3]
    assert len(index) == 7
    assert index.path(2) == str(tmp_path / "a/x.JPEG")


@settings(deadline=None, max_examples=30)  # a process is started for each example
@given(
    names=st.lists(
        st.binary(min_size=1, max_size=40).filter(lambda b: not {0, 47} & {*b} and b[0] != 46),
        min_size=1,
        max_size=6,
        unique=True,
    )
)
def test_any_name_is_kept_and_order_is_bytewise(names):
    with tempfile.TemporaryDirectory() as directory:
        content = image(Path(directory) / "image").read_bytes()
        for name in map(os.fsdecode, names):
            Path(directory, name).mkdir()
            Path(directory, name, f"{name}.png").write_bytes(content)
        index = saved(Path(directory))
        assert relatives(index) == sorted(name + b"/" + name + b".png" for name in names)
        assert index.class_names == tuple(map(as_text, sorted(names)))
        assert out_of_date(index) is None
        for k, label in enumerate(index.labels_N.tolist()):
            name = as_bytes(index.class_names[label])
            assert index.relative(k) == name + b"/" + name + b".png"
            assert Path(index.path(k)).read_bytes() == content


def test_sizes_are_those_of_the_pixels_as_stored(nasty):
    root, files = nasty
    index = build(root, drop_bad=True)
    rows = {os.fsencode(Path("class", path.name)): what for what, path in files.items()}
    found = {rows[index.relative(k)]: k for k in range(len(index))}
    assert set(files) - set(found) == set(BAD_HEADERS)
    for what, k in found.items():
        with Image.open(files[what]) as picture:
            assert (index.widths_N[k], index.heights_N[k]) == picture.size, what
        assert index.bytes_N[k] == files[what].stat().st_size
    turned, plain = found["exif rotated"], found["progressive"]
    assert index.widths_N[turned] == index.widths_N[plain] != index.heights_N[turned]
    assert (index.widths_N[found["huge"]], index.heights_N[found["huge"]]) == (6000, 5000)
    assert dict(index.dropped) == {
        "class/empty.JPEG": "empty",
        "class/garbage.JPEG": "no readable image header",
    }


def test_a_decompression_bomb_is_an_image(tmp_path):
    """More pixels than PIL refuses by default; only its header is there."""
    huge = b"P6 60000 50000 255\n"
    image(tmp_path / "a/x.ppm").write_bytes(huge)
    index = build(tmp_path)
    assert (index.widths_N[0], index.heights_N[0]) == (60000, 50000)


def test_the_number_of_processes_changes_nothing(tmp_path):
    for k in range(250):
        image(tmp_path / f"c{k % 3}/{k}.png", size=(k + 1, 1))
    (tmp_path / "c2/200.png").write_bytes(b"")
    seen = []
    one = build(tmp_path, drop_bad=True, workers=1)
    three = build(tmp_path, drop_bad=True, workers=3, progress=lambda *at: seen.append(at))
    assert same(one, three)
    assert seen == [(100, 250), (200, 250), (250, 250)]
    assert dict(zip(relatives(one), one.widths_N.tolist(), strict=True)) == {
        b"c%d/%d.png" % (k % 3, k): k + 1 for k in range(250) if k != 200
    }


def test_the_fingerprint_tells_folders_apart(folder):
    before = build(folder).fingerprint
    assert build(folder).fingerprint == before
    moved = folder.rename(folder.with_name("moved"))
    assert build(moved).fingerprint == before
    seen = {before}
    (moved / "class000").rename(moved / "other")
    seen.add(build(moved).fingerprint)
    (moved / "other/image00000.JPEG").rename(moved / "other/z.jpg")
    seen.add(build(moved).fingerprint)
    (moved / "other/z.jpg").rename(moved / "class001/z.jpg")
    seen.add(build(moved).fingerprint)
    with (moved / "class001/z.jpg").open("ab") as file:
        file.write(b"\0")
    seen.add(build(moved).fingerprint)
    image(moved / "class001/z.jpg", (7, 7))
    seen.add(build(moved).fingerprint)
    assert len(seen) == 6


# --- what is refused -------------------------------------------------------------------------


def test_a_folder_without_classes_is_refused(tmp_path):
    image(tmp_path / "flat/x.jpg")
    text = refusal(build, tmp_path / "flat")
    assert f"{tmp_path}/flat has no class folders" in text
    assert "--ground-truth" in text
    assert "No such file" in refusal(build, tmp_path / "none")
    assert "Not a directory" in refusal(build, tmp_path / "flat/x.jpg")


def test_classes_without_an_image_are_named(folder):
    (folder / "n1/deep").mkdir(parents=True)
    (folder / "n2").mkdir()
    (folder / "n2/x.txt").touch()
    assert "2 class folders without a usable image: n1, n2." in refusal(build, folder)


def test_a_class_that_loses_all_images_is_refused(folder):
    shutil.rmtree(folder / "class001")
    (folder / "class001").mkdir()
    (folder / "class001/x.jpg").touch()
    text = refusal(build, folder, drop_bad=True)
    assert "1 class folder without a usable image: class001." in text


def test_all_bad_files_are_refused_at_once(tmp_path):
    good = image(tmp_path / "c/good.png")
    (tmp_path / "c/empty.jpg").touch()
    (tmp_path / "c/garbage.jpg").write_bytes(b"\xff\xd8\xff" + bytes(99))
    (tmp_path / "c/postscript.jpg").write_bytes(b"%!PS-Adobe-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "c/dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "c/self.jpg").symlink_to(tmp_path / "c/self.jpg")
    os.mkfifo(tmp_path / "c/pipe.jpg")
    (tmp_path / "c/odd\n.jpg").touch()
    (tmp_path / "c/flat.ppm").write_bytes(b"P6 3 0 255\n")
    text = refusal(build, tmp_path)
    assert text.splitlines() == [
        f"8 of 9 files in {tmp_path} cannot be used:",
        "  c/dangling.jpg: dangling link",
        "  c/empty.jpg: empty",
        *[line for line in text.splitlines() if line.startswith("  c/flat.ppm: ")],
        "  c/garbage.jpg: no readable image header",
        "  'c/odd\\n.jpg': empty",
        "  c/pipe.jpg: not a regular file",
        "  c/postscript.jpg: no readable image header",
        "  c/self.jpg: Too many levels of symbolic links",
        f"Mend or remove them, or leave them out: `pskd index {tmp_path} --drop-bad`.",
    ]
    index = saved(tmp_path, drop_bad=True)
    assert relatives(index) == [b"c/good.png"]
    assert index.path(0) == str(good)
    assert len(index.dropped) == 8
    assert ("c/odd\n.jpg", "empty") in index.dropped


def test_only_the_first_twenty_bad_files_are_listed(folder):
    for k in range(25):
        (folder / "class000" / f"bad{k:02}.jpg").touch()
    lines = refusal(build, folder).splitlines()
    assert lines[0].startswith("25 of 37 files")
    assert lines[20:22] == ["  class000/bad19.jpg: empty", "  and 5 more"]


def test_a_folder_in_which_no_file_is_of_use_is_refused(tmp_path):
    (tmp_path / "list").write_text("x.jpg 0\n")
    (tmp_path / "x.jpg").touch()
    labels = PathList(tmp_path / "list")
    assert "has no image that can be used" in refusal(build, tmp_path, labels=labels, drop_bad=True)


def test_a_link_to_a_folder_above_is_refused(folder):
    (folder / "class001/up").symlink_to(folder / "class001")
    assert f"{folder}/class001/up is a link to a folder above it" in refusal(build, folder)


def test_a_crash_of_the_process_that_reads_is_told(folder, monkeypatch, tmp_path):
    program = tmp_path / "crash.py"
    program.write_text("import sys, os; sys.stdin.buffer.read(9); os._exit(77)")
    monkeypatch.setattr("pskd.data.headers._PROGRAM", program)
    text = refusal(build, folder)
    assert "exit code 77 at one of 12 files from" in text
    assert "image00000.JPEG" in text


BUILD_SLOWLY = """
import signal, sys, time
from pathlib import Path
from pskd.data.headers import read_headers
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
def progress(done, total):
    print("reads", flush=True)
    while True:  # a signal just before a long sleep would wait for its end
        time.sleep(0.05)
read_headers([sys.argv[1].encode()] * 100_000, workers=2, progress=progress)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_the_one_that_indexes(folder, how):
    command = [sys.executable, "-c", BUILD_SLOWLY, folder / "class000/image00000.JPEG"]
    parent = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert parent.stdout.readline() == b"reads\n"
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    if how == signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does
    else:
        parent.send_signal(how)
    errors = parent.communicate(timeout=20)[1]
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    assert errors.count(b"Traceback") == (how == signal.SIGINT)  # the parent's own


# --- verify ----------------------------------------------------------------------------------


def test_verify_finds_what_the_folders_do_not_show(folder):
    index = load_or_build(folder)
    assert verify(index) == []
    files = [Path(index.path(k)) for k in range(len(index))]
    whole = files[0].read_bytes()
    rewritten_later(files[1], whole[:-100])
    rewritten_later(files[2], b"")
    rewritten_later(files[3], files[3].read_bytes() + b"\0")
    turned = io.BytesIO()
    Image.open(files[5]).transpose(Image.Transpose.ROTATE_90).save(turned, "JPEG")
    rewritten_later(files[5], turned.getvalue()[: index.bytes_N[5]].ljust(index.bytes_N[5], b"\0"))
    assert out_of_date(index) is None
    found = dict(verify(index, workers=2))
    assert set(found) == {as_text(index.relative(k)) for k in (1, 2, 3, 5)}
    assert "truncated" in found["class000/image00001.JPEG"]
    assert found["class000/image00002.JPEG"] == "empty"
    size = int(index.bytes_N[3])
    assert found["class000/image00003.JPEG"] == f"{size + 1} bytes, in the index {size}"
    assert "pixels wide" in found["class001/image00001.JPEG"]
    assert out_of_date(index) is None


def test_verify_finds_a_gone_file_and_a_damaged_index(folder):
    index = load_or_build(folder)
    content = bytearray(index.file.read_bytes())
    (folder / "class000/image00000.JPEG").unlink()
    assert verify(index) == [("class000/image00000.JPEG", "no such file")]
    content[-1] ^= 1
    index.file.unlink()
    index.file.write_bytes(content)
    assert "is damaged (fingerprint differs)" in refusal(verify, open_index(index.file, folder))


def test_build_can_leave_out_what_does_not_decode(nasty):
    root, files = nasty
    index = build(root, drop_bad=True, decode=True)
    left_out = {f"class/{files[what].name}" for what in (*BAD_HEADERS, *BAD_BODIES)}
    assert {path for path, _ in index.dropped} == left_out
    assert verify(index) == []
