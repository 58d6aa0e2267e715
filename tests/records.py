"""Records of samples, and hypothesis strategies that draw samples."""

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from pskd.metrics import Records

# Wall-clock limits would make these tests depend on what else the machine does.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def make(confidence, rank, nll=None):
    """Of class 0 throughout; what is wrong was taken for class 1."""
    rank = torch.tensor(rank, dtype=torch.int64)
    return Records(
        torch.tensor(confidence, dtype=torch.float64),
        torch.tensor([0.5] * len(rank) if nll is None else nll, dtype=torch.float64),
        rank,
        torch.zeros_like(rank),
        rank.clamp(max=1),
    )


edges = st.integers(0, 30).map(lambda k: k / 10 if k <= 10 else (k - 10) / 20)
confidences = edges | st.floats(0, 1)
samples = st.lists(
    st.tuples(confidences, st.integers(0, 7), st.floats(0, 1e3)), min_size=1, max_size=60
)
