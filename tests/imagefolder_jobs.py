"""Jobs on a folder of small JPEGs: its splits, and their flags."""

from tests.decoding import SEED
from tests.photos import make_folder

EPOCHS = 6
SIZES = ("--data.image_size=32", "--data.validation_resize=36")
FLAGS = (
    "--data.name=imagefolder",
    *SIZES,
    "--data.flip=true",
    "--model.name=preact_resnet8_w16",
    "--method.name=pskd",
    "--train.batch_size=24",
    f"--train.epochs={EPOCHS}",
    f"--train.seed={SEED}",
    "--schedule.milestones=[3]",
    "--checkpoint.every_steps=1",
    "--run.threads=1",
)


def make_splits(root):
    """61 images to train and 15 to validate, of 3 classes."""
    make_folder(root / "train", classes=3, per_class=20, median_side=56)
    extra = root / "train" / "class002" / "a last one.JPEG"
    extra.write_bytes((root / "train/class002/image00000.JPEG").read_bytes())
    make_folder(root / "val", classes=3, per_class=5, median_side=56, seed=1)
    return root


def flags_on(root, *more):
    return (*FLAGS, f"--data.root={root}", *more)
