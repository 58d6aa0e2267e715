"""What the store costs: room on disk, memory, bytes written; and what it does on a GPU.

Letters: N samples, C classes.
"""

import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from pskd.store.appender import _SLOTS, _Slot
from pskd.store.format import HEADER_BYTES
from pskd.store.registry import create_encoding
from pskd.store.segment import Chunk
from pskd.store.worker import Worker
from pskd.trainer import Trainer
from tests.lone_store import C, N, filled, new_store, probabilities
from tests.system import processes

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")


def test_a_start_gives_back_the_room_that_a_killed_one_had_reserved(tmp_path):
    """Many kills within an epoch would each keep room for the rest of it."""
    rows, seen = probabilities(0), []
    state = new_store(tmp_path).empty_state(0)
    for start in range(4):
        store = new_store(tmp_path, start=start)
        store.load_state_dict(state)
        store.begin_epoch(0)
        ids = np.arange(8) + 8 * start
        store.remember(ids, rows[ids])
        store.commit()
        state = store.state_dict()
        store.remember(ids, rows[ids])  # not named by the checkpoint, but not cut in two either
        store.commit()
        seen += ids.tolist()
        killed = sorted(tmp_path.glob("gen-*/seg-*"))
        assert killed[-1].stat().st_size > HEADER_BYTES + 2 * (96 + 8 * 32), "room is reserved"
        sizes = {path.stat().st_size for path in killed[:-1]}
        assert sizes <= {HEADER_BYTES + 2 * (96 + 8 * 32)}
    again = new_store(tmp_path, start=4)
    again.load_state_dict(state)
    again.begin_epoch(0)
    again.begin_epoch(1)
    assert torch.equal(again.past(np.array(seen))[0], rows[seen])
    again.close()


SAMPLES, CLASSES, BATCH = 1_281_167, 20, 4096


def anonymous_bytes():
    """Memory of this process that is in no file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024


def train_at_scale(directory):
    """Two epochs over as many samples as ImageNet has; the most anonymous memory on the way."""
    torch.set_num_threads(1)
    rows = probabilities(0, n=BATCH, classes=CLASSES)
    order = np.random.default_rng(0).permutation(SAMPLES)
    warm = new_store(directory / "warm", n=BATCH, classes=CLASSES)  # what is loaded on first use
    warm.begin_epoch(0)
    warm.remember(np.arange(BATCH), rows)
    warm.begin_epoch(1)
    warm.past(np.arange(BATCH))
    warm.close()
    before = most = anonymous_bytes()
    store = new_store(directory / "store", n=SAMPLES, classes=CLASSES, encoding="float16")
    for epoch in range(2):
        store.begin_epoch(epoch)
        for first in range(0, SAMPLES, BATCH):
            ids = order[first : first + BATCH]
            store.past(ids)
            store.remember(ids, rows[: len(ids)])
            if first % (50 * BATCH) == 0:
                most = max(most, anonymous_bytes())
        most = max(most, anonymous_bytes())
    store.begin_epoch(2)
    most = max(most, anonymous_bytes())
    state = store.state_dict()
    store.close()
    return most - before, state


def open_at_scale(directory, state):
    """Anonymous bytes that opening, verifying and reading the generation takes."""
    torch.set_num_threads(1)
    np.random.default_rng(0).permutation(10)
    before = anonymous_bytes()
    store = new_store(directory, start=1, n=SAMPLES, classes=CLASSES, encoding="float16")
    store.load_state_dict(state)
    store.begin_epoch(2)
    rows, present = store.past(np.arange(0, SAMPLES, 5000))
    assert present.all()
    assert torch.allclose(rows.sum(dim=1), torch.ones(len(rows)))
    taken = anonymous_bytes() - before
    store.close()
    return taken


def bytes_written(directory, classes, batch, steps):
    """(handed to the system, sent to disks) in an epoch of `steps` and its commits."""

    def count():
        lines = Path("/proc/self/io").read_text().splitlines()
        values = dict(line.split(": ") for line in lines)
        return np.array([int(values["wchar"]), int(values["write_bytes"])])

    n = batch * steps
    store = new_store(directory, n=n, classes=classes, encoding="float16")
    store.begin_epoch(0)
    rows, before = probabilities(0, n=batch, classes=classes), count()
    for step in range(steps):
        store.remember(np.arange(batch * step, batch * step + batch), rows)
        if step == steps // 2:
            store.commit()
    store.begin_epoch(1)
    written = count() - before
    store.close()
    return written.tolist()


def elsewhere(function, *args):
    """Its result in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=processes) as executor:
        return executor.submit(function, *args).result()


class TestMemoryForCopies:
    """A GPU makes the host wait for copies into memory that is not contiguous."""

    @pytest.mark.parametrize("rows", [1, 5, 16])
    @pytest.mark.parametrize("row_bytes", [200, 1000, 2000])
    def test_rows_and_checks_of_any_batch_are_contiguous(self, row_bytes, rows):
        slot = _Slot(row_bytes, 16, torch.device("cpu"))
        units_BS, rows_BR = slot.chunk.units_BS(rows), slot.chunk.rows_BR(rows)
        assert units_BS.is_contiguous()
        assert slot.checks_2B(rows).is_contiguous()
        assert slot.checks_2B(rows).shape == (2, rows)
        assert units_BS.data_ptr() == rows_BR.data_ptr()
        assert units_BS.stride() == rows_BR.stride()
        assert rows_BR.shape == (rows, row_bytes)

    @pytest.mark.parametrize("encoding", ["float32", "float16", "uint8-log", "top2"])
    def test_what_fills_up_a_unit_may_hold_anything(self, encoding):
        """As where whole units are copied: the chunk is the same as of rows alone."""
        encoding, ids = create_encoding(encoding), np.arange(5)
        row_bytes = encoding.row_bytes(C)
        contents = []
        for whole in (False, True):
            chunk = Chunk(row_bytes, 16)
            if whole:
                units_BS = torch.full_like(chunk.units_BS(5), 255)
                encoding.encode(probabilities(0, 5), units_BS[:, :row_bytes])
                chunk.units_BS(5).copy_(units_BS)
            else:
                encoding.encode(probabilities(0, 5), chunk.rows_BR(5))
            content, crc = chunk.seal(ids)
            contents.append((bytes(content), crc))
        assert contents[0] == contents[1]


class TestDevice:
    def test_a_worker_makes_its_gpu_current_before_anything_else(self, monkeypatch):
        """On its own thread: the current device is a thread's, and at first GPU 0."""
        happened = []
        monkeypatch.setattr(
            torch.cuda,
            "set_device",
            lambda device: happened.append((threading.current_thread().name, device)),
        )
        worker = Worker("store-test", torch.device("cuda", 3))
        worker.submit(lambda: happened.append("work")).wait()
        worker.close()
        assert happened == [("store-test", 3), "work"]

    def test_on_a_cpu_there_is_nothing_to_make_current(self, monkeypatch, tmp_path):
        monkeypatch.setattr(torch.cuda, "set_device", None)
        store, rows = filled(tmp_path)
        assert torch.equal(store.past(np.arange(N))[0], rows)
        store.close()


class TestCost:
    def test_a_generation_of_imagenet_takes_little_memory(self, tmp_path):
        taken, state = elsewhere(train_at_scale, tmp_path)
        assert taken < 64 << 20
        assert elsewhere(open_at_scale, tmp_path / "store", state) < 64 << 20

    @pytest.mark.parametrize(("classes", "batch", "steps"), [(1000, 256, 40), (100, 128, 400)])
    def test_little_more_is_written_than_the_rows(self, tmp_path, classes, batch, steps):
        payload = 2 * classes * batch * steps
        handed, sent = elsewhere(bytes_written, tmp_path, classes, batch, steps)
        assert payload <= handed <= 1.1 * payload
        assert sent <= 1.1 * payload


# --- on a GPU ------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8-log", "top2"])
@pytest.mark.parametrize("classes", [C, 1000])
def test_a_gpu_reads_and_remembers_what_a_cpu_does(tmp_path, encoding, classes):
    """Through pinned buffers that are reused, by copies that nobody waits for."""
    kept = {}
    for device in ("cpu", "cuda"):
        options = {"encoding": encoding, "n": 32 * 16, "classes": classes, "device": device}
        store = new_store(tmp_path / device, **options)
        store.begin_epoch(0)
        for epoch in (0, 1):
            store.begin_epoch(epoch)
            store.prefetch(np.arange(16))
            for step in range(32):
                ids = np.arange(16 * step, 16 * step + 16)
                past, present = store.past(ids)
                store.prefetch((ids + 16) % (32 * 16))
                assert past.device.type == present.device.type == device
                kept[device, epoch, step] = past.cpu(), present.cpu()
                probs = probabilities(100 * epoch + step, 16, classes).to(device)
                store.remember(ids, probs)
                probs.fill_(torch.nan)  # at once: it has been copied, or the copy is ordered first
        store.begin_epoch(2)
        store.close()
    for epoch in (0, 1):
        for step in range(32):
            on_cpu, on_gpu = kept["cpu", epoch, step], kept["cuda", epoch, step]
            assert torch.equal(on_cpu[1], on_gpu[1])
            # Logarithms of a GPU may fall on the other side of a step of uint8-log: exp(16 / 255).
            rtol = 0.07 if encoding == "uint8-log" else 1e-5
            torch.testing.assert_close(on_gpu[0], on_cpu[0], rtol=rtol, atol=1e-7)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("encoding", ["float32", "float16", "uint8-log", "top2"])
@pytest.mark.parametrize("classes", [100, 1000])
def test_no_call_makes_the_host_wait_for_the_gpu(tmp_path, encoding, classes):
    """Rows that fill no unit, a short last batch, images that keep their older rows."""
    options = {"encoding": encoding, "n": 3 * 16 + 5, "classes": classes, "device": "cuda:0"}
    store = new_store(tmp_path, **options)
    sizes = (16, 16, 16, 5)
    for epoch in range(3):
        store.begin_epoch(epoch)
        probs = [probabilities(step, size, classes).cuda() for step, size in enumerate(sizes)]
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if epoch else "default")  # 0: buffers are made
        try:
            for step, (size, probs_BC) in enumerate(zip(sizes, probs, strict=True)):
                ids = np.arange(16 * step, 16 * step + size)
                store.past(ids)
                Trainer._remember(None, store, ids, probs_BC, [0, 3] if epoch == 1 else [])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    store.commit()
    store.close()
    # That mode does not see copies into memory that is not pinned.
    slot = _Slot(create_encoding(encoding).row_bytes(classes), 16, torch.device("cuda", 0))
    for destination in (slot.chunk.units_BS(5), slot.checks_2B(5)):
        assert destination.is_pinned()
        assert destination.is_contiguous()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.gpu
def test_a_worker_is_on_the_gpu_of_its_rank():
    found = []
    worker = Worker("store-test", torch.device("cuda", 1))
    worker.submit(lambda: found.append(torch.cuda.current_device())).wait()
    worker.close()
    assert found == [1]


@needs_gpu
@pytest.mark.gpu
def test_a_busy_gpu_is_not_waited_for(tmp_path):
    """Kernels that are queued delay the rows, and not the call."""
    store = new_store(tmp_path, device="cuda")
    store.begin_epoch(0)
    rows = probabilities(0).to("cuda")
    for _ in range(_SLOTS):  # to make all buffers: pinning memory waits for the GPU
        store.remember(np.arange(N), rows)
    store.commit()
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second on the stream
    done = torch.cuda.Event()
    store.remember(np.arange(N), rows)
    done.record()
    assert not done.query()
    store.begin_epoch(1)
    assert torch.equal(store.past(np.arange(N))[0].cpu(), rows.cpu())
    store.close()
