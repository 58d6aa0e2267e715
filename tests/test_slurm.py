"""scripts/slurm.sbatch on a Slurm of two nodes, each with a network, a host name and an slurmd."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.hosts import ADDRESSES, two_hosts
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
from tests.system import needs_root

pytestmark = [
    pytest.mark.slow,
    needs_root,
    pytest.mark.skipif(
        shutil.which("slurmctld") is None or shutil.which("ip") is None,
        reason="needs slurm-wlm and iproute2",
    ),
]
NODES = ("node0", "node1")
FLAGS = (
    "--recipe=digits-pskd",
    "--data.limit=256",
    "--train.batch_size=32",
    "--train.epochs=6",
    "--schedule.milestones=[3]",
    "--checkpoint.every_steps=3",
    "--run.threads=1",
    "--run.timeout_s=60",
)
CONFIGURATION = """
ClusterName=pskd
SlurmctldHost=node0
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
StateSaveLocation={at}/state
SlurmctldPidFile={at}/slurmctld.pid
SlurmctldLogFile={at}/slurmctld.log
SlurmdSpoolDir={at}/spool-%n
SlurmdPidFile={at}/%n.pid
SlurmdLogFile={at}/%n.log
NodeName=node0 NodeAddr={first} CPUs=2
NodeName=node1 NodeAddr={second} CPUs=2
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 OverSubscribe=EXCLUSIVE
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF OverSubscribe=EXCLUSIVE
"""


class Cluster:
    """Commands and jobs of a Slurm that runs."""

    def __init__(self, hosts, at):
        self._hosts, self.at = hosts, at
        self._servers = []

    def prefix(self, node):
        """Before a command: it runs on that node."""
        script = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        inside = ["unshare", "--mount", "--uts", "sh", "-c", script, NODES[node]]
        # `ip netns exec` would hide the control groups, without which slurmd does not start.
        enter = ["nsenter", f"--net=/run/netns/{self._hosts.names[node]}"]
        return [*enter, *inside, str(self.at / "hosts")]

    def serve(self, command):
        """Start a server on a node; a munged may run already."""
        self._servers.append(
            subprocess.Popen(
                command,
                env={**os.environ, "SLURM_CONF": str(self.at / "slurm.conf")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def ask(self, *command):
        """The output of a command on the first node."""
        done = subprocess.run(
            [*self.prefix(0), *command],
            env={
                **os.environ,
                "SLURM_CONF": str(self.at / "slurm.conf"),
                "PSKD_BIN": str(Path(sys.executable).parent),
                "PROCESSES": "1",
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, run_dir, *options, flags=FLAGS):
        """A job of two nodes; returns its number."""
        log = run_dir.with_name("job-%j.log")
        script = ["scripts/slurm.sbatch", *flags, "--run.dir", str(run_dir)]
        return self.ask("sbatch", "--parsable", "--nodes=2", f"--output={log}", *options, *script)

    def state(self, job):
        return self.ask("scontrol", "show", "job", job).split("JobState=")[1].split()[0]

    def wait(self, job, *states):
        wait_until(lambda: self.state(job) in states, self.logs)
        return self.state(job)

    def logs(self):
        """For the message of a failed test."""
        paths = [*self.at.glob("*.log")]
        return "\n".join(f"{path}:\n{path.read_text()[-3000:]}" for path in paths)

    def stop(self):
        for server in reversed(self._servers):
            server.terminate()
        for server in self._servers:
            server.wait(30)


def wait_until(is_so, explain):
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, explain()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    at = tmp_path_factory.mktemp("slurm")
    (at / "state").mkdir()
    names = "\n".join(f"{address} {name}" for address, name in zip(ADDRESSES, NODES, strict=True))
    (at / "hosts").write_text(f"127.0.0.1 localhost\n{names}\n")
    (at / "slurm.conf").write_text(
        CONFIGURATION.format(at=at, first=ADDRESSES[0], second=ADDRESSES[1])
    )
    with two_hosts(f"s{os.getpid() % 10000}") as hosts:
        slurm = Cluster(hosts, at)
        try:
            if not any(process.name() == "munged" for process in psutil.process_iter()):
                Path("/run/munge").mkdir(exist_ok=True)
                shutil.chown("/run/munge", "munge", "munge")
                slurm.serve(["runuser", "-u", "munge", "--", "munged", "--foreground"])
            slurm.serve([*slurm.prefix(0), "slurmctld", "-D"])
            for node, name in enumerate(NODES):
                slurm.serve([*slurm.prefix(node), "slurmd", "-D", "-N", name])
            deadline = time.monotonic() + 60
            while True:
                try:
                    if slurm.ask("sinfo", "--noheader", "-N", "-o", "%t").split() == ["idle"] * 4:
                        break
                except AssertionError:
                    pass
                assert time.monotonic() < deadline, slurm.logs()
                time.sleep(0.5)
            yield slurm
        finally:
            slurm.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """weights_sha256 of two processes on one host."""
    run_dir = tmp_path_factory.mktemp("one-host") / "run"
    job = train(run_dir, *FLAGS)
    assert job.process.returncode == 0, job.output()
    return result(run_dir)["weights_sha256"]


def wait_for_checkpoint(run_dir, explain):
    wait_until((run_dir / "checkpoints" / "000001-00000003").exists, explain)


def test_two_nodes_train_what_one_host_does(cluster, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, "--cpus-per-task=2")
    log = tmp_path / f"job-{job}.log"
    wait_for_checkpoint(run_dir, lambda: cluster.logs() + log.read_text())
    assert {len(rank.cpu_affinity()) for rank in processes_of(run_dir)} == {2}
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log.read_text()
    assert result(run_dir)["weights_sha256"] == undisturbed
    assert len(metrics(run_dir)) == 6


@pytest.mark.parametrize("how", ["time is up", "pre-empted", "a rank is killed"])
def test_a_job_that_is_interrupted_finishes_the_run(cluster, tmp_path, undisturbed, how):
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir)
    log = tmp_path / f"job-{job}.log"
    wait_for_checkpoint(run_dir, lambda: cluster.logs() + log.read_text())
    if how == "time is up":  # the signal that Slurm sends then, to the same processes
        cluster.ask("scancel", "--signal=USR1", job)
    elif how == "pre-empted":
        cluster.ask("sbatch", "--partition=high", "--nodes=2", "--output=none", "--wrap=sleep 1")
    else:
        victims = [p for p in processes_of(run_dir) if p.environ().get("RANK") == "1"]
        victims[0].send_signal(signal.SIGKILL)
    if how == "a rank is killed":
        assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log.read_text()
        assert "starting again" in log.read_text()
    else:
        wait_until(lambda: status(run_dir)["state"] == "stopped", log.read_text)
        wait_until(lambda: cluster.state(job) != "RUNNING", log.read_text)
        assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED", log.read_text()
    assert result(run_dir)["weights_sha256"] == undisturbed
    wait_for_no_process(run_dir)


def test_a_job_that_is_cancelled_saves_and_stays_cancelled(cluster, tmp_path, undisturbed):
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir)
    log = tmp_path / f"job-{job}.log"
    wait_for_checkpoint(run_dir, lambda: cluster.logs() + log.read_text())
    cluster.ask("scancel", job)
    wait_until(lambda: status(run_dir)["state"] == "stopped", log.read_text)
    wait_for_no_process(run_dir)
    time.sleep(12)  # longer than a job that is queued again has to wait
    assert cluster.state(job) == "CANCELLED", log.read_text()
    again = cluster.submit(run_dir)  # by hand it goes on
    assert cluster.wait(again, "COMPLETED", "FAILED", "CANCELLED") == "COMPLETED"
    assert result(run_dir)["weights_sha256"] == undisturbed


def test_a_run_that_cannot_begin_is_not_queued_again(cluster, tmp_path):
    run_dir = tmp_path / "run"
    job = cluster.submit(run_dir, flags=("--recipe=digits-pskd", "--optimizer.lrr=1"))
    assert cluster.wait(job, "COMPLETED", "FAILED", "CANCELLED") == "FAILED"
    said = (tmp_path / f"job-{job}.log").read_text()
    assert "optimizer.lrr" in said and "gave up" in said
    kill(processes_of(run_dir))
