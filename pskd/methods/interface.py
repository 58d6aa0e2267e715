"""One interface for all methods: a Batch in; losses and what to remember out.

Letters: B samples, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from pskd.data.batch import Batch
from pskd.methods.sections import MethodSection

Forward = Callable[[Tensor], Tensor]  # images (B, 3, H, W) -> logits (B, C), through the engine


@dataclass(frozen=True)
class Past:
    """What the store knows of a batch: rows_BC float32 (zeros if absent), present_B bool."""

    rows_BC: Tensor
    present_B: Tensor

    def part(self, samples: slice) -> "Past":
        """Of some samples of the batch."""
        return Past(self.rows_BC[samples], self.present_B[samples])


@dataclass(frozen=True)
class Output:
    """loss_B: one loss a sample, unweighted, with gradient. remember_BC: float32, or nothing."""

    loss_B: Tensor
    remember_BC: Tensor | None = None


class Network(Protocol):
    """The network in training, as a method may need it besides the forward pass."""

    def snapshot(self) -> nn.Module:
        """Collective: a frozen copy in evaluation mode, with the buffers of rank 0."""
        ...

    def copy(self) -> nn.Module:
        """A frozen copy in evaluation mode, whose content does not matter yet."""
        ...

    def trained(self, path: str) -> nn.Module:
        """A frozen network of the same architecture in evaluation mode, with weights of a file.

        Raises:
            PskdError: no weights there, or of another architecture or number of classes.
        """
        ...

    def sha256(self, module: nn.Module) -> str:
        """Of its weights and buffers."""
        ...

    def infer(self, module: nn.Module, images_BCHW: Tensor) -> Tensor:
        """Logits float32 (B, C) of a frozen network, in the precision of training."""
        ...


class Method(ABC):
    """A way to train. By default: no peers, nothing to save, the same loss in every epoch.

    Whether it reads `past` and returns what to remember is said by its section. needs_peers: it
    wants an image of another sample of the same class beside each. keeps_network: one more is in
    a checkpoint.
    """

    needs_peers = False
    keeps_network = False

    def __init__(  # noqa: B027 (a default)
        self, section: MethodSection, network: Network | None = None
    ) -> None:
        """section: its options. network: for what the forward pass does not give."""

    @abstractmethod
    def __call__(self, forward: Forward, batch: Batch, past: Past | None) -> Output:
        """The losses of one micro-batch."""

    def begin_epoch(self, epoch: int, epochs: int) -> dict[str, float]:
        """Collective. Set the epoch's constants (alpha, ...); returns those worth a log line."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold of it."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027 (a default)
        """Continue from there.

        Raises:
            PskdError: it was another teacher.
        """
