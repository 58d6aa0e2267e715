"""Installed from a wheel, away from the repository, the package brings all its files."""

import json
import os
import subprocess
import sys

from pskd import recipe
from pskd.deepspeed_config import SHIPPED
from tests.launches import ROOT, status

LIST = """
import pskd, json
from pskd import recipe
from pskd.deepspeed_config import SHIPPED
from pskd.report.page import page
assert "<h1>T</h1>" in page("T", [])
print(json.dumps([pskd.__file__, recipe.names(), sorted(p.name for p in SHIPPED.glob("*.json"))]))
"""


def test_a_wheel_brings_all_that_training_needs(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    source = tmp_path / "source"  # so that nothing is built inside the repository
    subprocess.run(["git", "clone", "--quiet", ROOT, source], check=True)
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--quiet", "--no-deps", "-t", tmp_path / "site", wheel], check=True
    )
    listed = subprocess.run(
        [sys.executable, "-c", LIST], cwd=tmp_path, env=environment, capture_output=True, check=True
    )
    place, recipes, configurations = json.loads(listed.stdout)
    assert place.startswith(str(tmp_path / "site"))
    assert recipes == list(recipe.names())
    assert configurations == sorted(path.name for path in SHIPPED.glob("*.json"))
    assert "fp32.json" in configurations
    flags = ["--train.epochs=2", "--schedule.milestones=[]", "--run.dir=runs/demo"]
    train = [sys.executable, "-m", "pskd", "--recipe=digits-pskd", *flags]
    done = subprocess.run(
        train, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "runs" / "demo")["state"] == "complete"
    compare = [sys.executable, "-m", "pskd.cli", "compare", "runs/demo"]
    table = subprocess.run(
        compare, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "demo" in table.stdout
