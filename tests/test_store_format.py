"""A segment's bytes: round trips, and every defect found and named.

Letters: B rows of a chunk, R bytes of an encoded row, C classes.
"""

import errno
import hashlib
import os
import resource
import struct
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd.errors import DamagedError, PskdError
from pskd.files import FormatError
from pskd.store import format as fmt
from pskd.store.format import HEADER_BYTES, Entry, Header
from pskd.store.generation import Generation
from pskd.store.registry import create_encoding
from pskd.store.segment import SegmentReader, SegmentWriter
from tests.system import mounted, needs_root, processes

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

ENCODINGS = ["float16", "float32", "top2", "uint8-log"]
HEADER = Header(
    run="run",
    identity="digits-1797",
    epoch=3,
    start=1,
    rank=0,
    world=2,
    n=1000,
    classes=5,
    encoding="float32",
    row_bytes=20,
)
headers = st.builds(
    Header,
    run=st.text(max_size=20),
    identity=st.text(max_size=200),
    encoding=st.sampled_from(ENCODINGS),
    **dict.fromkeys(
        ("epoch", "start", "rank", "world", "n", "classes", "row_bytes"), st.integers(0, 2**63)
    ),
)


def rows_of(count, row_bytes, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, row_bytes), np.uint8)


def write(path, sizes, header=HEADER, seed=0):
    """A closed segment of chunks of these sizes: ids, rows, and the entry after each chunk."""
    writer = SegmentWriter(path, header, sum(sizes), path.name)
    ids = np.random.default_rng(seed).permutation(header.n)[: sum(sizes)]
    rows = rows_of(sum(sizes), header.row_bytes, seed)
    entries = [writer.entry]
    for size in sizes:
        first = entries[-1].rows
        writer.append(ids[first : first + size], rows[first : first + size])
        entries.append(writer.entry)
    writer.close()
    return ids, rows, entries


def read(path, entry):
    """All that the entry names, verified: ids, rows."""
    reader = SegmentReader(path, entry, for_read=True)
    reader.verify()
    chunks = list(reader.ids_and_units())
    ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in chunks)])
    units = np.concatenate([np.empty(0, np.int32), *(units for _, units in chunks)])
    rows, again = np.empty((2, len(ids), reader.header.row_bytes), np.uint8)
    reader.gather(units, rows)
    reader.read(units, again)
    np.testing.assert_array_equal(rows, again)
    return ids, rows


def refusal(path, entry):
    """The message of opening or verifying a segment that must not pass."""
    with pytest.raises(PskdError) as caught:
        read(path, entry)
    return str(caught.value)


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "small") as disk:
        yield disk


@pytest.fixture
def segment(tmp_path):
    """A path, and the last entry of three chunks of 1, 3 and 2 rows."""
    path = tmp_path / "seg.psk"
    return path, write(path, [1, 3, 2])[2][-1]


class TestHeader:
    @given(headers)
    @untimed
    def test_round_trip_in_one_page(self, header):
        head = header.pack()
        assert len(head) == HEADER_BYTES
        assert fmt.parse_header(head) == header

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda h: h[:-1], "only 4095 of 4096"),
            (lambda h: b"", "only 0 of 4096"),
            (lambda h: b"X" + h[1:], "magic"),
            (lambda h: h[:7] + b"\x01" + h[8:], "version 1, this program reads version 2"),
            (lambda h: h[:8] + struct.pack("<I", 7) + h[12:], "crc"),
            (lambda h: h[:8] + b"\xff" * 4 + h[12:], "crc"),
            (lambda h: h[:12] + b"\0" * 4 + h[16:], "crc"),
            (lambda h: h.replace(b"digits", b"Digits"), "crc"),
            (lambda h: b"\0" * HEADER_BYTES, "magic"),  # preallocated, never written
        ],
    )
    def test_what_differs_is_named(self, change, message):
        with pytest.raises(FormatError, match=message):
            fmt.parse_header(change(HEADER.pack()))

    def test_zeroed_length_and_crc_are_damage(self):
        head = HEADER.pack()
        with pytest.raises(FormatError):
            fmt.parse_header(head[:8] + b"\0" * 8 + head[16:])

    def test_an_identity_that_does_not_fit_is_refused(self):
        with pytest.raises(FormatError, match="exceeds 4096"):
            replace(HEADER, identity="x" * HEADER_BYTES).pack()


class TestChunk:
    @given(st.integers(1, 50), st.integers(1, 200), st.data())
    @untimed
    def test_prefix_carries_rows_and_a_crc_of_all_that_follows_it(self, rows, row_bytes, data):
        stride = replace(HEADER, row_bytes=row_bytes).stride
        chunk = bytearray(fmt.chunk_units(rows, stride) * stride)
        chunk[fmt.PREFIX.size :] = os.urandom(len(chunk) - fmt.PREFIX.size)
        crc = fmt.seal_chunk(memoryview(chunk), rows)
        assert fmt.parse_prefix(bytes(chunk[: fmt.PREFIX.size])) == (rows, crc)
        assert crc == zlib.crc32(chunk[8:])
        chunk[data.draw(st.integers(8, len(chunk) - 1))] ^= data.draw(st.integers(1, 255))
        assert crc != zlib.crc32(chunk[8:])

    @given(st.integers(1, 10**6), st.integers(1, 5000))
    def test_units_hold_prefix_and_ids_and_no_unit_more(self, rows, row_bytes):
        stride = replace(HEADER, row_bytes=row_bytes).stride
        assert stride % 16 == 0
        assert 0 <= stride - row_bytes < 16
        spare = fmt.prefix_units(rows, stride) * stride - (16 + 8 * rows)
        assert 0 <= spare < stride

    @pytest.mark.parametrize(
        ("prefix", "message"),
        [
            (b"", "truncated"),
            (struct.pack("<4sIII", b"CHNK", 1, 1, 0)[:-1], "truncated"),
            (struct.pack("<4sIII", b"CHNk", 1, 1, 0), "no chunk"),
            (struct.pack("<4sIII", b"CHNK", 1, 0, 0), "no chunk"),  # no rows
            (struct.pack("<4sIII", b"CHNK", 1, 1, 1), "no chunk"),  # reserved, must be zero
            (b"\0" * 16, "no chunk"),  # preallocated, never written
        ],
    )
    def test_what_is_no_chunk_is_refused(self, prefix, message):
        with pytest.raises(FormatError, match=message):
            fmt.parse_prefix(prefix)


class TestRoundTrip:
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=8),
        st.integers(3, 40),
        st.sampled_from(ENCODINGS),
        st.integers(0, 99),
    )
    @settings(untimed, max_examples=60)
    def test_each_entry_names_exactly_its_prefix(self, sizes, classes, encoding, seed):
        """Any chunk sizes and row widths; rows beyond the named ones are ignored."""
        row_bytes = create_encoding(encoding).row_bytes(classes)
        header = replace(HEADER, classes=classes, encoding=encoding, row_bytes=row_bytes)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "new", "seg.psk")
            ids, rows, entries = write(path, sizes, header, seed)
            assert SegmentReader(path, entries[-1]).header == header
            assert [e.rows for e in entries] == [0, *np.cumsum(sizes).tolist()]
            for entry in entries:
                read_ids, read_rows = read(path, entry)
                np.testing.assert_array_equal(read_ids, ids[: entry.rows])
                np.testing.assert_array_equal(read_rows, rows[: entry.rows])

    def test_a_growing_segment_is_read_while_it_is_written(self, tmp_path):
        path = tmp_path / "seg.psk"
        writer = SegmentWriter(path, HEADER, 100, path.name)
        rows = rows_of(8, 20, 1)
        writer.append(np.arange(4), rows[:4])
        writer.sync()
        early = SegmentReader(path, writer.entry)
        writer.append(np.arange(4, 8), rows[4:])
        np.testing.assert_array_equal(read(path, writer.entry)[1], rows)
        writer.close()
        early.verify()
        assert path.stat().st_size == HEADER_BYTES + (2 + 4 + 2 + 4) * 32, "unused room is freed"

    def test_a_segment_may_be_closed_by_its_owner_while_another_opens_it(
        self, tmp_path, monkeypatch
    ):
        """Ranks close their segments at an epoch's end while slower ranks still open them."""
        writer = SegmentWriter(tmp_path / "seg.psk", HEADER, 100, "seg.psk")
        rows = rows_of(4, 20, 1)
        writer.append(np.arange(4), rows)
        scan = SegmentReader._scan

        def scan_then_trim(*args):
            chunks = scan(*args)
            writer.close()
            return chunks

        monkeypatch.setattr(SegmentReader, "_scan", scan_then_trim)
        np.testing.assert_array_equal(read(tmp_path / "seg.psk", writer.entry)[1], rows)

    def test_appending_nothing_leaves_the_segment_readable(self, tmp_path):
        ids, _, entries = write(tmp_path / "seg.psk", [2, 0, 2])
        np.testing.assert_array_equal(read(tmp_path / "seg.psk", entries[-1])[0], ids)

    def test_a_segment_is_never_reopened_for_writing(self, segment):
        path, entry = segment
        with pytest.raises(PskdError, match=f"{path}: File exists"):
            SegmentWriter(path, HEADER, 1, path.name)
        read(path, entry)

    @pytest.mark.parametrize("encoding", ENCODINGS)
    def test_format_version_2_is_frozen(self, tmp_path, encoding):
        """A file written today is a file written tomorrow: header, layout, crc, encodings."""
        probs = torch.tensor([[0.5, 0.3, 0.2], [0.02, 0.9, 0.08], [0.1, 0.2, 0.7]])
        codec = create_encoding(encoding)
        header = replace(HEADER, classes=3, encoding=encoding, row_bytes=codec.row_bytes(3))
        writer = SegmentWriter(tmp_path / "seg.psk", header, 3, "seg.psk")
        encoded = torch.empty(3, codec.row_bytes(3), dtype=torch.uint8)
        codec.encode(probs, encoded)
        encoded = encoded.numpy()
        writer.append(np.array([7, 999]), encoded[:2])
        writer.append(np.array([0]), encoded[2:])
        writer.close()
        content = (tmp_path / "seg.psk").read_bytes()
        golden = {
            "float16": "131db4e26c46ab3d0f3d543639fadcfe1590e3681e976fff4ec8c4736233318c",
            "float32": "8cab30997b7167db2d8a58f0a05cbdae92cb5933275eeeeb8d795f49c1282590",
            "top2": "987f905d76756c0ad4a74d79a01252fcd7113e496542157e89fba4c3e6f712d8",
            "uint8-log": "e6326ab40af3c75d06a71ceaf8fa830a7a4600d15a8eb8c531d5d643f3482144",
        }
        assert hashlib.sha256(content).hexdigest() == golden[encoding]

    def test_the_bytes_are_those_that_the_format_page_says(self, tmp_path):
        """Written here from the description alone: one chunk of one row of 5 float32."""
        _, rows, entries = write(tmp_path / "seg.psk", [1])
        content = (tmp_path / "seg.psk").read_bytes()
        id_ = int(np.random.default_rng(0).permutation(1000)[0])
        rest = struct.pack("<IIq", 1, 0, id_) + b"\0" * 8 + rows[0].tobytes() + b"\0" * 12
        crc = zlib.crc32(rest)
        assert content[:8] == b"PSKDSEG\2"
        assert content[HEADER_BYTES:] == b"CHNK" + struct.pack("<I", crc) + rest
        assert entries[-1] == Entry("seg.psk", 1, zlib.crc32(struct.pack("<I", crc)))
        assert str(asdict(HEADER)["identity"]).encode() in content[16:HEADER_BYTES]


class TestDamage:
    def test_every_flipped_bit_is_detected_and_the_file_named(self, segment):
        """Header, prefixes, ids, rows and the padding between them: all bits of all chunks."""
        path, entry = segment
        content = path.read_bytes()
        text_bytes = struct.unpack_from("<I", content, 8)[0]
        offsets = [*range(16 + text_bytes), *range(HEADER_BYTES, len(content))]
        assert len(offsets) > 450
        with path.open("r+b", buffering=0) as file:
            for offset in offsets:
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([content[offset] ^ 1 << bit]), offset)
                    assert f"{path}: " in refusal(path, entry), (offset, bit)
                os.pwrite(file.fileno(), content[offset : offset + 1], offset)
        read(path, entry)

    def test_bytes_that_nobody_names_do_not_matter(self, tmp_path):
        """The header's zeros, and chunks beyond the entry."""
        path = tmp_path / "seg.psk"
        ids, rows, entries = write(path, [1, 3, 2])
        content = bytearray(path.read_bytes())
        content[HEADER_BYTES - 50 : HEADER_BYTES] = b"x" * 50
        end = HEADER_BYTES + (2 + 5) * 32  # of the first two chunks
        content[end:] = os.urandom(len(content) - end)
        path.write_bytes(content)
        read_ids, read_rows = read(path, entries[2])
        np.testing.assert_array_equal(read_ids, ids[:4])
        np.testing.assert_array_equal(read_rows, rows[:4])

    def test_the_damaged_rows_are_named(self, segment):
        path, entry = segment
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        assert "rows 4 to 5 are damaged" in refusal(path, entry)

    def test_every_truncation_is_detected(self, segment):
        path, entry = segment
        for size in [*range(path.stat().st_size - 1, HEADER_BYTES - 2, -1), 100, 0]:
            os.truncate(path, size)
            message = refusal(path, entry)
            assert str(path) in message
            assert "truncated" in message or "header bytes" in message, (size, message)

    @pytest.mark.parametrize("left", [0, 1, HEADER.row_bytes - 1])
    def test_a_row_that_is_cut_off_while_it_is_read_is_nobodys_prediction(self, tmp_path, left):
        """The file becomes shorter after it was opened: what was in the buffer is not a row."""
        path = tmp_path / "seg.psk"
        _, rows, entries = write(path, [4])
        reader = SegmentReader(path, entries[-1], for_read=True)
        ((_, units),) = reader.ids_and_units()
        found = np.empty_like(rows)
        reader.read(units, found)
        assert (found == rows).all()
        os.truncate(path, HEADER_BYTES + int(units[2]) * reader.header.stride + left)
        reader.read(units[:2], found[:2])
        with pytest.raises(DamagedError, match=f"{path}: cut short"):
            reader.read(units, found)

    def test_a_missing_file_is_named_with_a_remedy(self, tmp_path):
        message = refusal(tmp_path / "seg.psk", Entry("seg.psk", 1, 0))
        assert f"{tmp_path / 'seg.psk'}: No such file" in message
        assert "Resume from an older checkpoint" in message

    @pytest.mark.parametrize(
        "change",
        [
            lambda e: e._replace(crc=e.crc ^ 1),
            lambda e: e._replace(rows=e.rows - 1),  # within a chunk
            lambda e: e._replace(rows=e.rows - 2),  # a chunk fewer, the crc of all
        ],
    )
    def test_an_entry_of_other_rows_is_refused(self, segment, change):
        path, entry = segment
        assert "not those that the checkpoint names" in refusal(path, change(entry))

    def test_an_entry_of_more_rows_than_there_are_is_refused(self, segment):
        path, entry = segment
        assert "truncated" in refusal(path, entry._replace(rows=entry.rows + 1))

    def test_a_segment_swapped_with_another_is_refused(self, tmp_path):
        _, _, mine = write(tmp_path / "a.psk", [1, 3, 2], seed=0)
        write(tmp_path / "b.psk", [1, 3, 2], seed=1)
        assert "not those" in refusal(tmp_path / "b.psk", mine[-1])


@needs_root
class TestFullDisk:
    def test_no_room_to_reserve_names_the_path_and_leaves_nothing(self, small_disk):
        path = small_disk.path / "gen" / "seg.psk"
        with pytest.raises(PskdError, match=f"{path}: {os.strerror(errno.ENOSPC)}.* Free some"):
            SegmentWriter(path, HEADER, 10**5, "seg.psk")
        assert list(path.parent.iterdir()) == []
        SegmentWriter(path, HEADER, 100, "seg.psk").close()

    def test_a_full_disk_is_an_error_and_costs_no_earlier_row(self, small_disk):
        """An exception and no SIGBUS; with space again the writer goes on where it was."""
        path = small_disk.path / "seg.psk"
        header = replace(HEADER, n=10**6, row_bytes=1000)
        writer = SegmentWriter(path, header, 1, "seg.psk")
        small_disk.leave(100_000)
        rows = rows_of(50, 1000, 0)
        chunks = 0
        with pytest.raises(PskdError, match=f"{path}: {os.strerror(errno.ENOSPC)}"):
            while chunks < 10:
                writer.append(np.arange(50) + 50 * chunks, rows)
                chunks += 1
        assert 1 <= chunks < 10
        for more in (0, 1):
            ids, found = read(path, writer.entry)
            np.testing.assert_array_equal(ids, np.arange(50 * (chunks + more)))
            np.testing.assert_array_equal(found, np.tile(rows, (chunks + more, 1)))
            if not more:
                small_disk.free_all()
                writer.append(np.arange(50) + 50 * chunks, rows)
        writer.close()

    def test_a_read_only_disk_is_named(self, small_disk):
        small_disk.make_read_only()
        path = small_disk.path / "gen" / "seg.psk"
        with pytest.raises(PskdError, match=f"{path}: {os.strerror(errno.EROFS)}.*file system"):
            SegmentWriter(path, HEADER, 1, "seg.psk")


# --- many segments --------------------------------------------------------------------------------


def generation_of(directory, segments, n=2000):
    """Written by so many ranks, a row a chunk or two; its entries, and the rows by id."""
    order = np.random.default_rng(0).permutation(n)
    rows = rows_of(n, 16, 1)
    entries = []
    for rank in range(segments):
        ids = order[rank::segments]
        name = f"gen-000000/seg-{rank}.psk"
        header = replace(HEADER, n=n, rank=rank, world=segments, classes=4, row_bytes=16)
        writer = SegmentWriter(directory / name, header, len(ids), name)
        for part in np.array_split(ids, 2):
            if len(part):
                writer.append(part, rows[part])
        writer.close()
        entries.append(writer.entry)
    return entries, rows


def read_many(directory, entries, rows, read):
    """Open two generations as an epoch's end does, and read in random order, with gaps."""
    n = len(rows)
    generations = [Generation(directory, n, 4, entries, read) for _ in range(2)]
    partial = Generation(directory, n, 4, entries[1:], read)
    ids = np.random.default_rng(2).permutation(n)
    found, present = np.empty((len(ids), 16), np.uint8), np.empty(len(ids), np.bool_)
    assert generations[0].gather(ids, found, present)
    assert (found == rows[ids]).all()
    assert present.all()
    assert not partial.gather(ids, found, present)
    assert (present == partial.present_N[ids]).all()
    assert (found == np.where(present[:, None], rows[ids], 0)).all()
    for generation in (*generations, partial):
        generation.close()
    return True


def with_limit(soft, hard, function, *args):
    """In a process that may open so many files: the result, or the message of the refusal."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        return function(*args)
    except PskdError as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("read", ["mmap", "pread"])
@pytest.mark.parametrize("segments", [3, 300])
def test_a_batch_is_read_from_any_number_of_segments(tmp_path, segments, read):
    """Though the soft limit of open files is far below it: it is raised up to the hard one."""
    entries, rows = generation_of(tmp_path, segments)
    with ProcessPoolExecutor(1, mp_context=processes) as executor:
        arguments = (read_many, tmp_path, entries, rows, read)
        assert executor.submit(with_limit, 128, 2048, *arguments).result() is True


def test_more_segments_than_open_files_are_refused_with_the_limit(tmp_path):
    """And not taken for damage, which would go back to an older checkpoint."""
    entries, rows = generation_of(tmp_path, 300)
    with ProcessPoolExecutor(1, mp_context=processes) as executor:
        arguments = (read_many, tmp_path, entries, rows, "mmap")
        message = executor.submit(with_limit, 128, 256, *arguments).result()
    assert message.startswith("PskdError: prediction store: ")
    assert "Too many open files; at most 256 are allowed" in message
    assert "ulimit -Hn" in message
