"""What the prediction store costs a training step, and what commit and opening take.

    python scripts/bench/store.py                 # N = 100,000, a minute
    python scripts/bench/store.py --full          # ImageNet's size: 1,281,167 x 1,000

Step: time on the training thread for `past` + `prefetch` + `remember` between steps of real
compute, against copying as many bytes as the step reads and writes from memory to memory, in
turns in one process. Cold: each block in a process of its own, after the generation was dropped
from the page cache; fincore has to confirm that.

Machinery: all that PS-KD adds to the forward and backward pass of the network (targets, loss and
its gradient, softmax, hand-over) against a literal version of what is published: one-hot rows
from an identity matrix, a float32 table in memory, and with several ranks an all_gather of
predictions and indices and one assignment a row.
"""

import argparse
import gc
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from paired import interval, table
from torch import Tensor

from pskd.data.batch import Batch
from pskd.methods.interface import Past
from pskd.methods.pskd import PSKD
from pskd.methods.sections import PSKDSection
from pskd.store.generation import open_generation
from pskd.store.peers import Alone
from pskd.store.sections import StoreSection
from pskd.store.store import Store

CLASSES, BATCH = 1000, 256
IMAGES_PER_S = 16_000  # of a node with eight fast GPUs
CPU = torch.device("cpu")


class Ranks:
    """Peers over torch.distributed, on one disk."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = size
        self.colleagues = tuple(range(size))

    def gather(self, value: object) -> list[object]:
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def spread(self, directory: Path, mine: dict[str, int]) -> None:
        """There is one disk."""


def make_store(
    directory: Path, n: int, encoding: str, peers: object = None, start: int = 0
) -> Store:
    return Store(
        directory,
        n=n,
        classes=CLASSES,
        identity="bench",
        run="bench",
        start=start,
        peers=peers or Alone(),
        options=StoreSection(encoding),
        device=CPU,
    )


def predictions(seed: int = 0) -> Tensor:
    """Peaked rows, as of a trained network: float32 (BATCH, CLASSES)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(3 * torch.randn(BATCH, CLASSES, generator=generator), dim=1)


def anonymous_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous"))


def bytes_written() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def drop_from_cache(directory: Path) -> None:
    for path in directory.rglob("*.psk"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_share(directory: Path) -> float:
    """Of the segments, by util-linux's fincore."""
    paths = [str(path) for path in directory.rglob("*.psk")]
    command = ["fincore", "--bytes", "--noheadings", "--raw", "--output", "RES,SIZE", *paths]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    sizes = [int(word) for word in lines]
    return sum(sizes[::2]) / sum(sizes[1::2])


def fill(store: Store, order_N: np.ndarray) -> list[list[str]]:
    """Write one whole generation as fast as it goes; returns rows of figures."""
    probs_BC = predictions()
    store.begin_epoch(0)
    before, started = bytes_written(), time.monotonic()
    for start in range(0, len(order_N), BATCH):
        ids_B = order_N[start : start + BATCH]
        store.remember(ids_B, probs_BC[: len(ids_B)])
    appended = time.monotonic()
    store.begin_epoch(1)  # flush, fsync, index, manifest
    committed = time.monotonic()
    epoch_s = len(order_N) / IMAGES_PER_S
    payload = len(order_N) * store._row_bytes
    return [
        ["append, unpaced", f"{appended - started:.2f} s", ""],
        [
            "commit and open (fsync, index, manifest)",
            f"{committed - appended:.2f} s",
            f"{(committed - appended) / epoch_s:.1%} of an epoch at {IMAGES_PER_S:,} images/s",
        ],
        [
            "bytes written / payload",
            f"{(bytes_written() - before) / payload:.3f}",
            f"{payload / 1e9:.2f} GB",
        ],
    ]


def busy(seconds: float, matrix: Tensor) -> None:
    """The network's part of a step."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        matrix @ matrix


class Block(NamedTuple):
    """Medians over the steps of a block, in ms, and how often training waited."""

    ratio: float
    ours_ms: float
    copy_ms: float
    training_cpu_ms: float
    other_cpu_ms: float
    waits_read: int
    waits_write: int


def second_epoch(directory: Path, n: int, encoding: str, start: int) -> Store:
    """A store that reads the generation that `fill` has written."""
    store = make_store(directory, n, encoding, start=start)
    store.load_state_dict(
        {
            "epoch": 1,
            "finished": open_generation(directory / "gen-000000").entries,
            "growing": [],
            "runs": ["bench"],
        }
    )
    store.begin_epoch(1)
    return store


def measure(store: Store, order_N: np.ndarray, steps: int, step_s: float) -> Block:
    """`past` + `prefetch` + `remember` against memcpy, over some steps of an order."""
    row_bytes = store._row_bytes
    probs_BC, matrix = predictions(), torch.randn(512, 512)
    source = torch.randint(0, 255, (128, BATCH * row_bytes), dtype=torch.uint8)
    target = torch.zeros_like(source)
    ours, copies, main_s = [], [], 0.0
    store.waits()
    store.prefetch(order_N[:BATCH])
    busy(5 * step_s, matrix)
    process, this_thread = time.process_time(), time.thread_time()
    for step in range(steps):
        ids_B, next_B = (order_N[(step + k) * BATCH :][:BATCH] for k in (0, 1))
        # The copy comes from memory, and not from a cache, as the rows do.
        a, b = (2 * step) % 128, (2 * step + 1) % 128
        started = time.perf_counter()
        target[a].copy_(source[a])
        target[b].copy_(source[b])
        copies.append(time.perf_counter() - started)
        thread = time.thread_time()
        started = time.perf_counter()
        store.past(ids_B)
        store.prefetch(next_B)
        first = time.perf_counter() - started
        first_cpu = time.thread_time() - thread
        busy(step_s, matrix)
        thread = time.thread_time()
        started = time.perf_counter()
        store.remember(ids_B, probs_BC)
        ours.append(first + time.perf_counter() - started)
        main_s += first_cpu + time.thread_time() - thread
    others_s = (time.process_time() - process) - (time.thread_time() - this_thread)
    waits = store.waits()
    return Block(
        float(np.median(ours) / np.median(copies)),
        1e3 * float(np.median(ours)),
        1e3 * float(np.median(copies)),
        1e3 * main_s / steps,
        1e3 * others_s / steps,
        waits["read"].times,
        waits["write"].times,
    )


def cold_block(
    directory: Path, n: int, encoding: str, number: int, steps: int, step_s: float, out: mp.Queue
) -> None:
    """In a process of its own: what a process has mapped and touched stays in the cache."""
    torch.set_num_threads(1)
    drop_from_cache(directory / "gen-000000")
    store = make_store(directory, n, encoding, start=number)
    # Not by load_state_dict: it verifies, and so reads, every row.
    store._finished, store._epoch = open_generation(directory / "gen-000000").entries, 1
    store.begin_epoch(1)
    resident = resident_share(directory / "gen-000000")
    assert resident < 0.05, f"{resident:.0%} of the generation is still in the page cache"
    order_N = np.random.default_rng(1).permutation(n)[number * steps * BATCH :]
    out.put(measure(store, order_N, steps, step_s))
    store.close()


def steps(
    directory: Path, n: int, encoding: str, blocks: int, per_block: int, step_s: float, cold: bool
) -> list[str]:
    """One row of the table, over several blocks."""
    if cold:
        context = mp.get_context("spawn")
        out, done = context.Queue(), []
        for number in range(min(blocks, n // BATCH // (per_block + 1))):
            arguments = (directory, n, encoding, number, per_block, step_s, out)
            process = context.Process(target=cold_block, args=arguments)
            process.start()
            process.join()
            assert process.exitcode == 0
            done.append(out.get())
    else:
        order_N = np.random.default_rng(1).permutation(n)
        store = second_epoch(directory, n, encoding, 0)
        at = [k * per_block * BATCH for k in range(blocks)]
        done = [measure(store, order_N[start:], per_block, step_s) for start in at]
        store.close()
        del store
        gc.collect()
    columns = Block(*np.array(done).T)
    return [
        f"{encoding}, {'cold' if cold else 'warm'}",
        f"{np.median(columns.ours_ms):.3f}",
        f"{np.median(columns.copy_ms):.3f}",
        interval(columns.ratio),
        f"{np.median(columns.training_cpu_ms):.2f} + {np.median(columns.other_cpu_ms):.2f}",
        f"{np.sum(columns.waits_read):.0f} / {np.sum(columns.waits_write):.0f} "
        f"of {len(done) * per_block}",
    ]


class Published:
    """The published way, from its description."""

    def __init__(self, n: int, rank: int, world: int) -> None:
        self.table_NC = torch.zeros(n, CLASSES)
        self.world = world

    def __call__(self, ids_B: Tensor, labels_B: Tensor, logits_BC: Tensor, alpha: float) -> None:
        onehot_BC = torch.eye(CLASSES)[labels_B.numpy()]
        targets_BC = (1 - alpha) * onehot_BC + alpha * self.table_NC[ids_B]
        probs_BC = torch.softmax(logits_BC, dim=1)
        loss = (-targets_BC * torch.log_softmax(logits_BC, dim=1)).mean(0).sum()
        if self.world == 1:  # not distributed: one assignment
            loss.backward()
            self.table_NC[ids_B] = probs_BC.detach()
            return
        all_probs = [torch.ones_like(probs_BC) for _ in range(self.world)]
        all_ids = [torch.ones_like(ids_B) for _ in range(self.world)]
        dist.all_gather(all_probs, probs_BC.detach())
        dist.all_gather(all_ids, ids_B)
        probs_BC, ids_B = torch.cat(all_probs), torch.cat(all_ids)
        loss.backward()
        for row in range(len(ids_B)):
            self.table_NC[ids_B[row]] = probs_BC[row]


class Ours:
    """The method and the store, as the trainer uses them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.method = PSKD(PSKDSection())
        self.method.begin_epoch(0, 2)

    def __call__(self, ids_B: Tensor, labels_B: Tensor, logits_BC: Tensor, alpha: float) -> None:
        past = Past(*self.store.past(ids_B.numpy()))
        batch = Batch(ids_B, logits_BC, labels_B, torch.ones(len(ids_B)))
        output = self.method(lambda logits_BC: logits_BC, batch, past)
        output.loss_B.mean().backward()
        self.store.remember(ids_B.numpy(), output.remember_BC)


def machinery(rank: int, world: int, port: int, n: int, directory: Path, out: mp.Queue) -> None:
    """Ours and the published way in turns, on this rank of `world`."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    store = make_store(directory, n, "float16", Ranks(rank, world))
    order_N = np.random.default_rng(0).permutation(n)
    part_N = order_N[rank * (n // world) :][: n // world]
    fill(store, part_N)
    ours, published = Ours(store), Published(n, rank, world)
    generator = torch.Generator().manual_seed(rank)
    cpu: dict[str, list[float]] = {"ours": [], "published": []}
    wall: dict[str, list[float]] = {"ours": [], "published": []}
    step = 0
    for block in range(24):
        pair = [("ours", ours), ("published", published)]
        for name, method in pair if block % 2 else pair[::-1]:
            dist.barrier()
            cpu_s = wall_s = 0.0
            for _ in range(4):
                ids_B = torch.from_numpy(part_N[step * BATCH % (len(part_N) - BATCH) :][:BATCH])
                labels_B = torch.randint(0, CLASSES, (BATCH,), generator=generator)
                logits_BC = torch.randn(BATCH, CLASSES, generator=generator).requires_grad_()
                cpu_started = time.process_time()
                if name == "ours":
                    store.prefetch(ids_B.numpy())
                time.sleep(0.01)  # the network's part, without its CPU
                started = time.perf_counter()
                method(ids_B, labels_B, logits_BC, 0.4)
                wall_s += time.perf_counter() - started
                time.sleep(0.01)  # for the threads to finish: their CPU counts
                cpu_s += time.process_time() - cpu_started
                step += 1
            cpu[name].append(1e3 * cpu_s / 4)
            wall[name].append(1e3 * wall_s / 4)
    store.close()
    if rank == 0:
        out.put((cpu, wall))
    dist.barrier()
    dist.destroy_process_group()


def compare_machinery(n: int, place: Path) -> str:
    rows = [
        [
            "world",
            "published: CPU ms",
            "wall ms",
            "ours: CPU ms",
            "wall ms",
            "CPU published / ours",
            "wall",
        ]
    ]
    medians = {}
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = mp.get_context("spawn")
        out = context.Queue()
        directory = place / f"machinery-{world}"
        ranks = [
            context.Process(target=machinery, args=(r, world, port, n, directory, out))
            for r in range(world)
        ]
        for process in ranks:
            process.start()
        cpu, wall = out.get()
        for process in ranks:
            process.join()
        shutil.rmtree(directory)
        medians[world] = {name: float(np.median(values)) for name, values in cpu.items()}
        rows.append(
            [
                str(world),
                *(
                    f"{np.median(figures[name]):.2f}"
                    for name in ("published", "ours")
                    for figures in (cpu, wall)
                ),
                interval(np.array(cpu["published"]) / np.array(cpu["ours"])),
                interval(np.array(wall["published"]) / np.array(wall["ours"])),
            ]
        )
    row_ms = (medians[2]["published"] - medians[1]["published"]) / BATCH
    for world in (8, 64):
        published = medians[2]["published"] + row_ms * BATCH * (world - 2)
        rows.append(
            [
                f"{world}, computed",
                f"{published:.0f}",
                "",
                f"{medians[2]['ours']:.2f}",
                "",
                f"{published / medians[2]['ours']:.0f}",
                "",
            ]
        )
    return table(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--full", action="store_true", help="1,281,167 samples, more blocks")
    parser.add_argument("--dir", type=Path, help="where to write (default: /tmp)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="compute between steps")
    arguments = parser.parse_args()
    n = 1_281_167 if arguments.full else 100_000
    blocks, per_block = (24, 60) if arguments.full else (8, 20)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        place = Path(temporary)
        figures = [["N = " + f"{n:,}, C = {CLASSES:,}", "", ""]]
        rows = [
            [
                "encoding, cache",
                "store ms",
                "memcpy ms",
                "ratio",
                "CPU ms training + other",
                "waits r/w",
            ]
        ]
        for encoding in ("float16", "uint8-log"):
            directory = place / encoding
            before = anonymous_bytes()
            store = make_store(directory, n, encoding)
            written = fill(store, np.random.default_rng(0).permutation(n))
            memory = (anonymous_bytes() - before) / 1e6
            store.close()
            figures += [[f"{encoding}: {row[0]}", *row[1:]] for row in written]
            figures.append([f"{encoding}: anonymous memory", f"{memory:.0f} MB", ""])
            started = time.monotonic()
            generation = open_generation(directory / "gen-000000")
            opened = time.monotonic()
            generation.verify()
            verified = time.monotonic()
            del generation, store  # or pages would stay mapped, and warm
            gc.collect()
            figures.append([f"{encoding}: open", f"{opened - started:.2f} s", ""])
            figures.append([f"{encoding}: verify", f"{verified - opened:.2f} s", ""])
            for cold in (False, True):
                step = steps(
                    directory, n, encoding, blocks, per_block, arguments.step_ms / 1e3, cold
                )
                rows.append(step)
                shutil.rmtree(directory / "gen-000001")
            shutil.rmtree(directory)
        print(table(figures), end="\n\n")
        print(table(rows), end="\n\n")
        print(compare_machinery(min(n, 200_000), place))


if __name__ == "__main__":
    main()
