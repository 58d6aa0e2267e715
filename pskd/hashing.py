"""Counter-based hash: the only source of randomness for data. PURE.

Every draw is a hash of its key, so nothing has a state that could be lost, and adding a stream
never shifts another. The mixer is the finaliser of splitmix64 (Steele, Lea, Flood, 2014); for a
fixed key it is a bijection of the sample id, so two ids never share a value.

The algorithm is frozen (test vectors in tests/test_order.py). A change needs a new version.
"""

import hashlib

import numpy as np
import numpy.typing as npt

ALGORITHM = "splitmix64-1"

_U64 = np.uint64
_GAMMA = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, the increment of splitmix64
_MASK = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> _U64(27))) * _U64(0x94D049BB133111EB)
    return x ^ (x >> _U64(31))


def _stream_key(seed: int, stream: str, epoch: int) -> int:
    """One 64-bit key for (seed, stream, epoch); blake2b, so that near keys share nothing."""
    text = f"{seed}/{stream}/{epoch}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def hash64(
    seed: int, stream: str, epoch: int, ids_N: npt.NDArray[np.int64], columns: int
) -> npt.NDArray[np.uint64]:
    """Hash (seed, stream, epoch, id, column) to 64 bits: uint64 of shape (N, columns)."""
    key = _U64(_stream_key(seed, stream, epoch))
    row_N = _mix(np.asarray(ids_N).astype(np.uint64) * _U64(_GAMMA) + key)
    offset_K = np.array([(k + 1) * _GAMMA & _MASK for k in range(columns)], dtype=np.uint64)
    return _mix(row_N[:, None] + offset_K[None, :])
