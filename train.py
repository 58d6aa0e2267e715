"""Entry for torchrun, deepspeed and plain python: `train.py --recipe NAME [...]`."""

import sys

from pskd.entry import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
