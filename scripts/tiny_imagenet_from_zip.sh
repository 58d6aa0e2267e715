#!/usr/bin/env bash
# Unpack Tiny-ImageNet into the folders that training reads, and index them.
#
#   scripts/tiny_imagenet_from_zip.sh tiny-imagenet-200.zip OUT_DIR
#
# OUT_DIR gets train/<wnid>/images/*.JPEG and val/<wnid>/*.JPEG. It must not exist yet, and appears
# only when it is complete. PSKD names the pskd command; the default is the one in .venv.
set -euo pipefail

source "$(dirname "$0")/common.sh"
case ${1:-} in -h|--help) usage; exit 0 ;; esac

[ $# -eq 2 ] || die "give the archive and a folder: $0 tiny-imagenet-200.zip OUT_DIR"
[ -f "$1" ] || die "$1 is missing; it is tiny-imagenet-200.zip of cs231n.stanford.edu"
[ ! -e "$2" ] || die "$2 is there already; name another folder, or remove it"
zip=$(realpath "$1")
mkdir -p "$(dirname "$2")" || die "$(dirname "$2") cannot be made"
out=$(realpath "$(dirname "$2")")/$(basename "$2")
cd "$(dirname "$0")/.."
find_pskd

making=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$making"' EXIT
python3 -m zipfile -e "$zip" "$making" ||
    die "$zip cannot be unpacked: no space left, or a damaged file; download it again"
root=$making/tiny-imagenet-200
annotations=$root/val/val_annotations.txt
[ -d "$root/train" ] && [ -f "$annotations" ] ||
    die "$zip is not Tiny-ImageNet: it holds no tiny-imagenet-200/train, or no annotations of val"

# Lines: file, class, four numbers of a box.
while read -r image class _; do
    mkdir -p "$root/sorted/$class"
    mv "$root/val/images/$image" "$root/sorted/$class/" ||
        die "$zip lacks $image, which its annotations name; download it again"
done <"$annotations"
rm -r "$root/val"
mv "$root/sorted" "$root/val"
mkdir "$making/out"
mv "$root/train" "$root/val" "$making/out/"
chmod 755 "$making/out"
mv "$making/out" "$out"

# Unquoted: PSKD may be a command of several words.
$PSKD index "$out"
