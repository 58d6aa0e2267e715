"""Weights of public code under our names: the same networks, other names of their tensors.

For each family, what the public PS-KD code calls its parts. Its blocks are numbered by stage, ours
through the whole network.
"""

import re
from typing import Any

from pskd.models import MODELS

# family -> (where our blocks are, public part -> our part); a part is a name without its tensor
_FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "pskd.models.preact_resnet": ("blocks", {"shortcut.0": "shortcut"}),
    "pskd.models.resnet_cifar": ("blocks", {}),
    "pskd.models.densenet_cifar": ("layers", {}),
    "pskd.models.resnext_cifar": (
        "blocks",
        {
            "conv_1_3x3": "conv1",
            "bn_1": "bn1",
            "classifier": "linear",
            "conv_reduce": "conv1",
            "bn_reduce": "bn1",
            "conv_conv": "conv2",
            "bn": "bn2",
            "conv_expand": "conv3",
            "bn_expand": "bn3",
            "shortcut.shortcut_conv": "shortcut.0",
            "shortcut.shortcut_bn": "shortcut.1",
        },
    ),
    "pskd.models.pyramidnet": ("blocks", {"bn_final": "bn2", "fc": "linear"}),
}
_BLOCK = re.compile(
    r"(?:layer|stage_|dense|trans)(?P<stage>\d+)"  # a transition follows the layers of its stage
    r"(?:\.(?:stage_\d+_bottleneck_)?(?P<index>\d+))?\."
)
# As torchvision's own loader does with its files of DenseNets.
_OLD_DENSE = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def translate(model: str, weights: dict[str, Any]) -> dict[str, Any]:
    """The tensors under the names that the network `model` has here; others keep theirs."""
    family = MODELS[model][0]
    if family == "pskd.models.torchvision_models":
        return {_OLD_DENSE.sub(r"\1\2", name): tensor for name, tensor in weights.items()}
    container, parts = _FAMILIES.get(family, ("", {}))
    places = sorted({place for name in weights if (place := _place(name)) is not None})
    if not container or not places:
        return weights
    number = {place: index for index, place in enumerate(places)}
    translated = {}
    for name, tensor in weights.items():
        place, rest = _place(name), name
        prefix = ""
        if place is not None:
            prefix, rest = f"{container}.{number[place]}.", _BLOCK.sub("", name, count=1)
        part, _, last = rest.rpartition(".")
        translated[f"{prefix}{parts.get(part, part)}.{last}"] = tensor
    return translated


def _place(name: str) -> tuple[int, bool, int] | None:
    """Sorts as the blocks follow one another; None outside of them."""
    found = _BLOCK.match(name)
    if found is None:
        return None
    return int(found["stage"]), found["index"] is None, int(found["index"] or 0)
