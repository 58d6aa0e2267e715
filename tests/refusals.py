"""What is said by a function or a run that must refuse."""

import re

import pytest

from pskd.errors import PskdError
from tests.launches import ROOT, status


def refusal(function, *args, **options):
    """The message of its PskdError."""
    with pytest.raises(PskdError) as caught:
        function(*args, **options)
    return str(caught.value)


def assert_refused(job, *parts, run_failed=False):
    """A job says once why, and with which words."""
    output = job.output()
    assert job.process.returncode == 1, output
    errors = re.findall(r"error: .*", output)
    assert len(errors) == 1, output  # said once
    for part in parts:
        assert part in errors[0]
    assert f"{ROOT}/pskd/" not in output, output  # torchrun's own traceback is not ours to silence
    if run_failed:
        assert status(job.run_dir)["state"] == "failed"
        assert status(job.run_dir)["reason"] in errors[0]
