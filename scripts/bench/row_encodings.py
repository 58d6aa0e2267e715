"""What each row encoding costs in bytes and in the gradient of PS-KD.

    python scripts/bench/row_encodings.py
    python scripts/bench/row_encodings.py --generation RUN/store/gen-000019   # of a float32 store

The error is that of d loss / d logits = softmax(z) - t with t = (1 - alpha) onehot + alpha p, alpha
0.8, when p was encoded and decoded: norm of the difference over norm of the exact gradient, over a
batch. The student z is the teacher with noise. Rows of C = 1,000 are made: low-rank logits with
noise, scaled to the entropy given.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from paired import table
from torch import Tensor

from pskd.store.generation import open_generation
from pskd.store.registry import create_encoding

NAMES = ["float32", "float16", "uint8-log", "top100", "top50", "top20", "top5"]
ALPHA, IMAGENET = 0.8, 1_281_167


def made(entropy: float, rows: int = 2048, classes: int = 1000) -> Tensor:
    """Rows of about this mean entropy, in nats."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(rows, 24, generator=generator) @ torch.randn(24, classes, generator=generator)
    logits_BC = low / 24**0.5 + 0.3 * torch.randn(rows, classes, generator=generator)
    small, large = 0.1, 50.0
    for _ in range(40):
        scale = (small * large) ** 0.5
        log_BC = torch.log_softmax(scale * logits_BC, dim=1)
        mean = float(-(log_BC.exp() * log_BC).sum(dim=1).mean())
        small, large = (scale, large) if mean > entropy else (small, scale)
    return log_BC.exp()


def error(probs_BC: Tensor, name: str) -> str:
    """Relative error of the gradient, and 1 - cosine, over all rows."""
    classes = probs_BC.shape[1]
    encoding = create_encoding(name)
    bytes_BR = torch.empty(len(probs_BC), encoding.row_bytes(classes), dtype=torch.uint8)
    encoding.encode(probs_BC, bytes_BR)
    decoded_BC = encoding.decode(bytes_BR, classes)
    generator = torch.Generator().manual_seed(1)
    noise_BC = 0.5 * torch.randn(probs_BC.shape, generator=generator)
    student_BC = torch.softmax(probs_BC.clamp(min=1e-12).log() + noise_BC, dim=1)
    label_B1 = torch.multinomial(probs_BC, 1, generator=generator)
    exact_BC = student_BC - ALPHA * probs_BC
    exact_BC.scatter_add_(1, label_B1, torch.full_like(label_B1, ALPHA - 1, dtype=torch.float32))
    wrong_BC = exact_BC + ALPHA * (probs_BC - decoded_BC)
    relative = float((wrong_BC - exact_BC).norm() / exact_BC.norm())
    angle = 1 - torch.cosine_similarity(exact_BC.double().flatten(), wrong_BC.double().flatten(), 0)
    return f"{relative:.1e}, {max(float(angle), 0):.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--generation", type=Path, help="a finished generation of a run")
    generation = parser.parse_args().generation
    sources = {f"H = {h} nats": made(h) for h in (6.0, 3.0, 1.0)}
    if generation is not None:
        rows = open_generation(generation)
        sources = {str(generation): rows[np.flatnonzero(rows.present_N)]}
    classes = next(iter(sources.values())).shape[1]
    lines = [["encoding", "bytes a row", "ImageNet, GB", *sources]]
    for name in NAMES:
        if name.startswith("top") and int(name[3:]) >= classes:
            continue
        size = create_encoding(name).row_bytes(classes)
        errors = [error(probs_BC, name) for probs_BC in sources.values()]
        lines.append([name, f"{size:,}", f"{size * IMAGENET / 1e9:.2f}", *errors])
    print(table(lines))


if __name__ == "__main__":
    main()
