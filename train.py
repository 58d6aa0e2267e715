"""Entry for torchrun, deepspeed and plain python: `train.py --recipe NAME [...]`."""

from pskd.entry import run

if __name__ == "__main__":
    run()
