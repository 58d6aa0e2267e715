"""What images through DALI cost: against DALI's own reader and draws, and against torchvision.

    python scripts/bench/data.py                        # two to three minutes on two cores
    python scripts/bench/data.py --images 640 --rounds 40
    python scripts/bench/data.py --dir ~/bench          # the images are kept there and used again

Images: JPEGs of ImageNet's size and quality, in the page cache. The variants take turns, an epoch
of all images each, in the opposite order every other round; a ratio is of one round. "DALI's own"
is the same graph with `readers.file`, `decoders.image_random_crop` and `coin_flip`, its fastest
form. torchvision: ImageFolder, PIL, and a DataLoader with as many worker processes as DALI has
threads. CPU is that of all threads and processes, at one torch thread a process; other jobs on the
machine disturb it less than the wall time. An epoch of DALI begins and ends with the batches ahead
decoded and its threads idle, so it is charged with its own work.

Order and draws: Python's share of the trainer's thread, at ImageNet's size, by itself; beside a
decoder that empties the caches it takes twice as long. The index: at ImageNet's size with made-up
entries, and built from real files (hard links of the images). Memory: of a process that trains, and
validates a batch, after each of its epochs.
"""

import argparse
import gc
import itertools
import multiprocessing as mp
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from nvidia.dali import Pipeline, fn, types
from nvidia.dali import __version__ as dali_version
from paired import interval, table
from store import anonymous_bytes
from torch.utils.data import DataLoader
from torch.utils.dlpack import from_dlpack
from torchvision import transforms
from torchvision.datasets import ImageFolder

from pskd import world
from pskd.data import colour, folder, index
from pskd.data.dali import DaliData
from pskd.data.graph import ImageOptions
from pskd.data.imagefolder import EncodedSplit, FolderCatalog
from pskd.data.interface import validation_batches
from pskd.data.sections import DataSection
from pskd.order import MicroBatch, Plan, Walk, epoch_order

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.photos import make_folder

IMAGENET, CLASSES = 1_281_167, 1000
SIZE = 224
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
FOREVER = 1_000_000  # epochs
CPU = torch.device("cpu")

Row = list[str]


def options(augment: Any, threads: int) -> ImageOptions:
    """The defaults of the configuration."""
    section = DataSection(
        augment=augment, flip=True, image_size=SIZE, crop_scale=list(SCALE), crop_ratio=list(RATIO)
    )
    return ImageOptions(section, mixed=False, threads=threads, channels_last=False)


def ours(catalog: FolderCatalog, augment: str, batch: int, threads: int) -> Callable[[], None]:
    data = DaliData(catalog, CPU, 0, options(augment, threads))
    plan = Plan(n=len(catalog.train), global_batch=batch)
    walk = Walk(plan, seed=0, epochs=FOREVER, rank=0)
    data.begin(walk, 0, 0)
    micros = walk.start(0, 0)

    def epoch() -> None:
        for micro in itertools.islice(micros, plan.steps):
            data.train_batch(micro)

    return epoch


def native(root: Path, count: int, batch: int, threads: int) -> Callable[[], None]:
    pipeline = Pipeline(
        batch_size=batch, num_threads=threads, device_id=None, seed=0, prefetch_queue_depth=2
    )
    with pipeline:
        encoded, label = fn.readers.file(file_root=str(root), random_shuffle=True)
        image = fn.decoders.image_random_crop(
            encoded,
            output_type=types.RGB,
            adjust_orientation=False,
            random_area=SCALE,
            random_aspect_ratio=RATIO,
        )
        image = fn.resize(image, size=[SIZE, SIZE], interp_type=types.INTERP_LINEAR, antialias=True)
        image = fn.crop_mirror_normalize(
            image,
            mirror=fn.random.coin_flip(),
            dtype=types.FLOAT,
            mean=[255 * m for m in colour.MEAN],
            std=[255 * s for s in colour.STD],
            output_layout="CHW",
        )
        pipeline.set_outputs(image, label)
    pipeline.build()

    def epoch() -> None:
        for _ in range(count // batch):
            for out in pipeline.run():
                from_dlpack(out.as_tensor())

    return epoch


def torchvision(root: Path, batch: int, threads: int) -> Callable[[], None]:
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, SCALE, RATIO),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(colour.MEAN, colour.STD),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(root), transform),
        batch_size=batch,
        shuffle=True,
        num_workers=threads,
        persistent_workers=True,
        multiprocessing_context="spawn",  # a fork would inherit the locks of DALI's threads
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


class Cost(NamedTuple):
    """Of one image, in microseconds."""

    cpu: float
    trainer: float  # the part of it on the thread that trains
    wall: float


def children_cpu_s() -> float:
    """CPU seconds of the worker processes that live."""
    # The clock of another process, as clock_getcpuclockid(3) makes it; in ns, /proc has ticks.
    children = psutil.Process().children()
    return sum(time.clock_gettime(~child.pid << 3 | 2) for child in children)


def others_busy() -> bool:
    """Whether another thread of this process runs, or would."""
    me = str(os.getpid())
    for task in os.scandir("/proc/self/task"):
        state = Path(task.path, "stat").read_text().rpartition(")")[2].split()[0]
        if task.name != me and state in "RD":
            return True
    return False


def settle() -> float:
    """Wait until DALI's threads are idle; returns when they were."""
    quiet, since = 0, time.perf_counter()
    while quiet < 4:
        if others_busy():
            quiet, since = 0, time.perf_counter()
        else:
            quiet += 1
        time.sleep(0.003)
    return since


def measure(epoch: Callable[[], None], count: int) -> Cost:
    settle()
    started, children = time.perf_counter(), children_cpu_s()
    process, thread = time.process_time(), time.thread_time()
    epoch()
    trainer = time.thread_time() - thread
    ended = settle()
    waiting = time.thread_time() - thread - trainer
    cpu = time.process_time() - process - waiting + children_cpu_s() - children
    return Cost(*(1e6 * seconds / count for seconds in (cpu, trainer, ended - started)))


def compare(root: Path, catalog: FolderCatalog, batch: int, threads: int, rounds: int) -> str:
    """All variants in turns."""
    count = len(catalog.train)
    variants = {
        "torchvision": torchvision(root, batch, threads),
        "DALI's own": native(root, count, batch, threads),
        "ours": ours(catalog, "standard", batch, threads),
        "ours, pskd-imagenet": ours(catalog, "pskd-imagenet", batch, threads),
    }
    aims = {"torchvision": ">= 1.40", "DALI's own": ">= 0.97"}
    for epoch in variants.values():
        epoch()
    costs: dict[str, list[Cost]] = {name: [] for name in variants}
    for k in range(rounds):
        for name in list(variants)[:: 1 if k % 2 else -1]:
            costs[name].append(measure(variants[name], count))
    rows = [
        ["", "CPU us an image", "of it trainer's thread", "images/s", "CPU / ours", "wall / ours"]
    ]
    rows[0].append("aim")
    for name, blocks in costs.items():
        cpu, trainer, wall = (np.array(column) for column in zip(*blocks, strict=True))
        our_cpu, _, our_wall = (np.array(column) for column in zip(*costs["ours"], strict=True))
        rows.append(
            [
                name,
                f"{np.median(cpu):.0f}",
                f"{np.median(trainer):.1f}",
                f"{1e6 / np.median(wall):.0f}",
                "" if name == "ours" else interval(cpu / our_cpu),
                "" if name == "ours" else interval(wall / our_wall),
                aims.get(name, ""),
            ]
        )
    return table(rows)


def synthetic_index(root: Path, n: int) -> index.Index:
    """Names and sizes like ImageNet's; the class folders exist and are empty."""
    rng = np.random.default_rng(0)
    names = [b"n%08d" % (1_440_764 + 13_861 * k) for k in range(CLASSES)]
    labels_N = np.sort(np.arange(n) % CLASSES).astype("<i4")
    paths = [b"%b/%b_%d.JPEG" % (names[k], names[k], i) for i, k in enumerate(labels_N.tolist())]
    for name in names:
        (root / name.decode()).mkdir(parents=True)
    times = [(name, n // CLASSES, (root / name.decode()).stat().st_mtime_ns) for name in names]
    return index.Index(
        root=root,
        class_names=tuple(name.decode() for name in names),
        labels_N=labels_N,
        widths_N=rng.integers(200, 601, n).astype("<i4"),
        heights_N=rng.integers(200, 601, n).astype("<i4"),
        bytes_N=rng.integers(50_000, 200_000, n),
        fingerprint="synthetic",
        dropped=(),
        labels_from="",
        snapshot=folder.take_snapshot(root, "classes", times),
        paths=np.frombuffer(b"".join(paths), np.uint8),
        offsets_N=np.cumsum([0, *map(len, paths)]).astype("<i8"),
    )


def catalog_of(train: index.Index, validation: int = 1) -> FolderCatalog:
    """All samples are trained; the first `validation` of them are validated."""
    rows_N = np.arange(len(train))
    split = EncodedSplit(train, rows_N)
    return FolderCatalog(train.class_names, split, split.take(rows_N[:validation]))


def us(work: Callable[[], object], per: int) -> str:
    """CPU of this thread, in microseconds by `per`: median of 9 times."""
    figures = []
    for _ in range(9):
        started = time.thread_time()
        work()
        figures.append(1e6 * (time.thread_time() - started) / per)
    return f"{statistics.median(figures):.2f}"


def order_and_draws(catalog: FolderCatalog) -> str:
    """What Python does for an image before DALI has it, at two sizes of a batch."""
    n = len(catalog.train)
    rows = [["us an image"], ["order of an epoch"], ["its micro-batches, their paths and draws"]]
    rows += [["the same, pskd-imagenet"], ["of these, paths"]]
    for batch in (64, 256):
        plan = Plan(n=n, global_batch=batch)
        some = list(itertools.islice(Walk(plan, 0, 1, 0).start(0, 0), 6400 // batch))
        rows[0].append(f"batch {batch}")
        rows[1].append(us(lambda: epoch_order(0, 1, n), n))
        for row, augment in zip(rows[2:4], ("standard", "pskd-imagenet"), strict=True):
            data = DaliData(catalog, CPU, 0, options(augment, 1))
            row.append(us(lambda data=data, some=some: drawn(data, some), 6400))
        row = rows[4]
        row.append(us(lambda some=some: [catalog.train.paths(m.ids_B) for m in some], 6400))
    return table(rows)


def drawn(data: DaliData, micros: Iterable[MicroBatch]) -> None:
    for rows in data._rows_of(iter(micros), ()):
        rows.feed(whole=False)


def open_synthetic(file: Path, root: Path) -> list[Row]:
    """In a fresh process: what opening takes and keeps."""

    def seconds(work: Callable[[], object]) -> str:
        started = time.perf_counter()
        work()
        return f"{1e3 * (time.perf_counter() - started):.1f} ms"

    gc.collect()
    before = anonymous_bytes()
    rows = [["open it", seconds(lambda: index.open_index(file, root))]]
    rows.append(["find it: open, and ask 1,000 folders", seconds(lambda: index.find(root, file))])
    opened, why = index.find(root, file)
    assert opened is not None, why
    assert why is None, why
    gc.collect()
    rows.append(["anonymous memory, open", f"{(anonymous_bytes() - before) / 1e6:.1f} MB"])
    data = DaliData(catalog_of(opened), CPU, 0, options("standard", 1))
    plan = Plan(n=len(opened), global_batch=256)
    drawn(data, Walk(plan, 0, 1, 0).start(0, 0))
    gc.collect()
    kept = (anonymous_bytes() - before) / 1e6
    rows.append(["anonymous memory, after an epoch of draws", f"{kept:.1f} MB"])
    return rows


def build_real(images: Path, place: Path, copies: int) -> list[Row]:
    """An index of hard links."""
    for number in range(copies):
        for source in images.glob("*/*"):
            target = place / source.parent.name / f"{number:03}-{source.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(source)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    started, process = time.perf_counter(), time.process_time()
    built = index.build(place)
    wall, cpu = time.perf_counter() - started, time.process_time() - process
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu += after.ru_utime - children.ru_utime + after.ru_stime - children.ru_stime
    n = len(built)
    figure = f"{wall:.1f} s; CPU {1e6 * cpu / n:.0f} us a file"
    return [[f"build it from {n:,} real files, {len(os.sched_getaffinity(0))} processes", figure]]


def memory(images: Path, batch: int, threads: int, epochs: int) -> list[float]:
    """In a fresh process: resident MB after each epoch of training and a validation."""
    torch.set_num_threads(1)
    world.keep_freed_memory()  # as the trainer does on a CPU
    catalog = catalog_of(index.build(images), validation=batch)
    data = DaliData(catalog, CPU, 0, options("standard", threads))
    plan = Plan(n=len(catalog.train), global_batch=batch)
    walk = Walk(plan, seed=0, epochs=FOREVER, rank=0)
    data.begin(walk, 0, 0)
    micros = walk.start(0, 0)
    resident = []
    for _ in range(epochs):
        for micro in itertools.islice(micros, plan.steps):
            data.train_batch(micro)
        for _ in validation_batches(data, 0, 1, batch):
            pass
        resident.append(psutil.Process().memory_info().rss / 1e6)
    data.close()
    return resident


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Its result in a process of its own."""
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def photos(directory: Path, place: Path, count: int) -> Path:
    """A folder of so many JPEGs; made in `place` if it is not in `directory`."""
    images = directory / f"photos-{count}"
    if not images.exists():
        made = place / "made"
        make_folder(made, classes=10, per_class=count // 10)
        made.rename(images)
    return images


def describe(images: index.Index) -> str:
    width, height = images.widths_N.mean(), images.heights_N.mean()
    return (
        f"{len(images)} images, in the mean {width:.0f} x {height:.0f} and "
        f"{images.bytes_N.mean() / 1e3:.0f} kB. {len(os.sched_getaffinity(0))} cores, DALI "
        f"{dali_version}, torch {torch.__version__}."
    )


def load() -> str:
    return " ".join(f"{figure:.1f}" for figure in os.getloadavg())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=320, help="a multiple of --batch and of 10")
    parser.add_argument("--dir", type=Path, help="where the images are made, if they are not there")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2, help="of DALI, and worker processes")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=20, help="for memory")
    parser.add_argument("--copies", type=int, default=32, help="hard links a file for the index")
    arguments = parser.parse_args()
    batch, threads = arguments.batch, arguments.threads
    if arguments.images % batch or arguments.images % 10:
        parser.error(f"--images must be a multiple of --batch {batch} and of 10, the classes.")
    torch.set_num_threads(1)
    if arguments.dir:
        arguments.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        place = Path(temporary)
        images = photos(arguments.dir or place, place, arguments.images)
        catalog = catalog_of(index.build(images))
        print(describe(catalog.train.index), end=" ")
        print(f"Batch {batch}, {threads} threads. Load before: {load()}.\n")
        print(compare(images, catalog, batch, threads, arguments.rounds))
        print(f"\n{arguments.rounds} rounds. Load after: {load()}.\n")
        synthetic, file = synthetic_index(place / "synthetic", IMAGENET), place / "file"
        index.write(synthetic, file)
        opened = index.open_index(file, synthetic.root)
        print(order_and_draws(catalog_of(opened)), end="\n\n")
        rows = [[f"the index, {IMAGENET:,} entries", f"{file.stat().st_size / 1e6:.0f} MB"]]
        rows += fresh(open_synthetic, file, synthetic.root)
        rows += build_real(images, place / "links", arguments.copies)
        print(table(rows), end="\n\n")
        resident = fresh(memory, images, batch, threads, arguments.epochs)
        some = sorted({1, *range(5, arguments.epochs, 5), arguments.epochs})
        rows = [["after epoch", *map(str, some)]]
        print(table([*rows, ["resident MB", *(f"{resident[k - 1]:.0f}" for k in some)]]))


if __name__ == "__main__":
    main()
