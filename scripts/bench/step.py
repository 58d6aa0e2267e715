"""Images per second of the real trainer, against a plain PyTorch DDP loop of a page.

    python scripts/bench/step.py                                  # baseline and PS-KD, 30 minutes
    python scripts/bench/step.py --methods baseline cskd tfkd_reg tfkd_self --classes 1000
    python scripts/bench/step.py --variant "ZeRO-1=--engine.deepspeed_config=fp32-zero1"

ResNet-18, images of 64 x 64, 64 of them a rank, one thread a rank; channels_last and foreach SGD
in both. A variant is the baseline with other flags. In each round every contender trains one epoch
of a few steps in turn, in the same processes, on the same cores; the trainer's epoch is
`Trainer.train_epoch`: order, augmentation, engine, guard, progress, and for PS-KD the store on this
disk. The plain loop does not augment.
Shown: median of the paired ratios over the rounds with its bootstrap 95 % interval, and
milliseconds a step, wall and CPU of all threads of a rank.

--in-namespaces MBIT: two hosts joined by a link of that bandwidth (needs root and iproute2).
"""

import argparse
import hashlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from paired import interval, table
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet18

from pskd import command_line, world
from pskd.config import EngineSection
from pskd.data.catalog import DATASETS
from pskd.inference import choose_kernels
from pskd.job import Job
from pskd.trainer import Trainer
from pskd.world import World

BATCH, SIDE = 64, 64  # samples and pixels, of a rank
MEAN, STD = 0.5 * 255, 0.3 * 255
PLAIN = "plain DDP"
EPOCHS = 10_000  # more than are trained: alpha stays small, which costs the same


def kernels_of(here: World, engine: EngineSection) -> None:
    """These choices are the process's: each contender makes its own again before it runs."""
    choose_kernels(here.device, tf32=engine.tf32, deterministic=engine.deterministic)


class PlainLoop:
    """What a user would write: DistributedDataParallel and nothing else."""

    def __init__(self, here: World, data: Path, classes: int, precision: str) -> None:
        from array_folder import load

        split = load(data, False).train
        images_NHWC = torch.from_numpy(split.images_NHWC).to(here.device)
        self._images_NCHW = images_NHWC.permute(0, 3, 1, 2)
        self._labels_N = torch.from_numpy(split.labels_N).to(here.device)
        self._here = here
        self._half = torch.autocast(here.device.type, torch.bfloat16, enabled=precision == "bf16")
        torch.manual_seed(0)
        model = resnet18(num_classes=classes).to(here.device, memory_format=torch.channels_last)
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True)
        self._sgd = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, foreach=True
        )

    def epoch(self, epoch: int) -> None:
        """All images once, in a new order; with the kernels of the baseline."""
        kernels_of(self._here, command_line.load([]).engine)
        generator = torch.Generator().manual_seed(epoch)
        order = torch.randperm(len(self._labels_N), generator=generator)
        total = torch.zeros((), device=self._here.device)
        mine = order[self._here.rank :: self._here.size].to(self._here.device)
        for batch_B in mine.split(BATCH):
            images_BCHW = (self._images_NCHW[batch_B].float() - MEAN) / STD
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
            with self._half:
                loss = F.cross_entropy(self.model(images_BCHW), self._labels_N[batch_B])
            self._sgd.zero_grad()
            loss.backward()
            self._sgd.step()
            total += loss.detach()
        assert torch.isfinite(total)


class Ours:
    """The trainer of a method."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def epoch(self, epoch: int) -> None:
        """As a run trains it."""
        kernels_of(self._trainer.world, self._trainer.config.engine)
        constants = self._trainer.method.begin_epoch(epoch, EPOCHS)
        self._trainer.train_epoch(epoch, 0, constants)

    def finish(self) -> None:
        """What belongs to an epoch's end, but not to a step: the past predictions are closed."""
        if self._trainer.store is not None:
            store = self._trainer.store
            store.commit()
            if self._trainer.world.rank == 0:
                store.retain([store.state_dict()])


@dataclass
class Setting:
    """What a rank is told."""

    methods: list[str]
    classes: int
    rounds: int
    steps: int
    precision: str
    variants: dict[str, list[str]]  # name -> flags
    data: Path


def trainer_of(
    here: World, setting: Setting, method: str, more: list[str] | None = None
) -> Trainer:
    """Of a new run. more: flags, which win."""
    name = method if more is None else "variant-" + hashlib.sha256(str(more).encode()).hexdigest()
    flags = [
        f"--method.name={method}",
        "--data.name=random",
        f"--data.root={setting.data}",
        "--model.name=resnet18",
        f"--train.batch_size={BATCH * here.size}",
        f"--train.epochs={EPOCHS}",
        f"--engine.deepspeed_config={setting.precision}",
        "--optimizer.implementation=foreach",
        "--schedule.milestones=[]",
        f"--run.dir={setting.data / f'{name}-{here.size}'}",
        "--run.threads=1",
        *(more or []),
    ]
    if not any("zero" in flag for flag in flags):
        flags.append("--engine.channels_last=true")
    if method == "tfkd_self":
        flags.append(f"--method.teacher={setting.data / 'teacher.pth'}")
    trainer, position = Job(command_line.load(flags)).prepare(here)
    trainer.begin(position)
    return trainer


def measure(here: World, setting: Setting) -> dict[str, np.ndarray]:
    """Seconds of an epoch by contender: (rounds, 2) of wall and CPU, the mean over the ranks."""
    plain = PlainLoop(here, setting.data, setting.classes, setting.precision)
    contenders: dict[str, PlainLoop | Ours] = {PLAIN: plain}
    if "tfkd_self" in setting.methods and here.rank == 0:
        torch.save(plain.model.module.state_dict(), setting.data / "teacher.pth")
    dist.barrier()
    for method in setting.methods:
        contenders[method] = Ours(trainer_of(here, setting, method))
    for name, flags in setting.variants.items():
        contenders[name] = Ours(trainer_of(here, setting, "baseline", flags))
    forward = Forward(plain.model.module, here)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in (*contenders, "forward")}
    names = list(contenders)
    for epoch in range(setting.rounds + 1):
        for name in names[epoch % len(names) :] + names[: epoch % len(names)]:
            contender = contenders[name]
            taken = timed(partial(contender.epoch, epoch))
            if isinstance(contender, Ours):
                contender.finish()
            if epoch:  # the first is warm-up
                seconds[name].append(taken)
        if epoch:
            seconds["forward"].append(timed(partial(forward, setting.steps)))
    found = here.gather({name: np.array(rounds) for name, rounds in seconds.items()})
    return {name: np.mean([rank[name] for rank in found], axis=0) for name in seconds}


class Forward:
    """A forward pass without gradient: what a frozen teacher or a peer costs."""

    def __init__(self, model: nn.Module, here: World) -> None:
        self._model = model
        images = torch.zeros(BATCH, 3, SIDE, SIDE, device=here.device)
        self._images = images.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._model(self._images)


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds until the slowest rank is through, CPU seconds of this process."""
    _together()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu = time.process_time() - cpu
    _together()
    return time.perf_counter() - wall, cpu


def _together() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def report(setting: Setting, size: int, seconds: dict[str, np.ndarray]) -> str:
    """A table."""
    head = ["", "ms a step", "CPU ms", "images/s", "throughput / plain DDP", "/ our baseline"]
    head += ["added wall ms", "added CPU ms"]
    rows = [head]
    milliseconds = {name: 1e3 * of / setting.steps for name, of in seconds.items()}
    for name, of in milliseconds.items():
        wall, cpu = np.median(of, axis=0)
        row = [name, f"{wall:.1f}", f"{cpu:.1f}", f"{1e3 * BATCH * size / wall:.0f}"]
        for other in (PLAIN, "baseline"):
            known = other in milliseconds and name not in (other, "forward")
            row.append(interval(milliseconds[other][:, 0] / of[:, 0]) if known else "")
        above = PLAIN if name == "baseline" else "baseline"
        if above in milliseconds and name not in (PLAIN, "forward"):
            row += [f"{np.median(of[:, k] - milliseconds[above][:, k]):+.1f}" for k in (0, 1)]
        else:
            row += ["", ""]
        rows.append(row)
    return table(rows)


def work(rank: int, size: int, address: str, port: int, setting: Setting, out: Path) -> None:
    """One rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }
    DATASETS["random"] = "array_folder"
    here = world.start(timeout_s=300)
    world.set_threads(1, here)
    found = measure(here, setting)
    if rank == 0:
        np.savez(out, **found)
    world.stop(here)


def compare(setting: Setting, size: int, hosts: list[list[str]]) -> dict[str, np.ndarray]:
    """Start the ranks; hosts: what to put before the command of each, the master first."""
    address = "127.0.0.1" if not any(hosts) else HOSTS[0]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = setting.data / f"seconds-{size}.npz"
    shape = {"n": BATCH * size * setting.steps, "classes": setting.classes, "side": SIDE}
    (setting.data / "shape.json").write_text(json.dumps(shape))
    ranks = []
    for rank in range(size):
        told = json.dumps(
            {**vars(setting), "data": str(setting.data), "rank": rank, "size": size}
            | {"address": address, "port": port, "out": str(out)}
        )
        ranks.append(subprocess.Popen([*hosts[rank], sys.executable, __file__, "--rank", told]))
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"a rank ended with {codes}")
    with np.load(out) as found:
        return dict(found)


HOSTS = ("10.78.0.1", "10.78.0.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def connect(mbit: int) -> list[list[str]]:
    """Two namespaces joined by a link of that bandwidth in each direction."""
    names = ["pskd-bench-0", "pskd-bench-1"]
    for name in names:
        ip("netns", "add", name)
    ip("link", "add", "vbench-0", "type", "veth", "peer", "name", "vbench-1")
    for number, name in enumerate(names):
        cable = f"vbench-{number}"
        ip("link", "set", cable, "netns", name)
        ip("-n", name, "addr", "add", f"{HOSTS[number]}/24", "dev", cable)
        ip("-n", name, "link", "set", cable, "up")
        ip("-n", name, "link", "set", "lo", "up")
        shape = f"tc qdisc add dev {cable} root tbf rate {mbit}mbit burst 1mb latency 400ms"
        subprocess.run(["ip", "netns", "exec", name, *shape.split()], check=True)
    return [["ip", "netns", "exec", name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--methods", nargs="*", default=["baseline", "pskd"], choices=METHODS)
    parser.add_argument("--classes", nargs="*", type=int, default=[10, 1000])
    parser.add_argument("--processes", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4, help="of an epoch")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=FLAGS")
    parser.add_argument("--json", type=Path, help="also write the seconds of each round there")
    parser.add_argument("--in-namespaces", type=int, metavar="MBIT")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        told = json.loads(arguments.rank)
        place = [told.pop(key) for key in ("rank", "size", "address", "port")]
        out = Path(told.pop("out"))
        work(*place, Setting(**{**told, "data": Path(told["data"])}), out)
        return
    variants = [variant.partition("=") for variant in arguments.variant]
    raw: dict[str, dict[str, list[list[float]]]] = {}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, ", end="")
    print(f"torch {torch.__version__}. {arguments.rounds} rounds of {arguments.steps} steps.")
    for classes in arguments.classes:
        for size in arguments.processes:
            with tempfile.TemporaryDirectory() as temporary:
                setting = Setting(
                    arguments.methods,
                    classes,
                    arguments.rounds,
                    arguments.steps,
                    arguments.precision,
                    {name: flags.split() for name, _, flags in variants},
                    Path(temporary),
                )
                hosts: list[list[str]] = [[] for _ in range(size)]
                where = ""
                try:
                    if arguments.in_namespaces:
                        hosts = connect(arguments.in_namespaces)
                        where = f", a link of {arguments.in_namespaces} Mbit/s between them"
                    found = compare(setting, size, hosts)
                finally:
                    if arguments.in_namespaces:
                        for number in (0, 1):
                            ip("netns", "del", f"pskd-bench-{number}")
            load = " ".join(f"{figure:.1f}" for figure in os.getloadavg())
            print(f"\n{classes} classes, {size} processes{where}. Load {load}.\n")
            print(report(setting, size, found), flush=True)
            raw[f"{classes} classes, {size} processes"] = {k: v.tolist() for k, v in found.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(raw))


METHODS = ("baseline", "label_smoothing", "cskd", "tfkd_reg", "tfkd_self", "pskd")

if __name__ == "__main__":
    main()
