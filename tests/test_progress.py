"""What is seen while a run trains: a bar on a terminal, plain lines elsewhere."""

import fcntl
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest

from pskd import progress
from pskd.progress import Progress, is_slow_disk, readable
from tests.launches import ROOT

SCRIPT = """
import logging, time
logging.basicConfig()
logging.getLogger("pskd").setLevel({level})
from pskd.progress import Progress
with Progress("epoch 1/2", 100, {{"alpha": 0.4}}) as bar:
    for _ in range(4):
        time.sleep(0.15)
        bar.advance(25, 1.5, {{"data": 0.0, "store": 1e3}})
"""

SLOWED = """
import os, time
pwrite = os.pwrite
def slow(*args):
    time.sleep(0.1)
    return pwrite(*args)
os.pwrite = slow
from pskd.entry import run
run()
"""


def on_a_terminal(level: int) -> str:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    script = SCRIPT.format(level=level)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:
        pass  # the other end is closed
    assert process.wait() == 0
    os.close(ours)
    return shown.decode()


def test_a_terminal_shows_a_bar_with_rate_loss_alpha_and_waits():
    shown = on_a_terminal(logging.INFO)
    assert "epoch 1/2:" in shown
    assert re.search(
        r"images/s, loss=1\.5000, alpha=0\.4, data wait=0%, store wait=\d{5,}%\]", shown
    )


def test_other_ranks_show_nothing():
    assert on_a_terminal(logging.ERROR) == ""


def test_without_a_terminal_there_are_plain_lines(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    caplog.set_level(logging.INFO, "pskd")
    with Progress("epoch 1/2", 100, {"alpha": 0.4}) as bar:
        time.sleep(0.01)
        bar.advance(25, 1.5, {"data": 0.0})
    (line,) = caplog.messages
    assert line.startswith("epoch 1/2: 25 of 100 images, loss 1.5000, alpha 0.4, ")
    assert line.endswith(" images/s, data wait 0%")


MEASURED = {"top1_error": 5.0, "top5_error": 1.25, "nll": 0.5, "ece": 2.0, "aurc": 7.0}


@pytest.mark.parametrize(
    ("measured", "text"),
    [
        (
            MEASURED,
            "loss 1.0000, alpha 0.40, top-1 error 5.00 %, top-5 error 1.25 %, NLL 0.5000, "
            "ECE 2.00 %, AURC 7.00, 90 images/s",
        ),
        (
            {**MEASURED, "top5_error": None},
            "loss 1.0000, alpha 0.40, top-1 error 5.00 %, NLL 0.5000, ECE 2.00 %, AURC 7.00, "
            "90 images/s",
        ),
        (dict.fromkeys(MEASURED), "loss 1.0000, alpha 0.40, 90 images/s"),
    ],
)
def test_a_line_is_readable(measured, text):
    line = {"train_loss": 1.0, "alpha": 0.4, "images_per_s": 90.2, **measured}
    assert readable(line) == text


@pytest.mark.parametrize(("waited_s", "slow"), [(0.0, False), (0.9, False), (1.1, True)])
def test_a_disk_is_slow_where_waiting_takes_a_hundredth_of_the_time(waited_s, slow):
    assert is_slow_disk(waited_s, train_s=100.0) == slow


def test_a_run_says_that_the_disk_of_the_store_is_too_slow(tmp_path):
    flags = (
        "--recipe=digits-pskd",
        "--data.limit=1024",
        "--train.epochs=1",
        "--schedule.milestones=[]",
        "--run.threads=1",
        f"--run.dir={tmp_path / 'run'}",
    )
    done = subprocess.run(
        [sys.executable, "-c", SLOWED, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"epoch 1/1: training waited \S+ of \S+ s for the disk of the prediction store",
        done.stderr,
    ), done.stderr
