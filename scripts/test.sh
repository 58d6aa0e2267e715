#!/usr/bin/env bash
# Run the tests, in the environment of the demo. Arguments go to pytest: scripts/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh dev
exec "${PSKD_BIN:-.venv/bin}/python" -m pytest "$@"
