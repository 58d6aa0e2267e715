"""Temperature scaling (Guo et al., ICML 2017): softmax(z / T), with T fitted on held-out samples.

Letters: N samples, B of a block, C classes.
"""

import math

import torch
from scipy.optimize import brentq
from torch import Tensor

from pskd.errors import PskdError
from pskd.words import counted

_FIRST, _WIDEST = 1.0, 8.0  # of |log T|
_UTMOST = 600.0  # of |log T|: as good as infinite, and finite in float64
_BLOCK_VALUES = 1 << 22  # as of the measures


def fit(logits_NC: Tensor, labels_N: Tensor, source: str) -> float:
    """The T that minimises the NLL of softmax(logits / T), in float64.

    The NLL is convex in 1 / T, so its derivative has one root at most. logits_NC: (N, C), finite
    or -inf. source: what the samples are called in messages.

    Raises:
        PskdError: no T minimises it: all samples are right, or chance is better than the network.
    """

    def slope(log_t: float) -> float:
        return _slope(logits_NC, labels_N, math.exp(-log_t))

    # Around T = 1, where most roots are, and no wider than need be: a look at all logits each.
    low, high = -_FIRST, _FIRST
    at_low, at_high = slope(low), slope(high)
    while at_low <= 0 and low > -_WIDEST:
        low, at_low = 2 * low, slope(2 * low)
    while at_high >= 0 and high < _WIDEST:
        high, at_high = 2 * high, slope(2 * high)
    if at_low > 0 > at_high:
        return math.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-14))
    if math.isnan(at_low):
        reason = "the logit of a true class is -inf"
    elif at_low == at_high == 0:
        reason = "their logits are the same for all classes"
    elif at_low <= 0:
        reason = "all of them are predicted right, whatever the confidence"
        if slope(-_UTMOST) > 0:
            reason = f"the best is below {math.exp(low):.2g}, where the search ends"
    else:
        reason = "equal chances for all classes fit them better than the logits do"
        if slope(_UTMOST) < 0:
            reason = f"the best is above {math.exp(high):.4g}, where the search ends"
    raise PskdError(
        f"no temperature fits the {counted(len(labels_N), 'sample')} of {source}: {reason}. Fit on "
        "other or more samples, or leave the fit out."
    )


def _slope(logits_NC: Tensor, labels_N: Tensor, beta: float) -> float:
    """Derivative of the mean NLL by beta = 1 / T: mean over samples of E_p[z] - z_true."""
    rows = max(1, _BLOCK_VALUES // logits_NC.shape[1])
    sums = []
    for logits_BC, labels_B in zip(
        torch.split(logits_NC, rows), torch.split(labels_N, rows), strict=True
    ):
        z_BC = logits_BC.to(torch.float64, copy=True)
        z_BC -= z_BC.amax(dim=1, keepdim=True)
        true_B = z_BC.gather(1, labels_B.long()[:, None])[:, 0]
        chance_BC = (beta * z_BC).softmax(dim=1)
        # A class that is ruled out has chance 0: it counts nothing, and not 0 times infinity.
        expected_B = chance_BC.mul_(z_BC.clamp_(min=-1e300)).sum(dim=1)
        gap_B = torch.where(true_B.isneginf(), math.nan, expected_B - true_B)
        sums += gap_B.tolist()
    return math.fsum(sums) / len(sums)
