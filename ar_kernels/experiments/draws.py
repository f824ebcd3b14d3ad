"""Random numbers that are functions of what they are for: of a seed, a stream, an image's number and a column.

Made of integer operations on tensors, so a CPU and a GPU draw the same, nothing is remembered between calls, and a
captured CUDA graph draws anew at each replay when the numbers it is given change.
"""

import numpy as np
import torch
from torch import Tensor

TRAIN, TEST, ORDER, HELD_OUT = range(4)
"""Streams that never meet: training images, the test set's clutter, the order of an epoch, what is held out."""

_BITS = 31


def draw(seed: int, stream: int, numbers: Tensor, columns: int) -> Tensor:
    """numbers [B] in int64 → [B, columns], each uniform on 0 … 2³¹ − 1: splitmix64 of image and column."""
    key = np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64).view(np.int64)[0]
    state = _mix(numbers * _GOLDEN + int(key))
    column = torch.arange(1, columns + 1, device=numbers.device) * _GOLDEN
    return (_mix(state.unsqueeze(1) + column) >> 33) & (2**_BITS - 1)


def below(high: int, draws: Tensor) -> Tensor:
    """Uniform on 0 … high − 1, to within high / 2³¹."""
    return (draws * high) >> _BITS


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_FACTORS = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, whose products wrap; the masks make shifts of negative numbers logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FACTORS[0]
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _FACTORS[1]
    return x ^ ((x >> 31) & (2**33 - 1))
