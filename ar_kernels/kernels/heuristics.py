"""Tile sizes from shapes alone: no autotuning. Measured on one H200 (132 multiprocessors), bf16, K = 4; for other
chips and dtypes the largest cut that compiles without register spills."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

MOST_REGISTERS = 255
"""Asked for by name, this many keep the compiler from spilling a few for the sake of occupancy."""


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
    maxnreg: int | None  # registers a thread may take; None: as many as let the compiler's favoured occupancy be


class Chip(NamedTuple):
    """What the cuts depend on of a GPU."""

    processors: int  # multiprocessors
    capability: int  # major compute capability: 8 Ampere and Ada, 9 Hopper, 10 and more Blackwell


@cache
def chip(device_index: int) -> Chip:
    """The chip of a CUDA device. Triton's interpreter (index -1) passes for a small one: its loops stay short."""
    if device_index < 0:
        return Chip(4, 9)
    properties = torch.cuda.get_device_properties(device_index)
    return Chip(properties.multi_processor_count, properties.major)


@cache
def sweep_config(
    images: int,
    channels: int,
    positions: int,
    heads: int,
    itemsize: int,
    vector: int,
    chip: Chip,
    backward: bool = False,
    tapped: bool = False,
) -> SweepConfig:
    """The cut of one sweep. heads counts the mean's row too; itemsize is the feature map's, in bytes; vector is how
    many of its elements load at once; tapped: the backward also reads an upstream gradient."""
    # 16 is the least inner size of a matrix product on the tensor cores; the backward sums over heads.
    head_tile = max(16, next_power_of_2(heads))
    channel_tile = max(16, next_power_of_2(channels))
    half = itemsize == 2
    # Hopper's matrix units read tiles from shared memory; elsewhere, in float32, and where wide tiles load element by
    # element, held tiles spill registers.
    held = half and head_tile <= 64 and channel_tile <= (512 if vector > 1 else 128)
    held = held and channel_tile * head_tile <= 8192 and (chip.capability == 9 or not backward)
    num_warps, num_stages = 4, 3 if half else 2
    if held:
        elements = 8192 if backward or chip.capability != 9 else 16384
        position_tile = max(16, min(128, elements // channel_tile))
        if backward and channel_tile == 512 and (vector < 8 or tapped):
            num_warps = 8
    else:
        channel_tile = min(channel_tile, max(32, (128 if half else 64) * 16 // head_tile))
        position_tile = 64 if half and vector > 1 else 32
        if backward and vector == 1 and tapped:
            position_tile = 16
        if head_tile > 64:
            position_tile, num_warps = 32, 8
            channel_tile = channel_tile if half else 16
        if backward and not (half and chip.capability == 9):
            channel_tile, position_tile = min(channel_tile, 64), 16
            num_warps, num_stages = 4 if half else 8, 2
    position_tile = min(position_tile, max(16, next_power_of_2(positions)))
    tiles = -(-positions // position_tile)
    # Enough programs to fill the chip about twice; a split forward costs a merge, so not for the last few percent.
    full = 2 * images >= 3 * chip.processors and not backward
    wanted = 1 if full else -(-2 * chip.processors // max(images, 1))
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
        num_stages=1 if itemsize == 8 else num_stages,
        maxnreg=None if chip.capability == 9 else MOST_REGISTERS,
    )
