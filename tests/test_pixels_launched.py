"""Launched by torchrun, at the input of the network: the same images on any number of ranks."""

import signal
from itertools import chain

import pytest

from tests.launches import ROOT, Job, wait_for_no_process
from tests.photos import make_folder

EPOCHS, TRAIN, VALIDATION, BATCH = 2, 41, 203, 16
FLAGS = (
    "--data.name=imagefolder",
    "--data.image_size=40",
    "--data.validation_resize=44",
    "--data.augment=pskd-imagenet",
    "--data.flip=true",
    "--model.name=watching",
    "--method.name=baseline",
    f"--train.batch_size={BATCH}",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[]",
    "--run.threads=1",
    "--checkpoint.every_steps=1",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    make_folder(root / "train", classes=1, per_class=TRAIN - 20, median_side=64)
    make_folder(root / "more", classes=2, per_class=20, median_side=64, seed=2)
    (root / "more" / "class001").rename(root / "train" / "class001")
    make_folder(root / "val", classes=1, per_class=VALIDATION - 100, median_side=48, seed=1)
    make_folder(root / "extra", classes=2, per_class=100, median_side=48, seed=3)
    (root / "extra" / "class001").rename(root / "val" / "class001")
    return root


class Launch:
    """A run, and what its network has seen."""

    def __init__(self, tmp_path, folder, name, ranks, *flags):
        self.seen = tmp_path / f"seen-{name}"
        self.seen.mkdir()
        program = tmp_path / "watch.py"
        program.write_text(
            f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from pskd.launch import die_with_launcher\ndie_with_launcher()\n"
            "from pskd.models import MODELS\n"
            "MODELS['watching'] = ('tests.watching_network', {})\n"
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        )
        self.run_dir = tmp_path / name
        self.ranks = ranks
        self.options = {"processes": ranks, "program": program, "env": {"SEEN": str(self.seen)}}
        self.flags = (*FLAGS, f"--data.root={folder}", *flags)
        self.job = Job(self.run_dir, *self.flags, **self.options)

    def again(self, *flags):
        self.job = Job(self.run_dir, *self.flags, *flags, **self.options)

    def finished(self):
        assert self.job.wait() == 0, self.job.output()
        return self

    def calls(self, mode, rank):
        """Of each process that was this rank, in the order of their starts: lists of hashes."""
        files = sorted(
            self.seen.glob(f"{mode}-{rank}-*.txt"), key=lambda path: path.stat().st_mtime
        )
        return [[line.split() for line in path.read_text().splitlines()] for path in files]

    def batches(self):
        """The global batches of an undisturbed run: ranks take parts in their order."""
        (first,), *others = [self.calls("training", rank) for rank in range(self.ranks)]
        parts = [first, *(one for (one,) in others)]
        return [list(chain(*step)) for step in zip(*parts, strict=True)]

    def validated(self):
        """All images that were evaluated, of each epoch."""
        files = [calls for rank in range(self.ranks) for calls in self.calls("evaluation", rank)]
        return sorted(image for calls in files for call in calls for image in call)


@pytest.mark.slow
def test_images_are_the_same_whatever_launches_them(tmp_path, folder):
    reference = Launch(
        tmp_path, folder, "one", 1, "--data.threads=1", "--data.prefetch=1"
    ).finished()
    batches = reference.batches()
    assert [len(batch) for batch in batches] == [16, 16, 9] * EPOCHS
    assert len({image for batch in batches for image in batch}) == EPOCHS * TRAIN
    validated = reference.validated()
    assert len(validated) == EPOCHS * VALIDATION
    assert len(set(validated)) == VALIDATION
    for name, ranks, threads, prefetch in (
        ("two", 2, 2, 3),
        ("three", 3, 2, 1),
        ("four", 4, 1, 3),
    ):
        flags = (f"--data.threads={threads}", f"--data.prefetch={prefetch}")
        other = Launch(tmp_path, folder, name, ranks, *flags).finished()
        assert other.batches() == batches, name
        assert other.validated() == validated, name


@pytest.mark.slow
def test_images_are_the_same_after_a_kill(tmp_path, folder):
    reference = Launch(tmp_path, folder, "one", 1).finished().batches()
    killed = Launch(tmp_path, folder, "killed", 2)
    killed.job.wait_until((killed.run_dir / "checkpoints" / "000000-00000002").exists)
    killed.job.process.send_signal(signal.SIGKILL)
    killed.job.wait()
    wait_for_no_process(killed.run_dir)
    killed.again("--data.threads=2", "--data.prefetch=3")
    killed.finished()
    for rank in range(2):
        first, second = killed.calls("training", rank)
        at = len(reference) - len(second)  # where the second start began
        assert at >= 2
        for step, calls in ((0, first), (at, second)):
            for k, images in enumerate(calls):
                whole = reference[step + k]
                assert images == (whole[: len(images)] if rank == 0 else whole[-len(images) :])
