"""Tile sizes from shapes alone: no autotuning. Chosen for one H100/H200 (132 multiprocessors), bf16, K = 4."""

from dataclasses import dataclass
from functools import lru_cache

import torch


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep over an image's positions is cut up."""

    held: bool  # all channels of a tile at once; else channels come in chunks, the second time from cache
    channel_tile: int
    head_tile: int
    position_tile: int
    splits: int  # programs that share one image
    split_length: int  # positions of each, a multiple of position_tile
    num_warps: int
    num_stages: int


@lru_cache(maxsize=None)
def multiprocessors(device_index: int) -> int:
    """Multiprocessors of a CUDA device; the interpreter (index -1) gets a few, so that its loops stay short."""
    return 4 if device_index < 0 else torch.cuda.get_device_properties(device_index).multi_processor_count


@lru_cache(maxsize=None)
def sweep_config(
    images: int,
    channels: int,
    positions: int,
    heads: int,
    itemsize: int,
    vector: int,
    processors: int,
    backward: bool,
) -> SweepConfig:
    """The cut of one sweep. heads counts the mean's row too; itemsize is the feature map's, in bytes; vector is how
    many of its elements load at once."""
    # 16 is the least inner size of a matrix product on the tensor cores; the backward sums over heads.
    head_tile = max(16, next_power_of_2(heads))
    channel_tile = max(16, next_power_of_2(channels))
    held = channel_tile <= 512 and channel_tile * head_tile <= (8192 if itemsize == 2 else 4096)
    num_warps = 4 if itemsize == 2 else 8
    if held:
        elements = (8192 if backward else 16384) // (1 if itemsize == 2 else itemsize // 2)
        position_tile = max(16, min(128, elements // channel_tile))
    else:
        channel_tile = min(channel_tile, max(32, (128 if itemsize == 2 else 64) * 16 // head_tile))
        position_tile = 64 if itemsize == 2 and not (backward and vector == 1) else 32
    position_tile = min(position_tile, max(16, next_power_of_2(positions)))
    tiles = -(-positions // position_tile)
    # Enough programs to fill the chip about twice; a split forward costs a merge, so not for the last few percent.
    wanted = 1 if 2 * images >= 3 * processors and not backward else -(-2 * processors // max(images, 1))
    splits = max(1, min(tiles, wanted))
    split_length = -(-tiles // splits) * position_tile
    return SweepConfig(
        held=held,
        channel_tile=channel_tile,
        head_tile=head_tile,
        position_tile=position_tile,
        splits=-(-positions // split_length),
        split_length=split_length,
        num_warps=num_warps,
        num_stages=1 if itemsize == 8 else 3 if itemsize == 2 else 2,
    )
