#!/usr/bin/env bash
# Make the virtual environment .venv and install this project into it, once.
#
#   scripts/setup.sh          what training, and reports of it, need
#   scripts/setup.sh dev      and what the tests need
#
# PYTHON=python3.12 chooses the interpreter (3.11 or newer), PSKD_CUDA=cu12 the CUDA generation of
# DALI (default: what nvidia-smi reports, else cu13; without a GPU, cu13 runs on the CPU).
# PSKD_BIN=DIR names the bin of an environment that is complete, as in the container: it is used by
# all scripts instead of .venv/bin, and nothing is installed.
set -euo pipefail
source "$(dirname "$0")/common.sh"
cd "$(dirname "$0")/.."

if [ -n "${PSKD_BIN:-}" ]; then
    for program in python torchrun pskd ${1:+pytest}; do
        [ -x "$PSKD_BIN/$program" ] ||
            die "PSKD_BIN $PSKD_BIN lacks $program: install pskd there, or unset it"
    done
    exit 0
fi

python=${PYTHON:-python3}
cuda=${PSKD_CUDA:-}
if [ -z "$cuda" ]; then
    cuda=cu13
    if command -v nvidia-smi >/dev/null && nvidia-smi | grep -q 'CUDA Version: 12'; then cuda=cu12; fi
fi
extras="$cuda,report${1:+,$1}"

# A stamp per set of extras: installed again only when what is asked for has changed.
stamp=.venv/.installed-$extras
wanted=$(cat pyproject.toml requirements.lock | sha256sum)
for made in "$stamp" ".venv/.installed-$cuda,report,dev"; do # the tests' has all that training needs
    if [ -f "$made" ] && [ "$(cat "$made")" = "$wanted" ]; then exit 0; fi
done

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$python is older than 3.11; name another with PYTHON=python3.11 $0"
[ -x .venv/bin/python ] || "$python" -m venv .venv
echo "installing into .venv (several GB, some minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --constraint requirements.lock --editable ".[$extras]"
echo "$wanted" >"$stamp"
