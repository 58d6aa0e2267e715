"""Memory of a rank with and without past predictions, by the real trainer at ImageNet's shape.

    python scripts/bench/memory.py                       # 1,281,167 samples, 1,000 classes

A network of one layer on images of 4 x 4 pixels, so that an epoch takes a minute; two processes
(one on a single GPU), three epochs: predictions are written, read, and replaced. Anonymous memory
is what a process holds; pages of the store's files are the system's cache, which it takes back when
it needs the room.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from paired import table

ROOT = Path(__file__).parents[2]
BATCH, SIDE, EPOCHS = 256, 4, 3
PROCESSES = min(2, torch.cuda.device_count() or 2)


def build(num_classes: int) -> Any:
    """`MODELS["one-layer"] = ("memory", {})`."""
    from torch import nn

    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, num_classes))


def resident() -> dict[str, float]:
    """MB of this process, by kind; peak: of all kinds together."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"anonymous": "RssAnon", "files": "RssFile", "peak": "VmHWM"}
    return {kind: int(lines[name].split()[0]) * 1024 / 1e6 for kind, name in kinds.items()}


def train(out: Path, flags: list[str]) -> None:
    """One rank; what it holds at its fullest: at each epoch's last step."""
    from pskd import command_line, world
    from pskd.data.catalog import DATASETS
    from pskd.job import Job
    from pskd.models import MODELS

    DATASETS["random"] = "array_folder"
    MODELS["one-layer"] = ("memory", {})
    config = command_line.load(flags)
    here = world.start(config.run.timeout_s)
    trainer, position = Job(config).prepare(here)
    trainer.begin(position)
    most = resident()
    for epoch in range(EPOCHS):
        constants = trainer.method.begin_epoch(epoch, EPOCHS)
        trainer.train_epoch(epoch, 0, constants)
        most = {kind: max(size, most[kind]) for kind, size in resident().items()}
        trainer.finish_epoch(epoch, constants, trainer.plan.trained, 1.0)
        most = {kind: max(size, most[kind]) for kind, size in resident().items()}
    if here.rank == 0:
        out.write_text(json.dumps(most))
    trainer.close()
    world.stop(here)


def launch(method: list[str], place: Path) -> dict[str, float]:
    """A job to its end."""
    out = place / "found.json"
    flags = [
        *method,
        "--data.name=random",
        f"--data.root={place}",
        "--model.name=one-layer",
        f"--train.batch_size={BATCH * PROCESSES}",
        f"--train.epochs={EPOCHS}",
        "--schedule.milestones=[]",
        f"--run.dir={place / 'run'}",
    ]
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone"]
    command = [*torchrun, f"--nproc-per-node={PROCESSES}", __file__, "--inside", str(out), "--"]
    paths = f"{ROOT}:{Path(__file__).parent}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *flags], check=True, env=environment)
    subprocess.run(["rm", "-rf", str(place / "run")], check=True)
    found: dict[str, float] = json.loads(out.read_text())
    return found


def main() -> None:
    if "--inside" in sys.argv:
        train(Path(sys.argv[2]), sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=1_281_167)
    parser.add_argument("--classes", type=int, default=1_000)
    parser.add_argument("--dir", type=Path, help="where to write (default: /tmp)")
    arguments = parser.parse_args()
    n, classes = arguments.samples, arguments.classes
    lines = [["a rank holds, MB", "anonymous memory", "pages of files", "peak of both"]]
    with tempfile.TemporaryDirectory(dir=arguments.dir) as temporary:
        place = Path(temporary)
        shape = {"n": n, "classes": classes, "side": SIDE}
        (place / "shape.json").write_text(json.dumps(shape))
        for label, method in (
            ("baseline", ["--method.name=baseline"]),
            ("PS-KD, float16", ["--method.name=pskd"]),
            ("PS-KD, float32", ["--method.name=pskd", "--store.encoding=float32"]),
        ):
            found = launch(method, place)
            lines.append([label, *(f"{found[k]:.0f}" for k in ("anonymous", "files", "peak"))])
    table_mb = n * classes * 4 / 1e6
    lines.append(["a table in every process (computed)", f"+ {table_mb:.0f}", "", ""])
    print(f"{n:,} samples, {classes:,} classes, {PROCESSES} processes\n\n{table(lines)}")


if __name__ == "__main__":
    main()
