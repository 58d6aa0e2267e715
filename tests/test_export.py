"""Exports compute what the run evaluated; public checkpoints compute what public code computes."""

import json
import math
import re
import shutil
import time

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional as F

from pskd import export as export_module
from pskd import models
from pskd.cli import main
from pskd.data import digits
from pskd.errors import PskdError
from pskd.export import export, import_public
from pskd.metrics import MEASURES, summarize
from pskd.models.public_names import translate
from pskd.weights import head_of, initialise, weights_sha256
from tests.forked import train
from tests.launches import overwrite_weights, result


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Three epochs on the digits, one process."""
    run_dir = tmp_path_factory.mktemp("exports") / "run"
    flags = ("--recipe=digits-pskd", "--train.epochs=3", "--schedule.milestones=[2]")
    job = train(run_dir, *flags, "--run.threads=1", processes=None)
    assert job.process.returncode == 0, job.output()
    return run_dir


def images_as_described(path):
    """The validation images, prepared by nothing but the JSON beside an export."""
    about = json.loads(path.with_name(path.name + ".json").read_text())
    how = about["preprocessing"]
    split = digits.load(None, False).validation
    images = torch.from_numpy(split.images_NHWC).permute(0, 3, 1, 2).float()
    assert (how["height"], how["width"]) == tuple(images.shape[2:])
    assert how["grey"]
    images = images.expand(-1, how["channels"], -1, -1)
    mean, std = (torch.tensor(how[key])[:, None, None] for key in ("mean", "std"))
    # The same arithmetic as in the trainer: pixels against 255 times mean and deviation.
    return (images - mean * 255) / (std * 255), split.labels_N, about


def logits_of(path, kind, images, about):
    match kind:
        case "state-dict":
            model = models.build(about["model"], about["num_classes"])
            model.load_state_dict(torch.load(path, weights_only=True))
            with torch.no_grad():
                return model.eval()(images)
        case "torch-export":
            with torch.no_grad():
                return torch.export.load(path).module()(images)
        case _:
            session = onnxruntime.InferenceSession(path)
            assert session.get_inputs()[0].name == "images"
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


@pytest.mark.parametrize("which", ["last", "best"])
@pytest.mark.parametrize("kind", ["state-dict", "torch-export", "onnx"])
def test_an_export_has_the_measures_of_the_run(run, kind, which, tmp_path):
    path, beside = export(run, which=which, kind=kind, output=tmp_path / "deep" / "model")
    assert beside.name == "model.json"
    images, labels, about = images_as_described(path)
    measured = summarize(logits_of(path, kind, images, about), labels)
    expected = result(run)[which]
    # One pass over all images sums in another order than batches of 256; ONNX has other kernels.
    for name in MEASURES:
        assert measured[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4)
        assert about[name] == expected[name]
    assert about["preprocessing"]["class_names"] == [str(c) for c in range(10)]
    if which == "last":
        assert about["weights_sha256"] == result(run)["weights_sha256"]


def test_logits_of_plain_torch_are_those_of_the_evaluation_to_the_bit(run, tmp_path):
    path, _ = export(run, which="last", kind="state-dict", output=tmp_path / "model.pth")
    images, labels, about = images_as_described(path)
    batches = [logits_of(path, "state-dict", part, about) for part in images.split(256)]
    measured = summarize(torch.cat(batches), labels)
    assert measured == {name: result(run)["last"][name] for name in MEASURES}


def test_a_graph_takes_any_number_of_images(run, tmp_path):
    path, _ = export(run, which="last", kind="torch-export", output=tmp_path / "model.pt2")
    graph = torch.export.load(path).module()
    assert [len(graph(torch.zeros(n, 3, 8, 8))) for n in (1, 2, 5)] == [1, 2, 5]


def test_the_command_writes_into_the_run_and_says_where(run, capsys):
    assert main(["export", str(run), "--weights", "best"]) == 0
    path = run / "exports" / "preact_resnet8_w16-best.pth"
    assert capsys.readouterr().out == f"{path}\n{path}.json\n"
    assert path.exists()


def test_exports_are_refused_with_the_remedy(run, tmp_path, capsys, monkeypatch):
    assert main(["export", str(tmp_path)]) == 1
    assert f"{tmp_path} is no run directory" in capsys.readouterr().err
    blocked = tmp_path / "file"
    blocked.touch()
    assert main(["export", str(run), "--output", str(blocked / "x.pth")]) == 1
    error = capsys.readouterr().err
    assert f"{blocked / 'x.pth'} cannot be written" in error
    assert "Name another place with --output." in error
    best = run / "models" / "checkpoint_best.pth"
    content = best.read_bytes()
    best.write_bytes(content[:300])
    assert main(["export", str(run), "--weights", "best"]) == 1
    assert "Restore it from a copy" in capsys.readouterr().err  # no start writes it again
    best.write_bytes(content)
    away = best.rename(tmp_path / "away")
    assert main(["export", str(run), "--weights", "best"]) == 1
    away.rename(best)
    assert f"{best}: no such file" in capsys.readouterr().err
    monkeypatch.setattr(export_module, "_ONNX_PACKAGES", ("onnx", "a_package_that_is_not_there"))
    assert main(["export", str(run), "--format", "onnx"]) == 1
    assert 'pip install "pskd[onnx]"' in capsys.readouterr().err


def test_a_run_that_has_not_ended_or_has_lost_its_result_says_which(run, tmp_path, capsys):
    lost = tmp_path / "run"
    shutil.copytree(run, lost, ignore=shutil.ignore_patterns("checkpoints", "store"))
    (lost / "result.json").unlink()
    assert main(["export", str(lost)]) == 1
    assert capsys.readouterr().err == (
        f"error: {lost} is complete, but its result.json is gone. `train.py --run.dir {lost}` "
        "writes it again, without training again what is trained.\n"
    )
    status = json.loads((lost / "status.json").read_text())
    status.update(state="running", epoch=1, heartbeat=time.time() - 70)
    (lost / "status.json").write_text(json.dumps(status))
    assert main(["export", str(lost)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"is not complete \(running in epoch 2 of 3, last heartbeat 7\d s ago;", error)
    assert f"if it was killed, `train.py --run.dir {lost}` resumes it." in error


def test_weights_that_were_changed_are_refused(run, tmp_path, capsys):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns("checkpoints", "store"))
    for which, name in (("last", "checkpoint_3.pth"), ("best", "checkpoint_best.pth")):
        overwrite_weights(damaged / "models" / name)
        assert main(["export", str(damaged), "--weights", which]) == 1
        assert (
            f"{damaged / 'models' / name} is damaged: its weights are not those that were written "
            "(sha256 differs). "
        ) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("result.json", "Remove it: `train.py --run.dir"),
        ("preprocessing.json", "Remove it: `train.py --run.dir"),
        ("models/checkpoint_3.pth", "holds no weights"),
    ],
)
@pytest.mark.parametrize("content", [b"", b"{", b"\0" * 99, b"\xff\xfe", b"Quick notes\n"])
def test_a_damaged_file_of_a_run_is_named(run, tmp_path, capsys, name, remedy, content):
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged, ignore=shutil.ignore_patterns("checkpoints", "store"))
    (damaged / name).write_bytes(content)
    assert main(["export", str(damaged)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {damaged / name} ")
    assert remedy in error
    assert error.count("\n") == 1


# --- networks in the layout of the public code, written from its names and shapes ----------------


class Public:
    """Weights by public name, drawn when first asked for, and the layers that use them."""

    def __init__(self, seed=0):
        self.draw = torch.Generator().manual_seed(seed)
        self.weights = {}

    def _get(self, name, make):
        return self.weights.setdefault(name, make())

    def _normal(self, *shape, scale=1.0, shift=0.0):
        return lambda: torch.randn(shape, generator=self.draw) * scale + shift

    def conv(self, name, x, outputs, size, stride=1, groups=1):
        fan = x.shape[1] // groups * size * size
        weight = self._get(
            f"{name}.weight",
            self._normal(outputs, x.shape[1] // groups, size, size, scale=math.sqrt(2 / fan)),
        )
        return F.conv2d(x, weight, stride=stride, padding=size // 2, groups=groups)

    def bn(self, name, x):
        n = x.shape[1]
        weight = self._get(f"{name}.weight", self._normal(n, scale=0.1, shift=1.0))
        bias = self._get(f"{name}.bias", self._normal(n, scale=0.1))
        mean = self._get(f"{name}.running_mean", self._normal(n, scale=0.1))
        var = self._get(f"{name}.running_var", lambda: 1 + torch.rand(n, generator=self.draw))
        self._get(f"{name}.num_batches_tracked", lambda: torch.tensor(7))
        return F.batch_norm(x, mean, var, weight, bias)

    def linear(self, name, x, outputs):
        weight = self._get(f"{name}.weight", self._normal(outputs, x.shape[1], scale=0.1))
        return F.linear(x, weight, self._get(f"{name}.bias", self._normal(outputs)))


def preact_resnet18(p, x):
    x = F.relu(p.bn("bn1", p.conv("conv1", x, 64, 3)))
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            at, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            active = F.relu(p.bn(f"{at}.bn1", x))
            changes = stride == 2 or active.shape[1] != width
            skip = p.conv(f"{at}.shortcut.0", active, width, 1, stride) if changes else active
            out = p.conv(f"{at}.conv1", active, width, 3, stride)
            x = p.conv(f"{at}.conv2", F.relu(p.bn(f"{at}.bn2", out)), width, 3) + skip
    return p.linear("linear", x.mean((2, 3)), 100)


def resnet101_cifar(p, x):
    x = F.relu(p.bn("bn1", p.conv("conv1", x, 64, 3)))
    for stage, count in enumerate((3, 4, 23, 3), start=1):
        width = 32 * 2**stage
        for index in range(count):
            at, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = F.relu(p.bn(f"{at}.bn1", p.conv(f"{at}.conv1", x, width, 1)))
            out = F.relu(p.bn(f"{at}.bn2", p.conv(f"{at}.conv2", out, width, 3, stride)))
            out = p.bn(f"{at}.bn3", p.conv(f"{at}.conv3", out, 4 * width, 1))
            if index == 0:
                x = p.conv(f"{at}.shortcut.0", x, 4 * width, 1, stride)
                x = p.bn(f"{at}.shortcut.1", x)
            x = F.relu(out + x)
    return p.linear("linear", x.mean((2, 3)), 100)


def densenet121_cifar(p, x):
    x = p.conv("conv1", x, 64, 3)
    for stage, count in enumerate((6, 12, 24, 16), start=1):
        for index in range(count):
            at = f"dense{stage}.{index}"
            out = p.conv(f"{at}.conv1", F.relu(p.bn(f"{at}.bn1", x)), 128, 1)
            out = p.conv(f"{at}.conv2", F.relu(p.bn(f"{at}.bn2", out)), 32, 3)
            x = torch.cat([out, x], 1)
        if stage < 4:
            active = F.relu(p.bn(f"trans{stage}.bn", x))
            x = F.avg_pool2d(p.conv(f"trans{stage}.conv", active, x.shape[1] // 2, 1), 2)
    return p.linear("linear", F.relu(p.bn("bn", x)).mean((2, 3)), 100)


def resnext29_8x64d(p, x):
    x = F.relu(p.bn("bn_1", p.conv("conv_1_3x3", x, 64, 3)))
    for stage in (1, 2, 3):
        outputs, width = 128 * 2**stage, 256 * 2**stage
        for index in range(3):
            at = f"stage_{stage}.stage_{stage}_bottleneck_{index}"
            stride = 2 if stage > 1 and index == 0 else 1
            out = F.relu(p.bn(f"{at}.bn_reduce", p.conv(f"{at}.conv_reduce", x, width, 1)))
            out = F.relu(p.bn(f"{at}.bn", p.conv(f"{at}.conv_conv", out, width, 3, stride, 8)))
            out = p.bn(f"{at}.bn_expand", p.conv(f"{at}.conv_expand", out, outputs, 1))
            if index == 0:
                x = p.conv(f"{at}.shortcut.shortcut_conv", x, outputs, 1, stride)
                x = p.bn(f"{at}.shortcut.shortcut_bn", x)
            x = F.relu(out + x)
    return p.linear("classifier", x.mean((2, 3)), 100)


def pyramidnet200_a240(p, x):
    x = p.bn("bn1", p.conv("conv1", x, 16, 3))
    dimension, step = 16.0, 240 / 66
    for stage in (1, 2, 3):
        for index in range(22):
            dimension += step
            width = round(dimension)
            at, stride = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            out = p.conv(f"{at}.conv1", p.bn(f"{at}.bn1", x), width, 1)
            out = p.conv(f"{at}.conv2", F.relu(p.bn(f"{at}.bn2", out)), width, 3, stride)
            out = p.conv(f"{at}.conv3", F.relu(p.bn(f"{at}.bn3", out)), 4 * width, 1)
            out = p.bn(f"{at}.bn4", out)
            skip = F.avg_pool2d(x, 2) if stride == 2 else x
            x = out + F.pad(skip, (0, 0, 0, 0, 0, out.shape[1] - skip.shape[1]))
    return p.linear("fc", F.relu(p.bn("bn_final", x)).mean((2, 3)), 100)


LARGE = (resnet101_cifar, resnext29_8x64d, pyramidnet200_a240)
NETWORKS = [
    preact_resnet18,
    densenet121_cifar,
    *(pytest.param(n, marks=pytest.mark.slow, id=n.__name__) for n in LARGE),
]


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
@torch.no_grad()
def test_a_public_checkpoint_gives_the_logits_that_public_code_gives(network, tmp_path):
    public, images = Public(), torch.randn(2, 3, 32, 32)
    expected = network(public, images)
    state = {f"module.{name}": tensor for name, tensor in public.weights.items()}
    torch.save({"net": state, "epoch": 3, "best_acc": 80.0}, tmp_path / "public.pth")
    out = tmp_path / "ours.pth"
    arguments = ["import", str(tmp_path / "public.pth"), "--model", network.__name__]
    assert main([*arguments, "--output", str(out)]) == 0
    ours = torch.load(out, weights_only=True)
    assert (ours["model"], ours["num_classes"]) == (network.__name__, 100)
    model = models.build(network.__name__, 100)
    model.load_state_dict(ours["net"])
    got = model.eval()(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert float((got - got.mean()).abs().max()) > 0.1  # logits that say something
    # And without an import: the same file as the first weights of a run.
    fresh = models.build(network.__name__, 100)
    initialise(fresh, network.__name__, str(tmp_path / "public.pth"), new_head=False)
    assert weights_sha256(fresh) == weights_sha256(model)


def test_weights_of_torchvision_fit_as_they_are_and_old_names_of_densenets():
    model = models.build("resnet18", 10)
    assert translate("resnet18", model.state_dict()).keys() == model.state_dict().keys()
    own = models.build("densenet121", 10).state_dict()
    old = {name.replace("norm1", "norm.1").replace("conv2", "conv.2"): t for name, t in own.items()}
    assert old.keys() != own.keys()
    assert translate("densenet121", old).keys() == own.keys()


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ("resnet101_cifar", ["tensors are missing", "bn3", "have another shape"]),
        ("resnet18", ["tensors are missing (", "are unknown ("]),
    ],
)
def test_an_import_of_another_layout_says_which_tensors_differ(tmp_path, capsys, model, parts):
    public = Public()
    preact_resnet18(public, torch.zeros(1, 3, 32, 32))
    torch.save(public.weights, tmp_path / "public.pth")
    out = tmp_path / "out.pth"
    arguments = ["import", str(tmp_path / "public.pth"), "--model", model, "--output", str(out)]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {tmp_path / 'public.pth'} does not hold a {model}: ")
    for part in parts:
        assert part in message
    assert not out.exists()
    assert main([*arguments[:3], "preact_resnet19", *arguments[4:]]) == 1
    assert "did you mean 'preact_resnet18'?" in capsys.readouterr().err


def test_an_import_without_weights_is_refused(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(PskdError, match="holds no weights"):
        import_public(tmp_path / "text.pth", "resnet18", tmp_path / "out.pth")


# --- model.init ----------------------------------------------------------------------------------

BRIEF = ("--recipe=digits-baseline", "--train.epochs=1", "--schedule.milestones=[]")


@pytest.mark.parametrize("processes", [None, 2])
def test_a_run_begins_with_the_weights_of_another(run, tmp_path, processes):
    """At a learning rate of nearly nothing, it ends with them too."""
    still = ("--optimizer.lr=1e-30", "--optimizer.weight_decay=0", "--run.threads=1")
    job = train(tmp_path / "run", *BRIEF, *still, f"--model.init={run}", processes=processes)
    assert job.process.returncode == 0, job.output()
    begun = torch.load(run / "models/checkpoint_3.pth", weights_only=True)["net"]
    ended = torch.load(tmp_path / "run/models/checkpoint_1.pth", weights_only=True)["net"]
    for name, tensor in begun.items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(tensor, ended[name]), name
    # What began it is needed no more once there is a checkpoint.
    log = train(
        tmp_path / "run", *BRIEF, *still, f"--model.init={run}", processes=processes
    ).output()
    assert "complete" in log


def test_a_new_head_begins_anew_and_the_rest_does_not(run):
    model = models.build("preact_resnet8_w16", 3)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    file = str(run / "models" / "checkpoint_best.pth")
    with pytest.raises(PskdError, match=r"linear.weight \(10, 64\), not \(3, 64\).*new_head true"):
        initialise(model, "preact_resnet8_w16", file, new_head=False)
    initialise(model, "preact_resnet8_w16", file, new_head=True)
    trained = torch.load(file, weights_only=True)["net"]
    assert head_of(model) == ["linear.weight", "linear.bias"]
    for name, tensor in model.state_dict().items():
        expected = fresh[name] if name in head_of(model) else trained[name]
        assert torch.equal(tensor, expected), name


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--model.init=nowhere.pth"], ["nowhere.pth: no such file"]),
        (["--model.new_head=true"], ["model.new_head is True", "model.init"]),
        (["--model.init="], ["model.init is ''"]),
        (["--model.init={run}", "--model.name=preact_resnet14_w24"], ["does not fit", "missing"]),
    ],
)
def test_first_weights_that_do_not_fit_are_refused_once(run, tmp_path, flags, parts):
    flags = [flag.format(run=run) for flag in flags]
    job = train(tmp_path / "run", *BRIEF, *flags)
    output = job.output()
    assert job.process.returncode == 1, output
    assert output.count("error: ") == 1
    for part in parts:
        assert part in output


def test_the_arrays_of_an_export_are_plain_numbers(run, tmp_path):
    """ONNX runs without torch: numpy in, numpy out, for a single image as well."""
    path, _ = export(run, which="last", kind="onnx", output=tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path)
    (logits,) = session.run(None, {"images": np.zeros((1, 3, 8, 8), np.float32)})
    assert logits.shape == (1, 10)
    assert np.isfinite(logits).all()
