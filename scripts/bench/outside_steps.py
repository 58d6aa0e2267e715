"""What a run spends outside its steps: from launch to the first step, and at an epoch's end.

    python scripts/bench/outside_steps.py              # torchrun with 2 processes; 5 rounds

Each round launches a job of its own. Times are those of rank 0, medians over the rounds; the page
cache is warm. The epoch's end: PreAct ResNet-18, 50,000 predictions of 100 classes a generation, as
for CIFAR-100, of images of 8 x 8 pixels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
N, CLASSES = 50_000, 100


class Stages:
    """Seconds by name, in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.time()

    def next(self, name: str) -> None:
        """What has passed since the last call was this."""
        now = time.time()
        self.seconds[name] = now - self._since
        self._since = now

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; how long it takes is noted."""

        def timed(*arguments: Any, **named: Any) -> Any:
            begun = time.time()
            try:
                return work(*arguments, **named)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.time() - begun

        return timed


def first_step(out: Path, flags: list[str]) -> None:
    """One rank: as train.py up to its first step, then an epoch's end."""
    started = json.loads(os.environ["BENCH_LAUNCHED"])
    stages = Stages()
    stages.seconds["launcher, until the interpreter runs"] = time.time() - started
    from pskd import command_line
    from pskd.data.catalog import DATASETS

    DATASETS["random"] = "array_folder"
    config = command_line.load(flags)
    stages.next("command line")
    import torch  # noqa: F401

    stages.next("import torch")
    import deepspeed  # noqa: F401

    stages.next("import deepspeed")
    from pskd import assembly, job, world
    from pskd.order import epoch_order

    stages.next("import the rest")
    here = world.start(config.run.timeout_s)
    stages.next("join the other ranks")
    of_job = {
        "catalog_and_plan": "read the data (or its index)",
        "network": "build the network",
        "open_directory": "open the run directory",
        "register_start": "compare it with the run",
    }
    of_assembly = {
        "Engine": "DeepSpeed's engine",
        "Store": "open the store",
        "resume": "look for a checkpoint",
        "loader": "build the data path",
    }
    for module, parts in ((job, of_job), (assembly, of_assembly)):
        for name, label in parts.items():
            setattr(module, name, stages.around(label, getattr(module, name)))
    begun = time.time()
    trainer, position = job.Job(config).prepare(here)
    trainer.begin(position)
    whole = time.time() - begun
    known = [*of_job.values(), *of_assembly.values()]
    stages.seconds["the rest of it"] = whole - sum(stages.seconds.get(k, 0.0) for k in known)
    stages._since = time.time()
    order_N = epoch_order(config.train.seed, 0, trainer.plan.n)
    trainer.method.begin_epoch(0, config.train.epochs)
    trainer.engine.train()
    if trainer.store is not None:
        trainer.store.begin_epoch(0)
    trainer.train_step(order_N, 0, 0)
    stages.next("first step")
    found: dict[str, Any] = {"start": stages.seconds}
    if "BENCH_ENDS" in os.environ:
        found["ends"] = epoch_ends(trainer, int(os.environ["BENCH_ENDS"]))
    if here.rank == 0:
        out.write_text(json.dumps(found))
    trainer.close()
    world.stop(here)


def epoch_ends(trainer: Any, epochs: int) -> list[dict[str, float]]:
    """Of some epochs whose predictions are made up: nothing is trained."""
    import torch

    from pskd.order import epoch_order

    probs_BC = torch.softmax(3 * torch.randn(trainer.plan.global_batch, CLASSES), dim=1)
    found = []
    for epoch in range(epochs + 1):
        stages = Stages()
        constants = trainer.method.begin_epoch(epoch, trainer.config.train.epochs)
        order_N = epoch_order(trainer.config.train.seed, epoch, trainer.plan.n)
        trainer.store.begin_epoch(epoch)
        for step in range(trainer.plan.steps):
            low, high = trainer.plan.part(step, trainer.world.rank)
            trainer.store.remember(order_N[low:high], probs_BC[: high - low])
        trainer.history.samples = 1
        own = []
        for place, name, label in (
            (trainer.store, "begin_epoch", "past predictions: fsync, index, manifest"),
            (trainer, "_evaluate", "evaluate 10,000 images"),
            (trainer.saver, "save", "checkpoint: state, fsync, retention"),
            (trainer, "_export", "weights for plain torch"),
        ):
            own.append((place, name, getattr(place, name)))
            setattr(place, name, stages.around(label, own[-1][2]))
        begun = time.time()
        trainer.finish_epoch(epoch, constants, trainer.plan.trained, 1.0)
        stages.seconds["all of it"] = time.time() - begun
        for place, name, method in own:
            setattr(place, name, method)
        found.append(stages.seconds)
    return found[1:]  # the first has no older generation to replace


def table_of(rounds: list[dict[str, float]]) -> str:
    from paired import table

    whole = np.median([sum(found.values()) for found in rounds])
    lines = [["from launch to the first step", "s", "share"]]
    for name in rounds[0]:
        seconds = float(np.median([found[name] for found in rounds]))
        lines.append([name, f"{seconds:.2f}", f"{seconds / whole:.0%}"])
    return table([*lines, ["all", f"{whole:.2f}", ""]])


def end_of(rounds: list[dict[str, float]]) -> str:
    from paired import table

    lines = [["at an epoch's end training waits for", "s"]]
    for name in rounds[0]:
        lines.append([name, f"{np.median([found[name] for found in rounds]):.2f}"])
    return table(lines)


def launch(processes: int, flags: list[str], place: Path, ends: int) -> dict[str, Any]:
    """One job, to its end."""
    out = place / "found.json"
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    command = [*torchrun, f"--nproc-per-node={processes}", __file__, "--inside", str(out)]
    environment = {
        **os.environ,
        "BENCH_LAUNCHED": json.dumps(time.time()),
        "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
    }
    if ends:
        environment["BENCH_ENDS"] = str(ends)
    subprocess.run([*command, "--", *flags], check=True, env=environment)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def seconds_of(command: list[str], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        begun = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.time() - begun)
    return float(np.median(taken))


def main() -> None:
    if "--inside" in sys.argv:
        first_step(Path(sys.argv[2]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    help_s = seconds_of([sys.executable, str(ROOT / "train.py"), "--help"], arguments.rounds)
    print(f"train.py --help: {help_s:.2f} s\n")
    sys.path[:0] = [str(ROOT)]
    from tests.photos import make_folder

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        shape = {"n": N, "classes": CLASSES, "side": 8, "validation": 10_000}
        (place / "shape.json").write_text(json.dumps(shape))
        for part in ("train", "val"):
            make_folder(place / "photos" / part, classes=2, per_class=32)
        common = ["--method.name=pskd", "--train.epochs=100", "--schedule.milestones=[]"]
        arrays = ["--data.name=random", f"--data.root={place}", "--model.name=preact_resnet18"]
        arrays += ["--train.batch_size=256"]
        photos = ["--data.name=imagefolder", f"--data.root={place / 'photos'}"]
        photos += ["--model.name=resnet18", "--train.batch_size=16", "--data.image_size=64"]
        photos += ["--data.validation_resize=72"]
        for label, flags in (("arrays", arrays), ("a folder of JPEGs", photos)):
            found = []
            for number in range(arguments.rounds):
                run = f"--run.dir={place / f'{label}-{number}'}"
                ends = arguments.rounds if label == "arrays" and not number else 0
                found.append(launch(arguments.processes, [*common, *flags, run], place, ends))
            print(f"{label}, {arguments.processes} processes\n")
            print(table_of([one["start"] for one in found]), flush=True)
            if "ends" in found[0]:
                print(f"\n{end_of(found[0]['ends'])}\n", flush=True)


if __name__ == "__main__":
    main()
