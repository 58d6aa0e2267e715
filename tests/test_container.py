"""The image and what runs in it. Containers themselves: slow, as root, by podman."""

import os
import re
import shlex
import subprocess

import pytest

from pskd.command_line import load
from tests.launches import ROOT

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
