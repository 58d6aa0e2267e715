"""A folder of images as it is configured: which samples there are, and what is refused."""

import os

import pytest
import torch
from torch import distributed as dist

from pskd import command_line, loading, world
from tests.imagefolder_jobs import FLAGS, flags_on, make_splits
from tests.launches import train
from tests.photos import make_folder
from tests.refusals import assert_refused, refusal

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_splits(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def alone():
    """A world of this process."""
    before = dict(os.environ)
    assert not before.keys() & {"RANK", "WORLD_SIZE", "LOCAL_RANK"}
    yield world.start(60)
    dist.destroy_process_group()
    os.environ.clear()  # it has set a launcher's variables
    os.environ.update(before)


def samples_of(here, *flags):
    return loading.catalog_and_plan(command_line.load([*FLAGS, *flags]), here)


def test_the_samples_of_a_folder_are_as_configured(alone, folder):
    catalog, plan = samples_of(alone, f"--data.root={folder}")
    assert (plan.n, len(catalog.validation), catalog.num_classes) == (61, 15, 3)
    part, plan = samples_of(alone, f"--data.root={folder}", "--data.held_out=10", "--data.limit=30")
    assert (plan.n, len(part.validation), part.num_classes) == (30, 10, 3)
    held = set(part.validation.rows_N.tolist())
    assert not held & set(part.train.rows_N.tolist())
    assert part.fingerprint != catalog.fingerprint
    # Held out by hash of the id: for every limit alike.
    other, _ = samples_of(alone, f"--data.root={folder}", "--data.held_out=10")
    assert set(other.validation.rows_N.tolist()) == held
    assert len(other.train) == 51


def test_a_folder_must_be_named_and_be_there(alone, tmp_path):
    assert "needs --data.root DIR" in refusal(samples_of, alone)
    missing = f"--data.root={tmp_path / 'nowhere'}"
    assert f"data.root {tmp_path / 'nowhere'} holds no train/" in refusal(
        samples_of, alone, missing
    )
    file = tmp_path / "file"
    file.touch()
    assert "holds no train/" in refusal(samples_of, alone, f"--data.root={file}")


def test_a_folder_without_validation_images_is_refused_unless_some_are_held_out(alone, tmp_path):
    make_folder(tmp_path / "train", classes=2, per_class=20, median_side=24)
    root = f"--data.root={tmp_path}"
    text = refusal(samples_of, alone, root)
    assert "no val/" in text
    assert "data.held_out" in text
    _, plan = samples_of(alone, root, "--data.held_out=8")
    assert plan.n == 32
    # The class folders themselves may be the root.
    _, plan = samples_of(alone, f"--data.root={tmp_path / 'train'}", "--data.held_out=8")
    assert plan.n == 32


def test_a_folder_without_classes_is_refused(alone, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    text = refusal(samples_of, alone, f"--data.root={tmp_path}")
    assert str(tmp_path / "train") in text


def test_a_folder_of_one_class_is_refused(alone, tmp_path):
    make_folder(tmp_path / "train", classes=1, per_class=9, median_side=24)
    text = refusal(samples_of, alone, f"--data.root={tmp_path}", "--data.held_out=3")
    assert "has only the class 'class000': there is nothing to tell apart" in text


def test_classes_that_differ_are_named(alone, tmp_path):
    root = make_splits(tmp_path / "photos")
    (root / "val" / "class002").rename(root / "val" / "zebra")
    text = refusal(samples_of, alone, f"--data.root={root}")
    assert "different classes" in text
    assert "zebra" in text
    assert "class002" in text


@pytest.mark.parametrize(
    ("flag", "says"),
    [("held_out=60", "fewer than 2 of 61"), ("limit=62", "exceeds the 61 samples")],
)
def test_too_few_samples_are_refused(alone, folder, flag, says):
    assert says in refusal(samples_of, alone, f"--data.root={folder}", f"--data.{flag}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_mixed_decoding_without_a_gpu_is_refused(alone, folder):
    flags = (f"--data.root={folder}", "--data.decoder=mixed")
    assert "data.decoder mixed decodes on a GPU" in refusal(samples_of, alone, *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.crop_padding=4"], "data.crop_padding is 4"),
        (["--data.pad_to=40"], "data.pad_to is 40"),
        (["--data.download=true"], "data.download is True"),
        (["--data.validation_resize=31"], "at least data.image_size 32"),
        (["--data.crop_scale=[0, 1]"], "data.crop_scale"),
        (["--data.crop_scale=[0.5, 1.5]"], "data.crop_scale"),
        (["--data.crop_scale=[0.5]"], "data.crop_scale"),
        (["--data.crop_ratio=[2, 1]"], "data.crop_ratio"),
        (["--data.resize_schedule=[[2, 64], [1, 32]]"], "rising epochs"),
        (["--data.resize_schedule=[[0, 64, 1]]"], "data.resize_schedule"),
        (["--data.resize_schedule=[[-1, 64]]"], "data.resize_schedule"),
        (["--data.hw_decoder_load=1.5"], "data.hw_decoder_load"),
        (["--data.prefetch=0"], "data.prefetch is 0"),
        (["--data.threads=-1"], "data.threads is -1"),
        (["--data.interpolation=nearest"], "data.interpolation"),
        (["--data.on_bad_image=skip"], "data.on_bad_image"),
    ],
)
def test_values_that_a_folder_cannot_have_are_refused(flags, says):
    assert says in refusal(command_line.load, [*FLAGS, "--data.root=somewhere", *flags])


@pytest.mark.parametrize(
    "flag",
    [
        "augment=pskd-imagenet",
        "image_size=64",
        "index_path=x",
        "val_index_path=x",
        "resize_schedule=[[0, 8]]",
        "crop_scale=[0.5, 1]",
        "crop_ratio=[0.5, 1]",
        "validation_resize=300",
        "interpolation=cubic",
        "on_bad_image=substitute",
        "decoder=cpu",
        "hw_decoder_load=0.5",
        "threads=2",
        "prefetch=3",
    ],
)
def test_keys_of_folders_are_refused_for_data_in_memory(flag):
    text = refusal(command_line.load, ["--recipe=digits-pskd", f"--data.{flag}"])
    assert f"data.{flag.split('=')[0]}" in text
    assert "only data.name imagefolder" in text


@pytest.mark.slow
def test_two_ranks_refuse_different_classes_once(tmp_path):
    root = make_splits(tmp_path / "photos")
    (root / "val" / "class002").rename(root / "val" / "zebra")
    assert_refused(train(tmp_path / "run", *flags_on(root)), "different classes", "zebra")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_two_ranks_refuse_mixed_decoding_without_a_gpu(folder, tmp_path):
    job = train(tmp_path / "run", *flags_on(folder, "--data.decoder=mixed"))
    assert_refused(job, "data.decoder mixed decodes on a GPU")
    assert not (tmp_path / "run").exists()
