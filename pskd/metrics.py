"""What the paper reports of a classifier, from one compact record per sample.

Letters: N samples (B of one batch), C classes, G groups of equal confidence, K bins.

| measure | unit | source |
|---|---|---|
| top-1 and top-5 error, NLL | %, %, nats | PS-KD (Kim et al., ICCV 2021) |
| ECE | % | Guo et al., On Calibration of Modern Neural Networks, ICML 2017 |
| AURC, E-AURC | x 1000 | Geifman et al., Bias-Reduced Uncertainty Estimation, ICLR 2019 |

Decisions:
- Records are float64 whatever the dtype of the logits; the conversion is exact, so ranks are too.
- Logits become records in blocks of rows: no float64 copy of them all is ever held.
- Equal logits rank by class index, the lower first.
- ECE bins are (lo, hi] with the edges k/num_bins; confidence is clamped to [0, 1], 0 in the first.
- AURC over equal confidences is the mean over all their orders.
- E-AURC subtracts the exact optimum for r errors among n, not its logarithmic approximation.
- A true class of logit -inf is legal and makes the NLL inf; NaN and +inf logits are errors.
- Counts are integers and float sums exactly rounded (`math.fsum`), on the CPU: equal records give
  equal bits in any order, on any number of ranks and threads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray


MEASURES = ("top1_error", "top5_error", "nll", "ece", "aurc", "eaurc")

_BLOCK_VALUES = 1 << 20  # 8 MB in float64; much smaller blocks are slower, as threads must wait


@dataclass(frozen=True, eq=False)
class Records:
    """All that measures and pictures need to know of N samples: 40 bytes each, whatever C is.

    confidence_N: float64, the top-1 softmax probability.
    nll_N: float64, nats.
    rank_N: int64, classes before the true one by logit; 0 is top-1 correct, < 5 top-5 correct.
    label_N, prediction_N: int64, the true class and that of the largest logit.
    """

    confidence_N: Tensor
    nll_N: Tensor
    rank_N: Tensor
    label_N: Tensor
    prediction_N: Tensor

    def __len__(self) -> int:
        return len(self.rank_N)

    @staticmethod
    def concatenate(parts: "Sequence[Records]") -> "Records":
        """Join parts that live on one device; no parts at all give no samples, on the CPU."""
        if not parts:
            return Records.unpack(torch.empty(0, len(fields(Records)), dtype=torch.float64))
        columns = zip(*(part._columns() for part in parts), strict=True)
        return Records(*(torch.cat(column) for column in columns))

    def to(self, device: torch.device | str) -> "Records":
        """The same records on `device`."""
        return Records(*(column_N.to(device) for column_N in self._columns()))

    def pack(self) -> Tensor:
        """One (N, 5) float64 tensor, so that records travel in one collective; loses no bit."""
        return torch.stack([column_N.double() for column_N in self._columns()], dim=1)

    @staticmethod
    def unpack(packed: Tensor) -> "Records":
        """The inverse of `pack`: (N, 5) float64 to Records with integers of int64."""
        confidence_N, nll_N, rank_N, label_N, prediction_N = packed.unbind(dim=1)
        return Records(confidence_N, nll_N, rank_N.long(), label_N.long(), prediction_N.long())

    def arrays(self) -> "dict[str, NDArray[Any]]":
        """What `evaluation.npz` holds: integers as int32, the rest as float64, each (N,)."""
        return {
            "label": self.label_N.to("cpu", torch.int32).numpy(),
            "prediction": self.prediction_N.to("cpu", torch.int32).numpy(),
            "confidence": self.confidence_N.cpu().numpy(),
            "nll": self.nll_N.cpu().numpy(),
            "rank": self.rank_N.to("cpu", torch.int32).numpy(),
        }

    def _columns(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def per_sample(logits_NC: Tensor, labels_N: Tensor) -> Records:
    """Reduce logits to records, in float64, without gradient and without a host sync.

    logits_NC: (N, C), any floating dtype. labels_N: (N,), any integer dtype, on the same device.
    Raises ValueError for a wrong shape or dtype. Values are not looked at, that would sync:
    `measures` refuses what NaN and +inf become, and labels outside [0, C) are the caller's error.
    """
    _check_form(logits_NC, labels_N)
    rows = max(1, _BLOCK_VALUES // logits_NC.shape[1])
    blocks = zip(torch.split(logits_NC.detach(), rows), torch.split(labels_N, rows), strict=True)
    return Records.concatenate([_records(*block) for block in blocks])


def _records(logits_BC: Tensor, labels_B: Tensor) -> Records:
    """`per_sample` of one block. Ranks come from the logits as they are, the rest from float64."""
    label_B1 = labels_B.long()[:, None]
    true_B1 = logits_BC.gather(1, label_B1)
    class_C = torch.arange(logits_BC.shape[1], device=logits_BC.device)
    before_BC = (logits_BC > true_B1) | ((logits_BC == true_B1) & (class_C < label_B1))
    prediction_B = logits_BC.argmax(dim=1)  # of equal ones the first
    top_B = logits_BC.gather(1, prediction_B[:, None])[:, 0].double()
    confidence_B = logits_BC.double().softmax(dim=1).gather(1, prediction_B[:, None])[:, 0]
    return Records(
        confidence_N=confidence_B,
        nll_N=(top_B - true_B1[:, 0].double()) - confidence_B.log(),
        rank_N=before_BC.sum(dim=1, dtype=torch.int32).long(),  # summed as int64: 30 times slower
        label_N=label_B1[:, 0],
        prediction_N=prediction_B,
    )


def measures(records: Records, num_classes: int, num_bins: int = 10) -> dict[str, float | None]:
    """The paper's measures (sources: module docstring), bitwise independent of sample order.

    Keys: top1_error, top5_error, ece in percent; nll in nats; aurc, eaurc x 1000.
    top5_error is None for num_classes < 5. nll is inf if any sample's is.
    Raises ValueError for no samples, a non-finite confidence, a NaN or -inf nll, num_bins < 1.
    """
    records = records.to("cpu")
    check_records(records, num_bins)
    n = len(records)
    wrong_N = records.rank_N > 0
    aurc = _aurc(records.confidence_N, wrong_N)
    return {
        "top1_error": 100 * int(wrong_N.sum()) / n,
        "top5_error": 100 * int((records.rank_N >= 5).sum()) / n if num_classes >= 5 else None,
        "nll": math.fsum(records.nll_N.tolist()) / n,
        "ece": 100 * _ece(records.confidence_N, wrong_N, num_bins),
        "aurc": 1000 * aurc,
        "eaurc": 1000 * (aurc - _optimal_aurc(n, int(wrong_N.sum()))),
    }


def summarize(
    logits_NC: "Tensor | NDArray[Any]", labels_N: "Tensor | NDArray[Any]", num_bins: int = 10
) -> dict[str, float | None]:
    """`measures` of logits held in one piece; the values are checked, so this may sync.

    logits_NC: (N, C), any floating dtype. labels_N: (N,), any integer dtype. Tensors or arrays.
    Raises ValueError as `measures` does, and for a wrong shape or dtype, a label outside [0, C),
    a NaN or +inf logit.
    """
    logits_NC = _as_tensor(logits_NC)
    labels_N = _as_tensor(labels_N).to(logits_NC.device)
    check_values(logits_NC, labels_N)
    return measures(per_sample(logits_NC, labels_N), logits_NC.shape[1], num_bins)


class Accumulator:
    """The streaming form: batches in, records out; keeps 40 bytes per sample on their device."""

    def __init__(self) -> None:
        self._parts: list[Records] = []

    def update(self, logits_BC: Tensor, labels_B: Tensor) -> None:
        """Append the records of one batch: shapes, dtypes and errors as `per_sample`, no sync."""
        self._parts.append(per_sample(logits_BC, labels_B))

    def records(self) -> Records:
        """Everything so far, in order of arrival; before any batch, no samples, on the CPU."""
        return Records.concatenate(self._parts)


def _aurc(confidence_N: Tensor, wrong_N: Tensor) -> float:
    """Mean of the risk over coverage 1/n..n/n."""
    return math.fsum(risk(confidence_N, wrong_N).tolist()) / len(wrong_N)


def risk(confidence_N: Tensor, wrong_N: Tensor) -> Tensor:
    """Error rate among the i most confident samples, i = 1..N: (N,) float64, a fraction.

    confidence_N: float64. wrong_N: bool. Both on the CPU.
    Inside a group of g equal confidences with c errors, the first k hold c * k / g on average.
    """
    _, group_N, size_G = torch.unique(-confidence_N, return_inverse=True, return_counts=True)
    errors_G = torch.bincount(group_N[wrong_N], minlength=len(size_G))
    errors_before_G = errors_G.cumsum(0) - errors_G
    start_G = size_G.cumsum(0) - size_G
    group_of_N = torch.repeat_interleave(size_G)
    covered_N = torch.arange(1, len(group_N) + 1)
    inside_N = covered_N - start_G[group_of_N]
    expected_N = errors_G[group_of_N] * inside_N / size_G[group_of_N].double()
    risk_N: Tensor = (errors_before_G[group_of_N] + expected_N) / covered_N
    return risk_N


def _optimal_aurc(n: int, r: int) -> float:
    """The least AURC that r errors among n samples allow: all of them covered last."""
    return math.fsum(i / (n - r + i) for i in range(1, r + 1)) / n


def _ece(confidence_N: Tensor, wrong_N: Tensor, num_bins: int) -> float:
    """Mean over bins, weighted by count, of |accuracy - mean confidence|, as a fraction."""
    sorted_N, order_N = confidence_N.clamp(0, 1).sort()
    gaps = (sorted_N - (~wrong_N[order_N]).double()).tolist()
    ends = bin_ends(sorted_N.numpy(), num_bins)
    return math.fsum(abs(math.fsum(gaps[a:b])) for a, b in pairwise([0, *ends])) / len(gaps)


def bin_ends(sorted_N: "NDArray[Any]", num_bins: int) -> list[int]:
    """How many of some rising confidences lie in the bins up to each one, that one included."""
    edge_K = np.arange(1, num_bins + 1) / num_bins
    ends: list[int] = np.searchsorted(sorted_N, edge_K, side="right").tolist()
    return ends


def _as_tensor(values: "Tensor | NDArray[Any]") -> Tensor:
    """Arrays that torch cannot share are copied: read-only and reversed ones."""
    if isinstance(values, Tensor):
        return values
    shareable = values.flags.writeable and all(stride >= 0 for stride in values.strides)
    return torch.from_numpy(values if shareable else values.copy())


def _check_form(logits_NC: Tensor, labels_N: Tensor) -> None:
    if logits_NC.ndim != 2 or logits_NC.shape[1] == 0:
        raise ValueError(
            f"the logits have shape {tuple(logits_NC.shape)}: give (N, C), a row per sample, C >= 1"
        )
    if not logits_NC.is_floating_point():
        raise ValueError(f"the logits are {_type(logits_NC)}: give floating-point numbers")
    if labels_N.shape != logits_NC.shape[:1]:
        raise ValueError(
            f"the labels have shape {tuple(labels_N.shape)} beside {len(logits_NC)} rows: "
            f"give one class index per row, ({len(logits_NC)},)"
        )
    if labels_N.dtype == torch.bool or labels_N.is_floating_point() or labels_N.is_complex():
        raise ValueError(f"the labels are {_type(labels_N)}: give class indices, integers")


def _type(values: Tensor) -> str:
    """As numpy calls it."""
    return str(values.dtype).removeprefix("torch.")


def check_values(logits_NC: Tensor, labels_N: Tensor) -> None:
    """Refuse what has no measures; this may sync.

    Raises:
        ValueError: a wrong shape or dtype, a label outside [0, C), a NaN or +inf logit.
    """
    _check_form(logits_NC, labels_N)
    labels_N = labels_N.long()
    num_classes = logits_NC.shape[1]
    bad_labels_N1 = ((labels_N < 0) | (labels_N >= num_classes)).nonzero()
    if len(bad_labels_N1):
        n = int(bad_labels_N1[0])
        raise ValueError(
            f"the labels hold {int(labels_N[n])} at sample {n}, not in [0, {num_classes}): "
            "give class indices that match the columns of the logits"
        )
    if len(logits_NC) and not bool(logits_NC.amax() < math.inf):  # NaN is not either
        bad_logits = (logits_NC.isnan() | logits_NC.isposinf()).nonzero()
        n, c = bad_logits[0].tolist()
        raise ValueError(
            f"the logits hold {len(bad_logits)} NaN or +inf, the first {float(logits_NC[n, c])} "
            f"at sample {n}, class {c}: check the model for divergence or overflow"
        )


def check_records(records: Records, num_bins: int) -> None:
    """Raises ValueError: no samples, or values that no logits give; names the first."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}: give at least 1")
    if not len(records):
        raise ValueError("there are no samples: evaluate at least one")
    bad_by_name = {
        "confidences": (records.confidence_N, ~records.confidence_N.isfinite()),
        "NLLs": (records.nll_N, records.nll_N.isnan() | records.nll_N.isneginf()),
    }
    for name, (value_N, bad_N) in bad_by_name.items():
        if bad_N.any():
            n = int(bad_N.nonzero()[0])
            raise ValueError(
                f"{int(bad_N.sum())} of {len(records)} {name} are illegal, the first "
                f"{float(value_N[n])} at sample {n}: check the model for NaN or +inf logits, "
                "or rows that are -inf throughout"
            )
