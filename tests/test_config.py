"""Command lines: what wins, what is refused and how it says so, what is saved and read back."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pskd import command_line
from pskd.command_line import load
from pskd.config import Config, ScheduleSection
from pskd.errors import PskdError
from pskd.methods.sections import METHODS, BaselineSection, PSKDSection
from pskd.order import Plan

REPO = Path(__file__).parents[1]
DS_CONFIG = str(REPO / "ds_configs" / "fp32.json")


def refusal(*argv):
    with pytest.raises(PskdError) as caught:
        load(list(argv))
    return str(caught.value)


def configured(*argv):
    return load(list(argv))


@pytest.fixture
def write(tmp_path):
    """Write a YAML file; returns its path as a string."""

    def write_text(text, name="run.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write_text


# --- precedence ----------------------------------------------------------------------------


def test_no_arguments_are_the_defaults():
    config = load([])
    assert config.run.recipe is None
    assert config.method == PSKDSection()
    assert config.schedule == ScheduleSection()
    assert config.train.epochs == 300


def test_flag_wins_over_file_and_file_over_recipe(write):
    path = write("train: {epochs: 7, seed: 7}")
    config = load(
        ["--train.seed", "9", "--config", path, "--recipe", "digits-baseline"]  # in any order
    )
    assert config.run.recipe == "digits-baseline"
    assert (config.train.batch_size, config.train.epochs, config.train.seed) == (64, 7, 9)
    assert config.method == BaselineSection()


def test_the_later_file_and_the_later_flag_win(write):
    first = write("train: {epochs: 1, seed: 1, batch_size: 16}", "a.yaml")
    second = write("train: {epochs: 2, seed: 2}", "b.yaml")
    config = configured(
        f"--config={first}", "--config", second, "--train.epochs=3", "--train.epochs", "4"
    )
    assert (config.train.batch_size, config.train.seed, config.train.epochs) == (16, 2, 4)


def test_a_file_may_set_the_method_and_its_fields(write):
    path = write("method: {name: pskd, alpha_T: 0.5}")
    assert configured("--config", path).method == PSKDSection(alpha_T=0.5)
    assert configured("--config", write("method: {name: baseline}")).method == BaselineSection()


@pytest.mark.parametrize(
    ("text", "section", "field", "value"),
    [
        ("schedule: {milestones: [3, 5]}", "schedule", "milestones", [3, 5]),
        ("schedule: {milestones: []}", "schedule", "milestones", []),
        ("optimizer: {lr: 1e-3}", "optimizer", "lr", 1e-3),  # YAML reads this as a string
        ("optimizer: {lr: 1}", "optimizer", "lr", 1.0),
        ("data: {flip: yes}", "data", "flip", True),
        ("run: {root: 'null'}", "run", "root", "null"),
        ("run: {dir: 5}", "run", "dir", "5"),
    ],
)
def test_values_arrive_with_the_type_of_their_field(write, text, section, field, value):
    got = getattr(getattr(configured("--config", write(text)), section), field)
    assert got == value
    assert type(got) is type(value)


# --- refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--recipe", "digits-psdk"], ["--recipe 'digits-psdk'", "did you mean 'digits-pskd'?"]),
        (["--recipe", "zzz"], ["'zzz' is unknown. Known: cifar100-", ", ..."]),
        (
            ["--model.name", "preactresnet18"],
            ["model.name 'preactresnet18'", "did you mean 'preact_resnet18'?"],
        ),
        (["--data.name", "digit"], ["data.name 'digit'", "did you mean 'digits'?"]),
        (["--method.name", "pksd"], ["method.name 'pksd'", "did you mean 'pskd'?", "baseline"]),
        (["--train.epoch", "3"], ["unknown key 'train.epoch'", "'train.epochs'?"]),
        (["--epochs=3"], ["unknown key 'epochs'", "'train.epochs'?"]),
        (["--optimizer.learning_rate", "1"], ["Did you mean 'optimizer.lr'?"]),
        (["--train.epochs", "1.5"], ["train.epochs is 1.5: use a whole number."]),
        (["--optimizer.lr", "nan"], ["optimizer.lr is nan: use a finite number."]),
        (["--optimizer.nesterov=2"], ["optimizer.nesterov is 2: use true or false."]),
        (["--method.teacher=modle"], ["method.teacher is modle: use one of 'table', 'model'."]),
        (["--schedule.milestones", "3,5"], ["schedule.milestones is 3,5: use a list, such as"]),
        (["--zzz", "3"], ["unknown key 'zzz'", "--help"]),
        (["--train.epochs.more", "3"], ["unknown key 'train.epochs.more'"]),
        (["epochs=3"], ["'epochs=3' is not a flag", "--section.field VALUE"]),
        (["--train.epochs", "3", "4"], ["'4' is not a flag"]),
        (
            ["--method.name", "baseline", "--method.alpha_T", "0.5"],
            ["'method.alpha_T'", "belongs to method pskd", "method.name is baseline"],
        ),
        (
            ["--recipe", "digits-baseline", "--method.alpha_T=0.5"],
            ["'method.alpha_T'", "belongs to method pskd", "method.name is baseline"],
        ),
    ],
)
def test_unknown_names_and_keys_are_refused_with_a_suggestion(argv, parts):
    message = refusal(*argv)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        (["--PSKD"], "--method.name pskd"),
        (["--lr", "0.1"], "--optimizer.lr"),
        (["--lr_decay_schedule", "150", "225"], "--schedule.milestones '[150, 225]'"),
        (["--lr_decay_rate=0.1"], "--schedule.gamma"),
        (["--weight_decay", "5e-4"], "--optimizer.weight_decay"),
        (["--start_epoch", "0"], "--run.dir"),
        (["--end_epoch", "300"], "--train.epochs"),
        (["--batch_size", "128"], "--train.batch_size"),
        (["--experiments_dir", "x"], "--run.dir"),
        (["--classifier_type", "ResNet18"], "--model.name"),
        (["--data_type", "cifar100"], "--data.name"),
        (["--alpha_T", "0.8"], "--method.alpha_T"),
        (["--saveckp_freq", "299"], "--checkpoint.export_every"),
        (["--rank", "0"], "torchrun --node-rank"),
        (["--world_size", "1"], "torchrun --nnodes"),
        (["--dist_url", "tcp://127.0.0.1:1"], "--master-addr"),
        (["--dist_backend", "nccl"], "gloo"),
        (["--multiprocessing_distributed"], "torchrun --nproc-per-node"),
        (["--data_path", "x"], "--data.root"),
    ],
)
def test_a_flag_of_the_public_code_is_told_what_it_is_called_here(argv, ours):
    message = refusal(*argv)
    assert f"unknown key '{argv[0][2:].partition('=')[0]}'" in message
    assert ours in message


@pytest.mark.parametrize("ours", [*command_line._PUBLIC_FLAGS.values()])
def test_what_the_public_flags_point_to_exists(ours):
    name = ours.partition(" ")[0].rstrip(",")
    if name.startswith("--"):
        assert name[2:] in command_line._keys("pskd")


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--method.alpha_T", "1.5"], ["method.alpha_T is 1.5", "[0, 1]"]),
        (["--method.alpha_T", "-0.1"], ["method.alpha_T is -0.1", "[0, 1]"]),
        (["--run.threads", "-1"], ["run.threads is -1"]),
        (["--run.timeout_s", "0"], ["run.timeout_s is 0"]),
        (["--run.lock_wait_s", "-1"], ["run.lock_wait_s is -1"]),
        (["--data.crop_padding", "-1"], ["data.crop_padding is -1"]),
        (["--optimizer.lr", "0"], ["optimizer.lr is 0.0", "positive"]),
        (["--optimizer.momentum", "1"], ["optimizer.momentum is 1.0", "[0, 1)"]),
        (["--optimizer.momentum", "0"], ["Nesterov", "optimizer.nesterov false"]),
        (["--optimizer.weight_decay", "-1"], ["optimizer.weight_decay is -1.0"]),
        (["--optimizer.clip_norm", "-1"], ["optimizer.clip_norm is -1.0"]),
        (["--schedule.milestones", "[5, 3]"], ["schedule.milestones is [5, 3]", "rising"]),
        (["--schedule.milestones", "[5, 5]"], ["schedule.milestones is [5, 5]", "rising"]),
        (["--schedule.milestones", "[0, 5]"], ["schedule.milestones is [0, 5]", "above 0"]),
        (["--schedule.gamma", "0"], ["schedule.gamma is 0.0"]),
        (["--schedule.warmup_epochs", "-1"], ["schedule.warmup_epochs is -1.0"]),
        (
            ["--schedule.warmup_epochs", "5", "--train.epochs", "5"],
            ["schedule.warmup_epochs is 5.0", "below train.epochs 5"],
        ),
        (["--train.epochs", "0"], ["train.epochs is 0"]),
        (["--train.batch_size", "1"], ["train.batch_size is 1", "2 or more"]),
        (["--train.accumulation", "0"], ["train.accumulation is 0"]),
        (["--evaluation.batch_size", "0"], ["evaluation.batch_size is 0"]),
        (["--evaluation.ece_bins", "0"], ["evaluation.ece_bins is 0"]),
        (["--checkpoint.every_steps", "-1"], ["checkpoint.every_steps is -1"]),
        (["--checkpoint.keep", "0"], ["checkpoint.keep is 0"]),
        (["--checkpoint.export_every", "-1"], ["checkpoint.export_every is -1"]),
    ],
)
def test_a_value_out_of_range_is_refused_by_key_value_and_remedy(argv, parts):
    message = refusal(*argv)
    assert [part for part in parts if part not in message] == []


FOLDER = "--data.name=imagefolder"


@pytest.mark.parametrize(
    ("flags", "key", "why"),
    [
        (["--mixing.name=none", "--mixing.alpha=0.4"], "mixing.alpha", "mixing.name none"),
        (
            ["--mixing.name=none", "--mixing.probability=0.5"],
            "mixing.probability",
            "mixing.name none",
        ),
        (["--erasing.name=none", "--erasing.size=8"], "erasing.size", "erasing.name none"),
        (["--erasing.name=cutout", "--erasing.ratio=[1, 2]"], "erasing.ratio", "cutout"),
        (["--erasing.name=random-erasing", "--erasing.size=8"], "erasing.size", "random-erasing"),
        (["--schedule.name=cosine", "--schedule.milestones=[3]"], "schedule.milestones", "cosine"),
        (["--schedule.name=cosine", "--schedule.gamma=0.5"], "schedule.gamma", "cosine"),
        (["--schedule.milestones=[]", "--schedule.gamma=0.5"], "schedule.gamma", "milestones []"),
        ([FOLDER, "--data.held_out=9", "--data.val_index_path=x"], "data.val_index_path", "held"),
        (["--method.name=cskd", "--store.encoding=float32"], "store.encoding", "name cskd"),
        (["--method.teacher=model", "--store.read=pread"], "store.read", "method.teacher model"),
        (["--method.teacher=model", "--method.averaging=0.5"], "method.averaging", "teacher model"),
        (["--data.name=digits", "--data.image_size=300"], "data.image_size", "data.name digits"),
        (["--data.name=digits", "--data.root=x"], "data.root", "scikit-learn"),
        (["--data.name=digits", "--data.download=true"], "data.download", "scikit-learn"),
        ([FOLDER, "--data.pad_to=40"], "data.pad_to", "data.name imagefolder"),
        (["--model.init=null", "--model.new_head=true"], "model.new_head", "model.init None"),
        (
            ["--optimizer.weight_decay=0", "--optimizer.decay_norm_and_bias=false"],
            "optimizer.decay_norm_and_bias",
            "optimizer.weight_decay 0",
        ),
    ],
)
def test_an_option_that_nothing_reads_is_refused_by_the_option_that_is_why(write, flags, key, why):
    message = refusal(*flags)
    assert message.startswith(f"{key} is ")
    assert "nothing reads it with " in message
    assert why in message
    # Given before by a recipe or file, it goes; and what is left is read back.
    *by, given = flags
    section, _, name = key.partition(".")
    before = write(f"{section}: {{{name}: {given.partition('=')[2]}}}")
    config = configured("--config", before, *by)
    assert config.flat()[key] == config.defaults()[key]
    assert configured("--config", write(config.to_yaml(), "saved.yaml")) == config


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--train.epochs", "three"], ["train.epochs", "a whole number", "three"]),
        (["--train.epochs", "3.5"], ["train.epochs", "a whole number", "3.5"]),
        (["--train.epochs="], ["train.epochs", "a whole number"]),
        (["--train.seed", "true"], ["train.seed", "a whole number"]),
        (["--optimizer.lr", "fast"], ["optimizer.lr", "a finite number", "fast"]),
        (["--optimizer.lr", "nan"], ["optimizer.lr", "a finite number", "nan"]),
        (["--optimizer.lr", "inf"], ["optimizer.lr", "a finite number", "inf"]),
        (["--method.alpha_T", "nan"], ["method.alpha_T", "a finite number", "nan"]),
        (["--data.flip", "maybe"], ["data.flip", "true or false", "maybe"]),
        (["--data.last_batch", "keep"], ["data.last_batch", "'train', 'drop'", "keep"]),
        (["--store.read", "aio"], ["store.read", "'mmap', 'pread'", "aio"]),
        (["--schedule.name", "linear"], ["schedule.name", "'step', 'cosine'", "linear"]),
        (["--schedule.milestones", "5"], ["schedule.milestones", "list", "5"]),
        (["--schedule.milestones", "[1, 2.5]"], ["schedule.milestones", "a whole number", "2.5"]),
    ],
)
def test_a_wrong_type_is_refused_by_key_type_and_value(argv, parts):
    message = refusal(*argv)
    assert [part for part in parts if part not in message] == []
    assert "<class" not in message


@pytest.mark.parametrize("flag", ["--train.epochs", "--data.flip", "--method.name", "--run.dir"])
def test_a_flag_without_a_value_is_refused(flag):
    assert refusal(flag) == f"{flag} needs a value: {flag} VALUE."
    assert f"{flag} needs a value" in refusal(flag, "--train.seed", "3")


@pytest.mark.parametrize("flag", ["--recipe", "--config"])
@pytest.mark.parametrize("rest", [[], ["--train.epochs", "3"]])
def test_recipe_and_config_need_a_value(flag, rest):
    assert refusal(flag, *rest) == f"{flag} needs a value."
    assert refusal(f"{flag}=", *rest) == f"{flag} needs a value."


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train: {epochs: 3", ["is not YAML", "line 1"]),
        ("", ["must hold sections"]),
        ("- train", ["must hold sections"]),
        ("train: 3", ["'train' must be a section"]),
        ("train:", ["'train' must be a section"]),
        ("train: {epoch: 3}", ["unknown key 'train.epoch'", "'train.epochs'?"]),
        ("trian: {epochs: 3}", ["unknown key 'trian.epochs'", "'train.epochs'?"]),
        ("train: {epochs: {a: 1}}", ["train.epochs", "a whole number"]),
        ("train: {epochs: null}", ["train.epochs", "a whole number"]),
        ("optimizer: {lr: .nan}", ["optimizer.lr", "a finite number"]),
        ("method: {name: baseline, alpha_T: 0.5}", ["belongs to method pskd"]),
        ("model: {name: resnet}", ["model.name 'resnet' is unknown"]),
    ],
)
def test_a_faulty_file_is_refused(write, text, parts):
    path = write(text)
    message = refusal("--config", path)
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("text", ["train: {epochs: 3", "", "- train", "train: 3"])
def test_a_file_of_the_wrong_shape_is_named(write, text):
    path = write(text)
    assert path in refusal("--config", path)


def test_a_missing_file_and_a_directory_are_named(tmp_path):
    missing = str(tmp_path / "none.yaml")
    assert refusal("--config", missing) == f"--config {missing}: No such file or directory."
    assert refusal("--config", str(tmp_path)) == f"--config {tmp_path}: Is a directory."


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"PK\x03\x04\xff\xfe")
    assert "weights.pth" in refusal("--config", str(tmp_path / "weights.pth"))


def test_a_directory_named_like_a_date_can_be_given_in_a_file(write):
    assert configured("--config", write("run: {root: 2026-01-31}")).run.root == "2026-01-31"


def test_a_value_that_overflows_to_infinity_is_refused():
    assert "optimizer.lr" in refusal("--optimizer.lr", "1e400")


# --- launchers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "launcher",
    [
        ["--local_rank=0"],
        ["--local-rank=0"],
        ["--local_rank", "0"],
        ["--local-rank", "0"],
        ["--deepspeed"],
        ["--local_rank=1", "--deepspeed"],
    ],
)
def test_flags_that_launchers_add_are_accepted_and_change_nothing(launcher):
    plain = load(["--train.epochs", "3"])
    assert load([*launcher, "--train.epochs", "3"]) == plain
    assert load(["--train.epochs", "3", *launcher]) == plain


@pytest.mark.parametrize(
    "argv",
    [
        ["--deepspeed", "--deepspeed_config", DS_CONFIG],
        [f"--deepspeed_config={DS_CONFIG}"],
        ["--engine.deepspeed_config", DS_CONFIG],
    ],
)
def test_deepspeed_config_is_the_key_of_the_engine(argv):
    assert configured(*argv).engine.deepspeed_config == DS_CONFIG


# --- saved and read back -------------------------------------------------------------------

text_values = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)


@settings(
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    method=st.one_of(st.just(BaselineSection()), st.builds(PSKDSection, alpha_T=st.floats(0, 1))),
    root=text_values | st.sampled_from(["null", "true", "1e3", "2026-01-31", "[a]", "a: b", "#x"]),
    lr=st.floats(1e-12, 1e6),
    milestones=st.sets(st.integers(1, 500)).map(sorted),
    flip=st.booleans(),
    seed=st.integers(-(2**64), 2**64),
)
def test_a_saved_configuration_is_read_back_equal(
    tmp_path, method, root, lr, milestones, flip, seed
):
    base = configured("--recipe", "digits-pskd")
    config = dataclasses.replace(
        base,
        run=dataclasses.replace(base.run, root=root),
        data=dataclasses.replace(base.data, flip=flip),
        method=method,
        optimizer=dataclasses.replace(base.optimizer, lr=lr),
        schedule=dataclasses.replace(base.schedule, milestones=milestones),
        train=dataclasses.replace(base.train, seed=seed),
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    assert configured("--config", str(path)) == config


def test_a_saved_configuration_does_not_pin_its_directory(tmp_path):
    config = configured("--run.dir", str(tmp_path), "--deepspeed_config", DS_CONFIG)
    path = tmp_path / "saved.yaml"
    path.write_text(config.to_yaml())
    assert str(tmp_path) not in path.read_text()
    again = configured("--config", str(path))
    assert again == dataclasses.replace(config, run=dataclasses.replace(config.run, dir=None))


def test_a_run_directory_brings_its_configuration(tmp_path):
    saved = configured("--recipe", "digits-baseline", "--train.seed", "11")
    (tmp_path / "config.yaml").write_text(saved.to_yaml())
    for argv in (["--run.dir", str(tmp_path)], [f"--run.dir={tmp_path}"]):
        config = load(argv)
        assert config.run.recipe == "digits-baseline"
        here = dataclasses.replace(saved.run, dir=str(tmp_path))
        assert config == dataclasses.replace(saved, run=here)
    # A flag wins over it; a recipe or a file replaces it.
    assert configured("--run.dir", str(tmp_path), "--train.seed", "12").train.seed == 12
    assert configured("--run.dir", str(tmp_path), "--recipe", "digits-pskd").train.seed == 0
    path = tmp_path / "other.yaml"
    path.write_text("train: {epochs: 5}")
    assert configured("--run.dir", str(tmp_path), "--config", str(path)).train.seed == 0


def test_a_run_directory_without_configuration_starts_from_the_defaults(tmp_path):
    config = configured("--run.dir", str(tmp_path / "new"))
    assert config.run.dir == str(tmp_path / "new")
    assert config.train == configured().train


# --- fields --------------------------------------------------------------------------------


def all_fields():
    kinds = [(f.name, f.type) for f in dataclasses.fields(Config) if f.name != "method"]
    kinds += [("method", kind) for kind in METHODS.values()]
    return [(section, field) for section, kind in kinds for field in dataclasses.fields(kind)]


@pytest.mark.parametrize(
    "field", [pytest.param(f, id=f"{section}.{f.name}") for section, f in all_fields()]
)
def test_every_field_has_a_tag_and_a_help(field):
    assert field.metadata["tag"] in {"numerics", "content", "speed", "output"}
    assert len(field.metadata["help"].split()) >= 2 or field.name in field.metadata["help"]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_field_is_in_the_values_of_exactly_one_tag(method):
    teacher = ["--method.teacher", "somewhere"] if method == "tfkd_self" else []
    config = configured("--method.name", method, *teacher)
    values = [config.values(tag) for tag in ("numerics", "content", "speed", "output")]
    merged = {key: value for part in values for key, value in part.items()}
    assert sum(map(len, values)) == len(merged)
    saved = yaml.safe_load(config.to_yaml())
    flat = {f"{s}.{name}": value for s, fields in saved.items() for name, value in fields.items()}
    assert merged == {**flat, "run.dir": None}


def test_what_changes_the_result_is_numerics_and_what_does_not_is_not():
    config = configured()
    numerics = config.values("numerics").keys()
    assert {"train.seed", "train.epochs", "method.alpha_T", "store.encoding"} <= numerics
    assert "evaluation.batch_size" in config.values("speed")
    assert "run.dir" in config.values("output")


# --- recipes (more in test_recipe.py) --------------------------------------------------------


def test_the_demos_differ_in_the_method_alone_and_run_on_up_to_eight_ranks():
    baseline, pskd = configured("--recipe", "digits-baseline"), configured("--recipe=digits-pskd")
    assert pskd.method == PSKDSection(alpha_T=0.8)
    assert dataclasses.replace(pskd, method=baseline.method, run=baseline.run) == baseline
    for world in (1, 2, 4, 8):
        Plan(1437, baseline.train.batch_size, world).check()


# --- the command line as a process ---------------------------------------------------------


def train_py(*argv, local_rank="0"):
    """(process, top-level modules it imported)."""
    process = subprocess.run(
        [sys.executable, "-X", "importtime", "train.py", *argv],
        cwd=REPO,
        env={**os.environ, "RANK": "8", "LOCAL_RANK": local_rank},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    lines = process.stderr.splitlines()
    modules = {
        line.rpartition("|")[2].strip().partition(".")[0]
        for line in lines
        if line.startswith("import time:")
    }
    said = [line for line in lines if not line.startswith("import time:")]
    return process, modules, said


HEAVY = {"torch", "torchvision", "deepspeed", "sklearn", "scipy"}


def test_help_names_every_section_and_key_and_imports_no_torch():
    process, modules, said = train_py("--help")
    assert (process.returncode, said) == (0, [])
    titles = {line[:-1] for line in process.stdout.splitlines() if line[:1].isalpha()}
    assert {field.name for field in dataclasses.fields(Config)} <= titles
    for key in command_line._keys("pskd"):
        assert f"--{key} " in process.stdout
    assert "digits-pskd" in " ".join(process.stdout.split())
    assert "jsonargparse" in modules  # so the listing works
    assert modules & HEAVY == set()


def test_help_of_another_method_shows_its_keys(capsys):
    with pytest.raises(SystemExit) as ended:
        load(["--method.name=baseline", "-h"])
    assert ended.value.code == 0
    assert "--method.alpha_T" not in capsys.readouterr().out


def test_help_of_a_recipe_shows_the_keys_of_its_method(capsys):
    with pytest.raises(SystemExit):
        load(["--recipe", "digits-baseline", "--help"])
    assert "--method.alpha_T" not in capsys.readouterr().out


def test_every_flag_that_help_shows_is_accepted(capsys):
    with pytest.raises(SystemExit):
        load(["--help"])
    offered = "--schedule.milestones+" in capsys.readouterr().out
    assert not offered or configured("--schedule.milestones+=300").schedule.milestones[-1] == 300


def test_a_refusal_is_one_line_of_rank_0_and_imports_no_torch():
    process, modules, said = train_py("--train.epoch", "3")
    assert process.returncode == 1
    assert said == ["error: unknown key 'train.epoch'. Did you mean 'train.epochs'?"]
    assert process.stdout == ""
    assert modules & HEAVY == set()
    # The first rank of each node speaks: another node may have been given another command line.
    process, _, said = train_py("--train.epoch", "3", local_rank="1")
    assert (process.returncode, said) == (1, [])
