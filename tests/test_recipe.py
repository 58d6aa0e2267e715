"""Recipes: chains of bases, what a file may say, what `pskd recipes` shows."""

import re

import pytest
import yaml

from pskd import recipe
from pskd.cli import main
from pskd.command_line import load, resolve
from pskd.config import ScheduleSection
from pskd.errors import PskdError
from pskd.methods.sections import METHODS, BaselineSection, PSKDSection

MODELS_32 = (
    "preact_resnet18",
    "resnet101_cifar",
    "densenet121_cifar",
    "resnext29_8x64d",
    "pyramidnet200_a240",
    "pyramidnet200_a240_shakedrop",
)


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A package of recipes with one base and what is built on it."""
    texts = {
        "base": """
            source: a paper
            published: {top1_error: 20.5}
            model: {name: preact_resnet8_w16}
            method: {name: pskd, alpha_T: 0.7}
            schedule: {name: step, milestones: [3], gamma: 0.5}
            train: {epochs: 5, batch_size: 32}
        """,
        "longer": "base: base\ntrain: {epochs: 9}\noptimizer: {lr: 0.2}",
        "grandchild": "base: longer\nsource: ours\ntrain: {seed: 4}",
        "other-method": "base: base\nmethod: {name: baseline}",
        "other-schedule": "base: base\nschedule: {name: cosine}",
        "same-method": "base: base\nmethod: {alpha_T: 0.3}\nschedule: {name: step, gamma: 0.2}",
        "unnamed": "schedule: {milestones: [3]}",
        "named-later": "base: unnamed\nschedule: {name: step, gamma: 0.2}",
        "orphan": "base: bsae",
        "head": "base: tail",
        "tail": "base: head",
        "unknown": "base: base\ntrain: {epoch: 3}",
        "flat": "base: base\ntrain: 3",
        "nothing": "",
        "odd-measure": "published: {top1_eror: 3}",
        "odd-figure": "published: {top1_error: none}",
        "odd-source": "source: [3]",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.yaml").write_text("\n".join(map(str.strip, text.split("\n"))))
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(recipe, "files", lambda _: tmp_path)
    return texts


def configured(name, *flags):
    return load(["--recipe", name, *flags])


def test_names_are_the_yaml_files_sorted(recipes):
    assert recipe.names() == sorted(recipes)


def test_a_recipe_overrides_its_base_field_by_field(recipes):
    base, longer = configured("base"), configured("longer")
    assert (longer.train.epochs, longer.train.batch_size) == (9, 32)
    assert (longer.model, longer.method, longer.schedule) == (
        base.model,
        base.method,
        base.schedule,
    )
    assert longer.optimizer.lr == 0.2
    grandchild = configured("grandchild").train
    assert (grandchild.epochs, grandchild.batch_size, grandchild.seed) == (9, 32, 4)
    same = configured("same-method")
    assert same.method == PSKDSection(alpha_T=0.3)
    assert (same.schedule.milestones, same.schedule.gamma) == ([3], 0.2)


def test_another_method_inherits_nothing_of_the_base_one(recipes):
    other = configured("other-method")
    assert other.method == BaselineSection()
    assert other.train == configured("base").train
    cosine = configured("other-schedule").schedule
    assert cosine == ScheduleSection(name="cosine")  # a cosine reads no milestones


def test_naming_what_the_base_already_is_by_default_keeps_its_fields(recipes):
    assert configured("named-later").schedule.milestones == [3]


def test_the_name_stays_in_the_configuration(recipes):
    config = configured("grandchild", "--train.epochs=1")
    assert config.run.recipe == "grandchild"
    assert yaml.safe_load(config.to_yaml())["run"]["recipe"] == "grandchild"


def test_source_and_figures_are_of_the_file_itself(recipes):
    assert recipe.read("base")[1:] == ("a paper", {"top1_error": 20.5})
    assert recipe.read("grandchild")[1:] == ("ours", {})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bsae", r"--recipe 'bsae' is unknown: did you mean 'base'\?"),
        ("orphan", r"recipe orphan: base 'bsae' is unknown: did you mean 'base'\?"),
        ("head", r"recipe head: the bases go in a circle: head -> tail -> head"),
        ("unknown", r"recipe unknown: unknown key 'train.epoch'. Did you mean 'train.epochs'\?"),
        ("flat", r"recipe flat: 'train' must be a section"),
        ("nothing", r"recipe nothing must hold sections"),
        ("odd-measure", r"odd-measure: published 'top1_eror' is unknown: did you mean 'top1_error"),
        ("odd-figure", r"odd-figure: published.top1_error is none: give a number"),
        ("odd-source", r"odd-source: source must be a text"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipes, name, message):
    with pytest.raises(PskdError, match=message):
        configured(name)


def test_a_file_of_ones_own_may_begin_with_a_recipe_or_a_file(tmp_path):
    (tmp_path / "deeper").mkdir()
    (tmp_path / "mine.yaml").write_text("base: digits-pskd\nmethod: {alpha_T: 0.6}")
    child = tmp_path / "deeper" / "child.yaml"
    child.write_text("base: ../mine.yaml\ntrain: {epochs: 3}")
    config = load(["--config", str(child)])
    assert config.method == PSKDSection(alpha_T=0.6)
    assert (config.train.epochs, config.train.batch_size) == (3, 64)
    (tmp_path / "mine.yaml").write_text("base: deeper/child.yaml")
    with pytest.raises(PskdError, match="go in a circle"):
        load(["--config", str(child)])
    child.write_text("base: missing.yaml")
    with pytest.raises(PskdError, match=r"missing.yaml: No such file or directory"):
        load(["--config", str(child)])
    child.write_text("base: digits-psdk")
    with pytest.raises(PskdError, match=r"base 'digits-psdk' is unknown: did you mean"):
        load(["--config", str(child)])


# --- the recipes of the package ------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_loads_passes_its_checks_and_states_its_source(name):
    teacher = ["--method.teacher=somewhere"] if "tfkd_self" in name else []
    config = configured(name, *teacher)
    assert config.run.recipe == name
    known = recipe.read(name)
    assert known.source
    saved = yaml.safe_load(config.to_yaml())
    for section, values in known.parts[-1].sections.items():
        assert {**saved[section], **values} == saved[section]  # nothing is lost or overruled


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS_32)
def test_each_row_of_the_first_table_is_a_recipe(model, method):
    config = resolve(["--recipe", f"cifar100-{model}-{method}", "--data.name", "cifar10"])
    assert (config.model.name, config.method.name, config.data.name) == (model, method, "cifar10")
    assert (config.train.epochs, config.train.batch_size) == (300, 128)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (0.1, 5e-4)
    assert config.schedule.milestones == [150, 225]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["resnet152", "densenet264"])
def test_each_row_of_the_second_table_is_a_recipe(model, method):
    config = resolve(["--recipe", f"imagenet-{model}-{method}"])
    assert (config.model.name, config.method.name) == (model, method)
    assert (config.engine.deepspeed_config, config.data.augment) == ("bf16", "pskd-imagenet")


def test_a_recipe_without_its_teacher_says_what_is_missing():
    with pytest.raises(PskdError, match=r"method.teacher is not set: name the weights"):
        configured("cifar100-resnet101_cifar-tfkd_self")


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("cifar100-preact_resnet18-pskd", (20.82, 5.10, 0.76, 1.77, 52.10)),
        ("cifar100-resnet101_cifar-label_smoothing", (19.84, 5.07, 0.93, 3.43, 95.76)),
        ("cifar100-densenet121_cifar-cskd", (20.47, 6.21, 1.07, 13.80, 73.37)),
        ("cifar100-resnext29_8x64d-tfkd_reg", (17.33, 3.87, 0.74, 6.73, 40.34)),
        ("cifar100-pyramidnet200_a240-baseline", (16.80, 3.69, 0.73, 8.04, 36.95)),
        ("imagenet-resnet152-pskd", (21.41, 5.86, 0.84, 2.51, 61.01)),
        ("imagenet-densenet264-baseline", (22.15, 6.12)),
    ],
)
def test_published_figures(name, figures):
    assert tuple(recipe.read(name).published.values()) == figures


def test_each_published_row_has_figures_and_no_other_recipe_has_some():
    with_figures = {name for name in recipe.names() if recipe.read(name).published}
    rows = {f"cifar100-{model}-{method}" for model in MODELS_32[:5] for method in METHODS}
    rows |= {f"imagenet-resnet152-{method}" for method in METHODS}
    assert with_figures == {*rows, "imagenet-densenet264-baseline"}


# --- the command ---------------------------------------------------------------------------


def said(capsys, *arguments):
    assert main(["recipes", *arguments]) == 0
    return capsys.readouterr().out


def test_recipes_lists_a_table_by_method_with_the_published_figures(capsys):
    lines = said(capsys, "cifar100-preact").splitlines()
    assert len(lines) == 2 + len(METHODS)
    assert [line.split("|")[1].strip().rpartition("-")[2] for line in lines[2:]] == list(METHODS)
    assert re.search(r"cifar100-preact_resnet18-pskd +\| 20.82 +\| 5.10 +\| 0.76 ", lines[-1])
    assert len(said(capsys).splitlines()) == 2 + len(recipe.names())
    assert said(capsys, "digits", "--names") == "digits-baseline\ndigits-pskd\n"


def test_recipes_show_prints_what_train_takes(capsys, tmp_path):
    name = "cifar100-pyramidnet200_a240_shakedrop-pskd-cutmix"
    text = said(capsys, "show", name)
    assert text.startswith(f"# recipe {name} on recipe cifar100-")
    assert "# source: public PS-KD code; CutMix" in text
    (tmp_path / "shown.yaml").write_text(text)
    assert load(["--config", str(tmp_path / "shown.yaml")]) == configured(name)
    assert "# published: top1_error 17.33" in said(
        capsys, "show", "cifar100-resnext29_8x64d-tfkd_self"
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["cifar1000"], "recipe 'cifar1000' is unknown"),
        (["show", "digits-psdk"], "did you mean 'digits-pskd'?"),
        (["show", "digits-pskd", "more"], "use `pskd recipes [TABLE]`"),
    ],
)
def test_recipes_refuses_what_is_not_there(capsys, arguments, part):
    assert main(["recipes", *arguments]) == 1
    assert part in capsys.readouterr().err
