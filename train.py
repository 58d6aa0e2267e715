"""Entry for torchrun, deepspeed and plain python: `train.py --recipe NAME [...]`."""

import os
import sys

from pskd.entry import main
from pskd.errors import EXIT_FAILED

if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code == EXIT_FAILED:
        # Groups whose peers are gone, and threads that still work, may abort an orderly end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
