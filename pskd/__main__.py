"""`python -m pskd`, and `torchrun -m pskd`: train.py where only the package is installed."""

from pskd.entry import run

run()
