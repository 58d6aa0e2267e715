"""Launched on two hosts: the same weights as by two processes on one, and nothing hangs."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.hosts import ADDRESSES, SSH_PORT, ssh_servers, two_hosts
from tests.launches import (
    DEADLINE_S,
    ROOT,
    kill,
    metrics,
    processes_of,
    result,
    status,
    train,
    wait_for_no_process,
)
from tests.photos import make_folder
from tests.system import needs_ip, needs_root

pytestmark = [
    pytest.mark.slow,
    needs_root,
    needs_ip,
]
LOOP = [str(ROOT / "scripts/run_until_done.sh")]
EPOCHS = 12  # a signal takes a second to come through ssh, four epochs less
COMMON = (
    "--method.name=pskd",
    "--model.name=preact_resnet8_w16",
    "--train.batch_size=32",
    f"--train.epochs={EPOCHS}",
    "--schedule.milestones=[3]",
    "--checkpoint.every_steps=3",
    "--run.threads=1",
    "--run.timeout_s=15",
    "--run.lock_wait_s=10",
)
ARRAYS = ("--data.name=digits", "--data.crop_padding=1", "--data.limit=256")


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for split, seed, count in (("train", 0, 60), ("val", 1, 5)):
        make_folder(root / split, classes=3, per_class=count, median_side=48, seed=seed)
    folder = (
        "--data.name=imagefolder",
        "--data.image_size=32",
        "--data.validation_resize=36",
        f"--data.root={root}",
    )
    return {"arrays": (*COMMON, *ARRAYS), "folder": (*COMMON, *folder)}


@pytest.fixture(scope="module")
def on_one_host(flags_of, tmp_path_factory):
    """weights_sha256 of two processes on one host, by data set."""
    done = {}

    def of(data):
        if data not in done:
            run_dir = tmp_path_factory.mktemp("one-host") / "run"
            job = train(run_dir, *flags_of[data])
            assert job.process.returncode == 0, job.output()
            done[data] = result(run_dir)["weights_sha256"]
        return done[data]

    return of


@pytest.fixture(scope="module")
def hosts():
    with two_hosts(str(os.getpid())[-4:]) as made:
        yield made


class Launch:
    """A line of the README, on the hosts that it is for. line: a part of it. options: besides."""

    def __init__(self, hosts, run_dir, flags, private=False, before=(), *, line, options=()):
        block = re.search(r"```sh two-nodes\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        (text,) = [found for found in block[1].splitlines() if line in found]
        on = (0,) if "alone" in text else (0, 1)
        self.hosts, self.run_dir = hosts, run_dir
        self.logs = [run_dir.with_name(f"host-{host}.log") for host in on]
        hostfile = run_dir.with_name("hostfile")
        hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
        environment = {
            **os.environ,
            "PSKD_BIN": str(Path(sys.executable).parent),
            "END_S": "40",  # of the loop
            "STALE_S": "25",
        }
        self.processes = []
        for host, log in zip(on, self.logs, strict=True):
            own = {"R": str(host), "node0": f"{ADDRESSES[0]}:29511", "hosts": str(hostfile)}
            script, *words = [own.get(word, word) for word in shlex.split(text, comments=True)]
            launch = [str(ROOT / script), *options, *words[: words.index("--") + 1]]
            command = [*before, *launch, "--run.dir", str(run_dir), *flags]
            with log.open("a") as file:
                self.processes.append(
                    subprocess.Popen(
                        [*hosts.prefix(host, run_dir if private else None), *command],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                )

    def wait(self):
        return [process.wait(DEADLINE_S) for process in self.processes]

    def output(self):
        return "\n".join(log.read_text() for log in self.logs)


Static = partial(Launch, line="--master node0 --node-rank", options=("--processes", "1"))
C10d = partial(Launch, line="c10d", options=("--processes", "1"))
NoSsh = partial(Launch, line="--no-ssh")
Pdsh = partial(Launch, line="--hostfile hosts -- ", options=("--ssh-port", str(SSH_PORT)))
NAMES = {"static": Static, "c10d": C10d, "no-ssh": NoSsh}


def disk_of(run_dir, private):
    """Where rank 0's files are."""
    return run_dir.with_name("disk-of-host-0") if private else run_dir


@pytest.mark.parametrize("data", ["arrays", "folder"])
@pytest.mark.parametrize("private", [False, True], ids=["shared", "node-local"])
@pytest.mark.parametrize("launcher", NAMES)
def test_two_hosts_train_what_one_does(
    hosts, tmp_path, flags_of, on_one_host, launcher, private, data
):
    run_dir = tmp_path / "run"
    job = NAMES[launcher](hosts, run_dir, flags_of[data], private)
    assert job.wait() == [0, 0], job.output()
    found = disk_of(run_dir, private)
    assert result(found)["weights_sha256"] == on_one_host(data)
    assert len(metrics(found)) == EPOCHS


def test_a_first_host_whose_own_name_is_loopback_is_named_by_its_address(hosts, tmp_path):
    """As Debian writes into /etc/hosts. The launcher only shows what it is given."""
    (tmp_path / "python").symlink_to(sys.executable)
    (tmp_path / "deepspeed").symlink_to("/bin/echo")
    (tmp_path / "hosts").write_text(f"localhost slots=1\n{ADDRESSES[1]} slots=1\n")
    script = [str(ROOT / "scripts/deepspeed.sh"), "--hostfile", str(tmp_path / "hosts")]
    command = [*script, "--no-ssh", "--node-rank", "0", "--", "--run.dir", "x"]
    environment = {**os.environ, "PSKD_BIN": str(tmp_path)}
    done = subprocess.run(
        [*hosts.prefix(0), *command], env=environment, capture_output=True, text=True, check=True
    )
    assert f"--master_addr {ADDRESSES[0]} --master_port 29500" in done.stdout


def in_mid_run(job, found):
    deadline = time.monotonic() + DEADLINE_S
    while not (found / "checkpoints" / "000001-00000003").exists():
        assert all(process.poll() is None for process in job.processes), job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)


def trainers(run_dir):
    """The training processes, by rank, and not their launchers."""
    found = [p for p in processes_of(run_dir) if "RANK" in p.environ()]
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


@pytest.mark.parametrize("private", [False, True], ids=["shared", "node-local"])
@pytest.mark.parametrize("what", ["rank", "launcher", "cable", "stall"])
def test_a_fault_ends_both_hosts_and_the_run_goes_on_to_the_same_weights(
    hosts, tmp_path, flags_of, on_one_host, what, private
):
    run_dir = tmp_path / "run"
    job = Static(hosts, run_dir, flags_of["arrays"], private)
    found = disk_of(run_dir, private)
    in_mid_run(job, found)
    if what == "rank":
        kill(trainers(run_dir)[1:])
    elif what == "launcher":
        job.processes[1].send_signal(signal.SIGKILL)
    elif what == "cable":
        hosts.cut()
    else:
        trainers(run_dir)[1].send_signal(signal.SIGSTOP)
    try:
        if what == "stall":  # its launcher sees nothing, and waits: the restart loop does not
            assert job.processes[0].wait(DEADLINE_S) != 0, job.output()
            job.processes[1].kill()
        assert all(code != 0 for code in job.wait()), job.output()
        wait_for_no_process(run_dir)
    finally:
        hosts.mend()
    assert status(found)["state"] == "failed", job.output()
    if private:
        shutil.rmtree(run_dir.with_name("disk-of-host-1"))  # costs nothing
    again = Static(hosts, run_dir, flags_of["arrays"], private)
    assert again.wait() == [0, 0], again.output()
    assert result(found)["weights_sha256"] == on_one_host("arrays")


@pytest.mark.parametrize("private", [False, True], ids=["shared", "node-local"])
@pytest.mark.parametrize("what", ["rank", "launcher", "cable", "stall"])
@pytest.mark.parametrize("launcher", NAMES)
def test_restarted_on_both_hosts_the_run_finishes_to_the_same_weights(
    hosts, tmp_path, flags_of, on_one_host, launcher, what, private
):
    run_dir = tmp_path / "run"
    job = NAMES[launcher](hosts, run_dir, flags_of["arrays"], private, before=LOOP)
    found = disk_of(run_dir, private)
    in_mid_run(job, found)
    victim = trainers(run_dir)[1]
    if what == "rank":
        victim.kill()
    elif what == "launcher":
        victim.parent().kill()
    elif what == "cable":
        hosts.cut()
        try:
            deadline = time.monotonic() + DEADLINE_S
            while status(found)["state"] == "running":
                assert time.monotonic() < deadline, job.output()
                time.sleep(0.1)
        finally:
            hosts.mend()
    else:
        victim.send_signal(signal.SIGSTOP)
    assert job.wait() == [0, 0], job.output()
    assert "starting again" in job.output()
    assert result(found)["weights_sha256"] == on_one_host("arrays")
    wait_for_no_process(run_dir)


# --- pdsh: both hosts are started from one --------------------------------------------------------

needs_pdsh = pytest.mark.skipif(
    shutil.which("pdsh") is None or not Path("/usr/sbin/sshd").exists(),
    reason="needs pdsh and openssh-server",
)


@pytest.fixture
def pdsh(hosts, tmp_path, monkeypatch):
    """A launch by pdsh, into a run directory that is shared or not."""
    with ExitStack() as stack:

        def start(flags, private, before=()):
            run_dir = tmp_path / "run"
            servers = ssh_servers(hosts, tmp_path / "ssh", run_dir if private else None)
            programs = stack.enter_context(servers)
            monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
            return Pdsh(hosts, run_dir, flags, private, before), disk_of(run_dir, private)

        yield start


@needs_pdsh
@pytest.mark.parametrize("data", ["arrays", "folder"])
@pytest.mark.parametrize("private", [False, True], ids=["shared", "node-local"])
def test_pdsh_starts_both_hosts_from_one(pdsh, flags_of, on_one_host, private, data):
    job, found = pdsh(flags_of[data], private)
    assert job.wait() == [0], job.output()
    assert result(found)["weights_sha256"] == on_one_host(data)
    assert len(metrics(found)) == EPOCHS


@needs_pdsh
@pytest.mark.parametrize(
    ("how", "private"),
    [(signal.SIGKILL, False), (signal.SIGKILL, True), (signal.SIGSTOP, False)],
    ids=["killed-shared", "killed-node-local", "stalled-shared"],
)
def test_under_pdsh_a_lost_rank_ends_both_hosts_and_the_loop_finishes(
    pdsh, flags_of, on_one_host, how, private
):
    job, found = pdsh(flags_of["arrays"], private, before=LOOP)
    in_mid_run(job, found)
    trainers(job.run_dir)[1].send_signal(how)
    assert job.wait() == [0], job.output()
    assert "starting again" in job.output()
    assert result(found)["weights_sha256"] == on_one_host("arrays")
    wait_for_no_process(job.run_dir, within_s=60)  # DeepSpeed kills a stopped rank after 30 s


@needs_pdsh
def test_under_pdsh_a_signal_to_the_loop_saves_and_stops_both_hosts(pdsh, flags_of, on_one_host):
    job, found = pdsh(flags_of["arrays"], False, before=LOOP)
    in_mid_run(job, found)
    job.processes[0].send_signal(signal.SIGTERM)
    assert job.wait() == [75], job.output()
    assert status(found)["state"] == "stopped"
    wait_for_no_process(job.run_dir)
    again = Pdsh(job.hosts, job.run_dir, flags_of["arrays"])
    assert again.wait() == [0], again.output()
    assert result(found)["weights_sha256"] == on_one_host("arrays")
