"""`pskd doctor`: what keeps a training from working is on its page, with the remedy."""

import contextlib
import fcntl
import io
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pskd import command_line, launch
from pskd.cli import main
from pskd.doctor import machine, network, software, storage
from pskd.doctor.checks import look
from pskd.doctor.network import Stamp
from pskd.doctor.page import OK, WARNING, WRONG, Line, Place, render
from tests.forked import doctor
from tests.hosts import ADDRESSES, two_hosts
from tests.launches import DEADLINE_S, ROOT
from tests.photos import make_folder
from tests.system import mounted, needs_ip, needs_root

DIGITS = "--recipe=digits-pskd"


def lines_of(text):
    """topic -> (state, text, remedy) of a page's lines; of equal topics the last."""
    found = {}
    for line in text.splitlines():
        if line.startswith((OK, WARNING, WRONG)):
            topic = line[9:26].strip()
            found[topic] = (line[:9].strip(), line[26:], "")
        elif line.startswith(" " * 26):
            found[topic] = (*found[topic][:2], line.strip())
    return found


# --- a machine -----------------------------------------------------------------------------------


def test_a_machine_that_can_train_is_told_so_and_is_left_as_it_was(tmp_path):
    job = doctor(tmp_path / "digits", DIGITS)
    assert job.process.returncode == 0, job.output()
    page = lines_of(job.output())
    assert {state for state, _, _ in page.values()} <= {OK, WARNING}
    for topic in ("Python", "torch", "deepspeed", "cores", "shared memory", "interface", "store"):
        assert topic in page
    assert "1437 training and 360 validation images" in page["data"][1]
    assert "3 generations of predictions" in page["disk"][1]
    assert "are free" in page["disk"][1]
    assert "decodes on" in page["DALI"][1]
    assert job.output().splitlines()[0] == "1 rank on 1 node"
    assert "Ready to train" in job.output()
    assert list(tmp_path.iterdir()) == [job.log]


def test_torchrun_gets_one_page_of_both_ranks(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "pskd.cli", "doctor", DIGITS, "--run.dir", str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    page = lines_of(done.stdout)
    assert done.stdout.count("2 ranks on 1 node\n") == done.stdout.count("Ready to train") == 1
    assert "ranks 0-1\n" in done.stdout
    assert "by this job; 2 ranks met there" in page["master"][1]
    assert "gloo, 1.0 MB over 2 ranks" in page["all-reduce"][1]
    assert page["store"] == (OK, "all 2 ranks see one run directory: nothing has to travel", "")


@needs_root
def test_a_disk_that_is_too_small(tmp_path):
    with mounted(tmp_path / "disk") as small:
        job = doctor(small.path / "run", DIGITS)
        assert job.process.returncode == 1
        page = lines_of(job.output())
        assert page["disk"][0] == WRONG
        assert f"run directory {small.path / 'run'} will need" in page["disk"][1]
        assert "--run.dir" in page["disk"][1]
        assert "Not ready: 1 line above" in job.output()
        assert page["file system"][:2] == (WARNING, f"tmpfs, tmpfs at {small.path}")


@needs_root
def test_a_directory_that_cannot_be_written(read_only_directory):
    log = read_only_directory.with_name("run")  # the log lies beside the run directory
    log.symlink_to(read_only_directory)
    job = doctor(log, DIGITS)
    assert job.process.returncode == 1
    state, text, remedy = lines_of(job.output())["run directory"]
    assert (state, text) == (WRONG, f"{log} cannot be written: Read-only file system")
    assert "--run.dir" in remedy


def test_a_directory_in_use_names_its_owner(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("process 17 on host far\n")
        lock.flush()
        line, mark = storage.leave_mark(run, "a")
    assert line.state == WRONG
    assert "in use by process 17 on host far" in line.text
    assert storage.sees(run, "a")
    assert not storage.sees(run, "b")
    assert mark is not None
    mark.unlink()
    assert not storage.sees(run, "a")


def test_a_run_of_another_configuration(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(command_line.load([DIGITS]).to_yaml())
    job = doctor(run)  # brings its own configuration
    assert job.process.returncode == 0, job.output()
    assert lines_of(job.output())["configuration"][1].endswith("with which the run goes on")
    job = doctor(run, DIGITS, "--train.seed=7")
    assert job.process.returncode == 1
    state, text, _ = lines_of(job.output())["configuration"]
    assert state == WRONG
    assert "train.seed was 0, now 7" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.epochs=0"], "train.epochs is 0"),
        (["--train.epoch=5"], "Did you mean 'train.epochs'?"),
        (["--timeout=0"], "--timeout is 0: use 1"),
        (["--master=:1"], "--master :1: use ADDRESS"),
    ],
)
def test_what_is_refused_is_said_once_and_costs_no_look(flags, message, capsys):
    assert main(["doctor", *flags]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count(message) == 1


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit):
        main(["recipes", "--recipe", "digits-pskd"])
    assert "unrecognized arguments: --recipe" in capsys.readouterr().err


def test_data_that_are_not_there(tmp_path):
    flags = ["--recipe=fashion-mnist-2k-pskd", f"--data.root={tmp_path / 'none'}"]
    job = doctor(tmp_path / "run", *flags)
    assert job.process.returncode == 1
    assert lines_of(job.output())["data"][0] == WRONG
    job = doctor(tmp_path / "run", *flags, "--data.download=true")
    assert job.process.returncode == 0, job.output()
    state, text, _ = lines_of(job.output())["data"]
    assert (state, text[:22]) == (WARNING, "the run will fetch it:")
    assert not (tmp_path / "none").exists()


def test_a_folder_is_not_indexed_on_the_way(tmp_path):
    photos = tmp_path / "photos"
    for split in ("train", "val"):
        make_folder(photos / split, classes=2, per_class=3, median_side=24)
    flags = ["--data.name=imagefolder", f"--data.root={photos}", "--model.name=resnet18"]
    job = doctor(tmp_path / "run", *flags, "--train.batch_size=4")
    assert job.process.returncode == 0, job.output()
    state, text, _ = lines_of(job.output())["data"]
    assert state == WARNING
    assert f"pskd index {photos}" in text
    assert not (photos / "train" / ".pskd-index").exists()


def test_a_compiler_is_asked_for_only_where_it_is_needed(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert software.compiler(command_line.load([DIGITS])).state == OK
    line = software.compiler(command_line.load([DIGITS, "--engine.compile=true"]))
    assert line.state == WRONG
    assert "no-such-compiler is not found" in line.text


@needs_root
def test_shared_memory_matters_to_gpus_only(tmp_path):
    with mounted(tmp_path / "shm") as small:
        assert machine.shared_memory(0, small.path).state == OK
        assert machine.shared_memory(1, small.path).state == OK
        line = machine.shared_memory(2, small.path)
    assert line.state == WARNING
    assert "1.0 MB free of 1.0 MB" in line.text
    assert "--ipc=host" in line.remedy


def test_few_open_files_and_more_ranks_than_cores():
    assert machine.open_files(2, limit=4096).state == OK
    line = machine.open_files(8, limit=256)
    assert (line.state, line.text) == (WARNING, "at most 256")
    assert "ulimit -n 640" in line.remedy
    assert machine.cores(1).state == OK
    assert machine.cores(10_000).state == WARNING


MOUNTS = r"""overlay / overlay rw,lowerdir=/l 0 0
server:/export /data nfs4 rw 0 0
/dev/sdb1 /data/my\040disk ext4 rw 0 0
/dev/sdc1 /again ext4 rw 0 0
a@tcp:/fs /again lustre rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind", "source"),
    [
        ("/home/me", "overlay", "overlay"),
        ("/data/runs", "nfs4", "server:/export"),
        ("/data/my disk/run", "ext4", "/dev/sdb1"),
        ("/database", "overlay", "overlay"),
        ("/again", "lustre", "a@tcp:/fs"),
    ],
)
def test_the_mount_of_a_path(path, kind, source, tmp_path, monkeypatch):
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mounts").write_text(MOUNTS)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    found = storage.mount_of(Path(path))
    assert (found.kind, found.source) == (kind, source)


# --- the way to the master -----------------------------------------------------------------------


@pytest.fixture
def listener():
    """A port of this host that answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_the_port_of_the_master(listener, tmp_path):
    job = doctor(tmp_path / "run", f"--master=127.0.0.1:{listener}")
    assert job.process.returncode == 1
    state, text, remedy = lines_of(job.output())["master"]
    assert state == WRONG
    assert text == f"127.0.0.1:{listener} is this host, and the port is taken: " + os.strerror(98)
    assert "--master-port" in remedy
    assert "free; with a recipe" in lines_of(job.output())["disk"][1]


def test_a_port_that_is_free_or_closed():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert network.master("127.0.0.1", port, 5).text.endswith("the port is free")
    # 127.0.0.2 answers like another host: it is on no interface.
    line = network.master("127.0.0.2", port, 5)
    assert (line.state, line.text) == (
        OK,
        f"127.0.0.2:{port}: the host answers; nothing listens on the port yet",
    )


def test_a_master_that_answers():
    with socket.socket() as server:
        server.bind(("127.0.0.2", 0))
        server.listen()
        port = server.getsockname()[1]
        assert network.master("127.0.0.2", port, 5).text == f"127.0.0.2:{port} answers"


@pytest.mark.parametrize(
    ("address", "reason"),
    [("255.255.255.255", "is not reached"), ("no-such-host.invalid", "does not resolve")],
)
def test_a_master_that_cannot_be_reached(address, reason):
    line = network.master(address, 29500, 1)
    assert line.state == WRONG
    assert address in line.text
    assert reason in line.text
    assert line.remedy


def test_a_host_name_that_is_loopback_matters_to_several_nodes():
    assert network.host_name("localhost", several=False).state == OK
    line = network.host_name("localhost", several=True)
    assert (line.state, line.text) == (WARNING, "localhost is 127.0.0.1, loopback")
    assert "scripts/torchrun.sh" in line.remedy
    assert network.host_name("no-such-host.invalid", several=True).state == WARNING


def test_loopback_is_no_way_to_other_nodes():
    assert network.interface("127.0.0.1", several=False)[0].state == OK
    line, own = network.interface("127.0.0.1", several=True)
    assert (line.state, own) == (WRONG, "127.0.0.1")


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_do_not_come_together_end_in_time(tmp_path, rank):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start = time.monotonic()
    job = doctor(
        tmp_path / "run",
        "--timeout=2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK=str(rank),
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        LOCAL_WORLD_SIZE="1",
    )
    assert job.process.returncode == 1
    assert time.monotonic() - start < 12
    assert job.output().count("error:") == 1, job.output()
    assert f"127.0.0.1:{port}" in job.output()
    assert "within --timeout 2" in job.output()
    assert "firewall" in job.output()
    assert ("Other nodes cannot reach it" in job.output()) == (rank == 0)


# --- clocks --------------------------------------------------------------------------------------


def test_the_fastest_answer_says_how_clocks_differ():
    stamps = [Stamp(100.0, 105.0, 104.0), Stamp(200.0, 203.1, 200.2), Stamp(300.0, 304.0, 301.0)]
    ahead, give = network.skew(stamps)
    assert (ahead, give) == pytest.approx((3.0, 0.1))


@pytest.mark.parametrize(
    ("answered", "arrived", "state"),
    [
        (0.1, 0.2, OK),
        (1.0, 0.2, OK),
        (1.3, 0.2, WARNING),
        (-1.3, 0.2, WARNING),
        (4.0, 8.0, OK),  # the way took so long that the clocks may agree
    ],
)
def test_more_than_a_second_is_warned_of(answered, arrived, state):
    line = network.judged(4, [Stamp(0.0, answered, arrived)])
    assert line.state == state
    assert "rank 4's is" in line.text
    assert ("NTP" in line.remedy) == (state == WARNING)


# --- several nodes -------------------------------------------------------------------------------


def looked(world, flags, path=None):
    """The page, and whether all is well; each rank of the pool is a node."""
    here = replace(world, local_rank=0, local_size=1)
    place = launch.Launch(world.rank, 0, world.size, 1)
    out = io.StringIO()
    if world.rank == 1 and path is not None:
        sys.path.insert(0, path)
    try:
        with contextlib.redirect_stdout(out):
            ready = look(command_line.load(flags), None, 60, True, place, here)
    finally:
        if world.rank == 1 and path is not None:
            sys.path.remove(path)
    return out.getvalue(), ready


def test_a_node_with_another_version_is_named(pool, tmp_path):
    other = tmp_path / "numpy-1.26.4.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.26.4\n")
    answers = pool(2).run(looked, [f"--run.dir={tmp_path / 'run'}"], str(tmp_path))
    text = answers[0][0]
    assert answers[1] == ("", False)  # one page; not ready, on every rank
    host = socket.gethostname()
    assert f"node 1 ({host}): 1.26.4, but 2.0 or newer is needed" in text
    assert text.count("numpy ") == 2
    assert text.count("torch ") == 1
    state, clock, _ = lines_of(text)["clock"]
    assert state == OK  # measured between the two processes
    assert clock.startswith("rank 1's is 0.0")


@needs_root
@pytest.mark.parametrize("settings", ["fp32", "fp32-zero1"])
def test_nodes_with_disks_of_their_own(tmp_path, settings):
    """The run directory is another disk on each: how the store travels, and what differs."""
    run, disk = tmp_path / "run", tmp_path / "disk-0"
    run.mkdir()
    disk.mkdir()
    with mounted(tmp_path / "disk-1", "100M") as memory:
        job = doctor(
            run,
            DIGITS,
            f"--engine.deepspeed_config={settings}",
            processes=2,
            disks=[disk, memory.path],
        )
        assert not [file for each in (memory.path, disk, run) for file in each.iterdir()]
    page = lines_of(job.output())
    assert page["store"][:2] == (
        OK,
        "2 run directories: segments and checkpoints travel between them",
    )
    assert f"node 1 ({socket.gethostname()}): tmpfs, tmpfs at {run}" in job.output()
    if settings == "fp32":
        assert page["disk"][0] == OK
        assert page["interface"][0] == WRONG  # loopback does not join two nodes
    else:
        assert page["configuration"][0] == WRONG
        assert "run directory that all nodes share" in page["configuration"][1]


# --- the page ------------------------------------------------------------------------------------

PLACES = [Place("a", "10.0.0.1", 0)] * 2 + [Place("b", "10.0.0.2", 2)] * 2


def test_what_all_say_stands_there_once_and_differences_by_who_says_them():
    gpu, other = Line("device", OK, "H", alike=True), Line("device", OK, "A", alike=True)
    of_node = [Line("memory", OK, "1 GB"), Line("memory", OK, "2 GB")]
    text, ready = render(PLACES, [[gpu, of_node[0]], [gpu], [gpu, of_node[1]], [other]])
    assert ready
    assert text.splitlines()[:3] == [
        "4 ranks on 2 nodes",
        "node 0: a, 10.0.0.1, ranks 0-1",
        "node 1: b, 10.0.0.2, ranks 2-3",
    ]
    assert "ok       memory           node 1 (b): 2 GB" in text
    assert "warning  device           ranks 0-2: H" in text
    assert "warning  device           rank 3: A" in text
    assert "make them alike" in text
    assert text.endswith("Ready to train (2 warnings).")


def test_what_is_wrong_on_one_node_is_wrong():
    fine, bad = Line("disk", OK, "x"), Line("disk", WRONG, "full", "Free some.")
    text, ready = render(PLACES, [[fine], [], [bad], []])
    assert not ready
    assert text.count("WRONG    disk             node 1 (b): full\n" + " " * 26 + "Free some.") == 1
    assert text.endswith("Not ready: 1 line above would keep the run from working.")


# --- two hosts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts():
    with two_hosts(f"d{os.getpid() % 1000}") as made:
        yield made


def on_both(hosts, tmp_path, private=None):
    """The doctor by scripts/torchrun.sh on each of the two hosts."""
    started = []
    for host in (0, 1):
        where = ["--nodes", "2", "--node-rank", str(host), "--master", f"{ADDRESSES[0]}:29517"]
        flags = ["--timeout=8", DIGITS, "--run.dir", str(tmp_path / "run")]
        script = [str(ROOT / "scripts/torchrun.sh"), "--doctor", "--processes", "1"]
        command = [*script, *where, "--", *flags]
        with (tmp_path / f"host-{host}.log").open("w") as log:
            started.append(
                subprocess.Popen(
                    [*hosts.prefix(host, private), *command],
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "PSKD_BIN": str(Path(sys.executable).parent)},
                )
            )
    return started, lambda: [(tmp_path / f"host-{host}.log").read_text() for host in (0, 1)]


two_real_hosts = [
    pytest.mark.slow,
    needs_root,
    needs_ip,
]


class TestTwoHosts:
    pytestmark = two_real_hosts

    def test_one_page_names_both(self, hosts, tmp_path):
        started, logs = on_both(hosts, tmp_path, tmp_path / "run")
        assert [process.wait(DEADLINE_S) for process in started] == [0, 0], logs()
        first, second = logs()
        assert "Ready to train" not in second
        for host, address in enumerate(ADDRESSES):
            assert f"node {host}: {socket.gethostname()}, {address}, rank {host}\n" in first
        page = lines_of(first)
        assert f"{ADDRESSES[0]}:29517, in use by this job" in page["master"][1]
        assert page["clock"][0] == OK
        assert "2 run directories" in page["store"][1]

    def test_a_cable_that_is_cut_ends_both_in_time(self, hosts, tmp_path):
        """Once the launchers have met: what starts is cut off from the master."""
        started, logs = on_both(hosts, tmp_path)
        deadline = time.monotonic() + DEADLINE_S
        while not all(_workers(process) for process in started):
            assert all(process.poll() is None for process in started), logs()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        hosts.cut()
        try:
            cut = time.monotonic()
            assert all(process.wait(DEADLINE_S) != 0 for process in started)
            took_s = time.monotonic() - cut
        finally:
            hosts.mend()
        text = "\n".join(logs())
        assert took_s < 90, text
        assert f"{ADDRESSES[0]}:29517" in text
        assert "within --timeout 8" in text
        assert "firewall" in text

    def test_without_a_launcher_a_node_says_whether_it_reaches_the_master(self, hosts, tmp_path):
        command = [sys.executable, "-m", "pskd.cli", "doctor", "--timeout=3"]
        command += ["--run.dir", str(tmp_path / "run"), f"--master={ADDRESSES[0]}:29518"]
        command = [*hosts.prefix(1), *command]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        page = lines_of(done.stdout)
        assert "the host answers; nothing listens on the port yet" in page["master"][1]
        assert ADDRESSES[1] in page["interface"][1]
        hosts.cut()
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        finally:
            hosts.mend()
        assert done.returncode == 1, done.stdout + done.stderr
        state, text, remedy = lines_of(done.stdout)["master"]
        assert state == WRONG
        assert f"{ADDRESSES[0]}:29518 is not reached" in text
        assert "firewall" in remedy


def _workers(launcher):
    """Processes that torchrun has started for the doctor."""
    import psutil

    try:
        return [
            p
            for p in psutil.Process(launcher.pid).children(recursive=True)
            if "RANK" in p.environ()
        ]
    except psutil.Error:
        return []
