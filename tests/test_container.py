"""The image and what runs in it. Containers themselves: slow, as root, by podman.

PSKD_IMAGE names an image that is there (NAME-base: its base), to test that one; else it is built.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time

import pytest

from pskd.command_line import load
from tests.containers import built, configure, needs_containers, podman, site_paths
from tests.hosts import ADDRESSES, two_hosts
from tests.launches import DEADLINE_S, ROOT, metrics, result, status
from tests.system import needs_ip

NODES = ("--nodes", "2", "--node-rank", "1", "--master", "10.0.0.1")
FLAGS = ("--recipe", "digits-pskd", "--run.dir", "runs/some-run")


def docker_sh(*arguments, cwd, docker="echo", **environment):
    """DOCKER=echo: a command that is there on every machine, and shows what it is given."""
    return subprocess.run(
        [ROOT / "scripts" / "docker.sh", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "DOCKER": docker, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def printed(*arguments, cwd, **environment):
    """(the options of `docker run`, the command in the container)"""
    done = docker_sh("--print", *arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:2] == ["echo", "run"]
    image = words.index("pskd")
    return words[2:image], words[image + 1 :]


# --- scripts/docker.sh ---------------------------------------------------------------------------


def test_one_node(tmp_path):
    options, command = printed("--processes", 2, "--", *FLAGS, cwd=tmp_path)
    assert shlex.join(options).startswith(
        f"--rm --shm-size 8g --stop-timeout 60 --user {os.getuid()}:{os.getgid()} "
        f"--volume {tmp_path}/runs:/runs --env PSKD_RUN_DIR=/runs/some-run"
    )
    assert "--network" not in options
    loop, launch = command[0], command[1 : command.index("--")]
    assert loop == "scripts/run_until_done.sh"
    assert launch == ["scripts/torchrun.sh", "--processes", "2"]
    assert all((ROOT / script).exists() for script in (loop, launch[0]))
    assert load(command[command.index("--") + 1 :]).run.dir == "runs/some-run"
    assert not (tmp_path / "runs").exists(), "it was to print only"


def test_several_nodes_have_the_network_of_their_hosts(tmp_path):
    options, command = printed(*NODES, "--", *FLAGS, cwd=tmp_path)
    assert options[options.index("--network") + 1] == "host"
    assert command[1 : command.index("--")] == ["scripts/torchrun.sh", *NODES]


def test_data_runs_image_and_more_options_of_docker(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "my data").mkdir()
    options, _ = printed("--", *FLAGS, cwd=tmp_path)
    assert f"{tmp_path}/data:/data" in options
    arguments = ("--data", "my data", "--runs", "/big/runs", "--once", "--", *FLAGS)
    options, command = printed(*arguments, cwd=tmp_path, DOCKER_OPTIONS="-d -e A=b")
    assert f"{tmp_path}/my data:/data" in options
    assert "/big/runs:/runs" in options
    assert options[-3:] == ["-d", "-e", "A=b"]
    assert command[0] == "scripts/torchrun.sh"


@pytest.mark.parametrize(
    "where", [["--run.dir=runs/a/b"], ["--run.dir", "/runs/a/b"], ["--run.dir", "runs/a/b", "--x"]]
)
def test_the_health_check_looks_at_the_run(tmp_path, where):
    options, _ = printed("--", *where, cwd=tmp_path)
    assert "PSKD_RUN_DIR=/runs/a/b" in options


def test_without_print_it_runs_what_it_prints_and_the_runs_are_this_users(tmp_path):
    expected = docker_sh("--print", "--", *FLAGS, cwd=tmp_path)
    done = docker_sh("--", *FLAGS, cwd=tmp_path)
    assert done.stdout.split() == shlex.split(expected.stdout)[1:]
    assert (tmp_path / "runs").stat().st_uid == os.getuid()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "scripts/docker.sh [options]"),
        (("--help",), "scripts/docker.sh [options]"),
        (("train", "--", *FLAGS), "unknown option train; flags of train.py go behind --"),
        (("--image",), "--image needs a value"),
        (("--image", "--", *FLAGS), "--image needs a value"),
        (("--image", "pskd"), "there is no --"),
        (("--", "--recipe", "digits-pskd"), "the flags need --run.dir runs/NAME"),
        (("--", "--run.dir"), "the flags need --run.dir runs/NAME"),
        (("--", "--run.dir", "/home/me/run"), "--run.dir /home/me/run would be lost with the"),
        (("--", "--run.dir", "runs/"), "--run.dir runs/ would be lost"),
        (("--", "--run.dir", "runs/../x"), "a path without .. is needed"),
        (("--data", "none", "--", *FLAGS), "--data none is no directory"),
    ],
)
def test_bad_options_are_refused(tmp_path, arguments, says):
    done = docker_sh(*arguments, cwd=tmp_path)
    assert done.returncode == (0 if arguments == ("--help",) else 2)
    assert says in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_docker_is_named(tmp_path):
    done = docker_sh("--", *FLAGS, cwd=tmp_path, docker="no-such-docker")
    assert done.returncode == 2
    assert "no-such-docker is missing: install it, or name another" in done.stderr


# --- an environment that is complete -------------------------------------------------------------


def test_setup_installs_nothing_where_an_environment_is_named(tmp_path):
    setup = ROOT / "scripts" / "setup.sh"
    for name in ("python", "torchrun", "pskd"):
        done = subprocess.run(
            [setup],
            env={**os.environ, "PSKD_BIN": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert f"PSKD_BIN {tmp_path} lacks {name}" in done.stderr
        (tmp_path / name).touch(mode=0o755)
    subprocess.run([setup], env={**os.environ, "PSKD_BIN": str(tmp_path)}, check=True)
    dev = subprocess.run(
        [setup, "dev"],
        env={**os.environ, "PSKD_BIN": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"PSKD_BIN {tmp_path} lacks pytest" in dev.stderr


# --- what the image is made of -------------------------------------------------------------------


def test_the_image_names_no_site():
    """Indexes, proxies and certificates are the builder's, and stay with the builder."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    code = "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#"))
    for text in (code, (ROOT / "scripts" / "container.txt").read_text()):
        assert not re.findall(
            r"(?i)\w+://|proxy|index-url|\bPIP_|\bcert|\.pem|\.crt|--trusted", text
        )
    assert re.search(r"^ARG BASE_IMAGE=python:3\.\d+-slim$", code, re.MULTILINE)
    assert re.search(r"^USER pskd$", code, re.MULTILINE)


def test_what_the_image_says_can_be_started_is_there():
    lines = (ROOT / "scripts" / "container.txt").read_text().splitlines()
    commands = [line.split() for line in lines if line.startswith("  ")]
    named = {command[0] for command in commands}
    assert {"python", "torchrun", "deepspeed", "pskd", "scripts/demo.sh"} <= named
    for name in named:
        assert "/" not in name or os.access(ROOT / name, os.X_OK), name
    for words in commands:
        if "train.py" in words and "--recipe" in words and "NAME" not in words:
            load(words[words.index("train.py") + 1 :])


# --- containers ----------------------------------------------------------------------------------

slow = [pytest.mark.slow, needs_containers, pytest.mark.timeout(3600)]


def containers(test):
    for mark in slow:
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    directory = tmp_path_factory.mktemp("image")
    with pytest.MonkeyPatch.context() as patch:
        if "CONTAINERS_CONF" not in os.environ:
            patch.setenv("CONTAINERS_CONF", str(configure(directory)))
        if "PSKD_IMAGE" in os.environ:
            yield os.environ["PSKD_IMAGE"]
        else:
            with built(directory, "localhost/pskd-test") as name:
                yield name


@pytest.fixture
def runs(tmp_path):
    """A directory that any user may write."""
    path = tmp_path / "runs"
    path.mkdir()
    path.chmod(0o777)
    return path


@containers
def test_without_a_command_it_says_what_can_be_started(image):
    assert podman("run", "--rm", image).stdout == (ROOT / "scripts" / "container.txt").read_text()


@containers
def test_any_user_may_ask_for_help(image):
    asked = podman("run", "--rm", "--user=4321:4321", image, "python", "train.py", "--help")
    assert "--train.batch_size" in asked.stdout
    assert "digits-pskd" in podman("run", "--rm", image, "pskd", "recipes").stdout
    refused = podman("run", "--rm", image, "python", "train.py", "--recipe=digit", check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("error: ") == 1


@containers
def test_nothing_of_the_builders_site_is_left_in_it(image):
    found = ["find", *site_paths(), "-type", "f", "-size", "+0", "-exec", "sha256sum", "{}", ";"]
    before, after = (
        podman("run", "--rm", "--user=0", name, *found, check=False).stdout.splitlines()
        for name in (f"{image}-base", image)
    )
    assert sorted(after) == sorted(before)
    (config,) = json.loads(podman("image", "inspect", image).stdout)
    names = {entry.partition("=")[0] for entry in config["Config"]["Env"]}
    assert names <= {"PATH", "PSKD_BIN", "HOME", "USER", "PSKD_RUN_DIR"}


@containers
def test_the_demo_runs_without_network_as_nobody_in_particular(image, runs):
    where = [
        "--network=none",
        f"--volume={runs}:/runs",
        "--env=PSKD_RUN_DIR=/runs/demo/digits-pskd",
    ]
    name = f"pskd-demo-{os.getpid()}"
    podman("run", "--detach", f"--name={name}", *where, image, "scripts/demo.sh")
    try:
        run_dir = runs / "demo" / "digits-pskd"
        deadline = time.monotonic() + DEADLINE_S
        while not metrics(run_dir):
            assert time.monotonic() < deadline, podman("logs", name).stdout
            time.sleep(0.1)
        assert podman("exec", name, "cat", "/proc/1/comm").stdout == "tini\n"
        assert "running, last heartbeat" in podman("exec", name, "pskd", "health").stdout
        assert podman("healthcheck", "run", name).returncode == 0
        dead = podman("exec", name, "pskd", "health", "--stale-s=-1", check=False)
        assert dead.returncode == 1
        assert podman("wait", name).stdout == "0\n", podman("logs", name)
        assert "| digits-pskd " in podman("logs", name).stdout
        assert status(run_dir)["state"] == "complete"
        assert (run_dir / "result.json").stat().st_uid == 1000
    finally:
        podman("rm", "--force", name)


BRIEF = ("--recipe=digits-pskd", "--train.epochs=6", "--schedule.milestones=[3]", "--run.threads=1")


class Started:
    """scripts/docker.sh, started in the directory where its runs shall lie."""

    def __init__(self, image, runs, *arguments, prefix=()):
        self.log = runs.parent / f"{runs.name}-{time.monotonic_ns()}.log"
        script = [str(ROOT / "scripts" / "docker.sh"), "--image", image, "--runs", str(runs)]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*prefix, *script, *arguments, "--", *BRIEF, "--run.dir=runs/brief"],
                stdout=log,
                stderr=subprocess.STDOUT,
                # Another user than that of the tests, who is root.
                env={**os.environ, "DOCKER": "podman", "DOCKER_OPTIONS": "--user 4321:4321"},
            )

    def wait(self):
        return self.process.wait(DEADLINE_S)

    def output(self):
        return self.log.read_text()


@pytest.fixture(scope="module")
def on_one_node(image, tmp_path_factory):
    """weights_sha256 of two processes in one container."""
    runs = tmp_path_factory.mktemp("one-node")
    runs.chmod(0o777)
    job = Started(image, runs, "--processes", "2")
    assert job.wait() == 0, job.output()
    return result(runs / "brief")["weights_sha256"]


@containers
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_container_that_is_stopped_goes_on_to_the_same_weights(
    image, runs, on_one_node, signal_number
):
    job = Started(image, runs, "--processes", "2")
    deadline = time.monotonic() + DEADLINE_S
    while len(metrics(runs / "brief")) < 2:
        assert job.process.poll() is None, job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)
    job.process.send_signal(signal_number)
    assert job.wait() == 75, job.output()
    assert status(runs / "brief")["state"] == "stopped"
    again = Started(image, runs, "--processes", "2")
    assert again.wait() == 0, again.output()
    assert result(runs / "brief")["weights_sha256"] == on_one_node


@containers
@needs_ip
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "node-local"])
def test_containers_on_two_hosts_train_what_one_does(image, tmp_path, on_one_node, shared):
    disks = [tmp_path / ("runs" if shared else f"runs-{host}") for host in (0, 1)]
    for disk in disks:
        disk.mkdir(exist_ok=True)
        disk.chmod(0o777)
    with two_hosts(str(os.getpid())[-4:]) as hosts:
        where = ("--nodes", "2", "--master", f"{ADDRESSES[0]}:29513", "--processes", "1")
        jobs = []
        for host, (name, disk) in enumerate(zip(hosts.names, disks, strict=True)):
            # Unlike `ip netns exec`, it leaves /sys with its cgroups in place.
            prefix = ("nsenter", f"--net=/run/netns/{name}")
            numbered = (*where, "--node-rank", str(host))
            jobs.append(Started(image, disk, *numbered, prefix=prefix))
        codes = [job.wait() for job in jobs]
    assert codes == [0, 0], "\n".join(job.output() for job in jobs)
    assert result(disks[0] / "brief")["weights_sha256"] == on_one_node
