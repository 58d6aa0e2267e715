#!/usr/bin/env bash
# Unpack ImageNet (ILSVRC2012) into the folders that training reads, and index them.
#
#   scripts/imagenet_from_tars.sh TARS_DIR OUT_DIR
#
# TARS_DIR has the three files of image-net.org:
#   ILSVRC2012_img_train.tar (138 GB), ILSVRC2012_img_val.tar (6.3 GB), ILSVRC2012_devkit_t12.tar.gz
# OUT_DIR gets
#   train/<wnid>/*.JPEG     one folder a class
#   val/*.JPEG              flat; its labels are in its index
#   .devkit/                ground truth and class ids, for indexing val again
#
# Started again, it goes on: a folder appears under its name only once it is complete.
# PSKD names the pskd command; the default is the one in .venv, installed if need be.
set -euo pipefail

source "$(dirname "$0")/common.sh"
case ${1:-} in -h|--help) usage; exit 0 ;; esac

[ $# -eq 2 ] || die "give two folders: $0 TARS_DIR OUT_DIR"
tars=$(realpath "$1")
mkdir -p "$2" || die "$2 cannot be made"
out=$(realpath "$2")
cd "$(dirname "$0")/.."

train=$tars/ILSVRC2012_img_train.tar
val=$tars/ILSVRC2012_img_val.tar
devkit=$tars/ILSVRC2012_devkit_t12.tar.gz
for tar in "$train" "$val" "$devkit"; do
    [ -f "$tar" ] || die "$tar is missing; download it from image-net.org"
done
find_pskd

# Folders in the making are hidden, so that no index sees them, and on the disk where they will stay.
making=$out/train/.making
mkdir -p "$out/train" "$out/.devkit"
rm -rf "$making" "$out/.val"

# "BYTES NAME" of each class tar inside the training tar.
members=$(tar -tvf "$train" | awk '{ print $3, $NF }') ||
    die "$train cannot be read to its end; download it again"
[ -n "$members" ] || die "$train is empty; download it again"

truth=$out/.devkit/ILSVRC2012_validation_ground_truth.txt
needed=0
while read -r bytes member; do
    [ -d "$out/train/${member%.tar}" ] || needed=$((needed + bytes))
done <<<"$members"
[ -d "$out/val" ] || needed=$((needed + $(stat -c %s "$val")))
free=$(df --output=avail -B1 "$out" | tail -n 1)
[ "$needed" -le "$free" ] ||
    die "$out has $((free / 1000000)) MB free, but $((needed / 1000000)) MB are needed"

tar -xzf "$devkit" -C "$out/.devkit" --strip-components=2 \
    ILSVRC2012_devkit_t12/data/meta.mat \
    ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt ||
    die "$devkit is not the devkit of ILSVRC2012, or damaged; download it again"

while read -r _ member; do
    class=${member%.tar}
    [ -d "$out/train/$class" ] && continue
    mkdir "$making"
    tar -xOf "$train" --occurrence=1 "$member" | tar -xf - -C "$making" ||
        die "$member in $train cannot be unpacked: no space left, or a damaged file"
    mv "$making" "$out/train/$class"
done <<<"$members"

if [ ! -d "$out/val" ]; then
    mkdir "$out/.val"
    tar -xf "$val" -C "$out/.val" ||
        die "$val cannot be unpacked: no space left, or a damaged file"
    # tar takes an archive that ends between two members for a whole one.
    images=$(find "$out/.val" -type f | wc -l)
    labels=$(wc -l <"$truth")
    [ "$images" -eq "$labels" ] ||
        die "$val has $images images, but the ground truth has $labels labels; download it again"
    mv "$out/.val" "$out/val"
fi

# Unquoted: PSKD may be a command of several words.
$PSKD index "$out" --classes "$out/.devkit/meta.mat" --ground-truth "$truth"
