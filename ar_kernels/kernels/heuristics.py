"""Tile sizes from shapes alone: no autotuning. Measured on one H200 (132 multiprocessors), bf16, K = 4; for other
chips and dtypes the largest cut that compiles without register spills on the layers of tests/offline.py."""

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from triton.runtime import driver

MOST_REGISTERS = 255
"""Asked for by name, this many keep the compiler from spilling a few for the sake of occupancy."""

SUMS_OVER_LANES = {"enable_fp_fusion": False}
"""Options of a kernel that stores sums of products over lanes. A product fused into the first addition is rounded in
one lane and not in its partner: the lanes' sums differ in the last bit, and a race decides which of them is kept."""

TILES_OF_PROGRAM = 8
"""Position tiles of each program where the cut may not depend on the batch: parts of K heads, written and merged, then
are K bytes for each S_TILE · itemsize of the map. Counted, not measured."""


def next_power_of_2(value: int) -> int:
    return 1 << (value - 1).bit_length()


@dataclass(frozen=True)
class SweepConfig:
    """How a sweep over an image's positions is cut up."""

    held: bool  # all channels of a tile at once; else channels come in chunks, the second time from cache
    channel_tile: int
    parts: int  # held: channel tiles side by side
    wide: bool  # held, and each warp makes the logits' share of one channel tile
    group: int  # channels that are loaded as one row; positions and channels of tiles then count such rows'
    head_tile: int
    position_tile: int
    splits: int  # programs that share one image
    split_length: int  # positions of each, a multiple of position_tile
    per_processor: int  # backward: programs that share one multiprocessor
    fused: bool  # backward: the sweep makes the pooled features' gradients itself
    num_warps: int
    num_stages: int
    maxnreg: int | None  # registers a thread may take; None: as many as let the compiler's favoured occupancy be


class Chip(NamedTuple):
    """What the cuts depend on of a GPU."""

    processors: int  # multiprocessors
    capability: int  # major compute capability: 8 Ampere and Ada, 9 Hopper, 10 and more Blackwell; 0: of AMD
    shared: int  # bytes of shared memory that one program may take
    bandwidth: float = 3.35e12  # bytes a second that its memory could move at most; an H100's where it is not known

    @property
    def amd(self) -> bool:
        return self.capability == 0


@cache
def chip(device_index: int) -> Chip:
    """The chip of a CUDA device. Triton's interpreter (index -1) passes for a small one: its loops stay short."""
    if device_index < 0:
        return Chip(4, 9, 227 * 1024)
    properties = torch.cuda.get_device_properties(device_index)
    capability = properties.major if torch.version.hip is None else 0  # there `major` counts AMD's generations
    known = driver.active.utils.get_device_properties(device_index)
    chip = Chip(properties.multi_processor_count, capability, known["max_shared_mem"])
    kilohertz, bits = known.get("mem_clock_rate", 0), known.get("mem_bus_width", 0)
    return chip._replace(bandwidth=2e3 * kilohertz * bits / 8) if kilohertz * bits else chip  # twice a clock


def channel_parts(channels: int, most: int) -> tuple[int, int]:
    """A power of two, at most `most`, and how many of it hold all channels with the least left over: 320 → (64, 5).
    64 is the least that Hopper's matrix units take."""
    if channels <= 64:
        return max(16, next_power_of_2(channels)), 1
    tile = min((tile for tile in (256, 128, 64) if tile <= most), key=lambda tile: -(-channels // tile) * tile)
    return tile, -(-channels // tile)


def busiest_splits(images: int, tiles: int, programs: int) -> int:
    """The least number of splits of an image that keeps nine of ten programs busy in every round, else the number that
    keeps the most of them."""

    def busy(splits: int) -> float:
        items = images * -(-tiles // -(-tiles // splits))
        return items / (-(-items // programs) * programs)

    most = min(tiles, max(1, -(-2 * programs // images)))
    return next((splits for splits in range(1, most + 1) if busy(splits) >= 0.9), max(range(1, most + 1), key=busy))


@cache
def sweep_config(
    images: int,
    channels: int,
    positions: int,
    heads: int,
    itemsize: int,
    vector: int,
    channels_last: bool,
    chip: Chip,
    backward: bool = False,
    tapped: bool = False,
    alike: bool = False,
    group: int = 1,
) -> SweepConfig:
    """The cut of one sweep. heads counts the mean's row too; itemsize is the feature map's, in bytes; vector is how
    many of its elements load at once; tapped: the backward also reads an upstream gradient. alike: forward, an image is
    cut the same whatever batch it comes in, so that its sums are added in the same order. The backward sums over
    positions only what it sums over images too, and a tile's place does not depend on the splits: its dZ is alike.
    group: tiles.row_group's."""
    half, hopper = itemsize == 2, chip.capability == 9
    channel_tile, parts = channel_parts(channels, 128 if backward else 256)
    padded = channel_tile * parts
    # Heads are the narrow side of the matrix products. 8 is the least width of one (the backward has two columns for
    # each head), 16 that of Hopper's own matrix units, which leave registers free for the long rows that NCHW wants.
    narrow = backward or (half and hopper and (channels_last or not 384 < padded <= 512))
    head_tile = max(8 if narrow else 16, next_power_of_2(heads))
    # Hopper's matrix units read tiles from shared memory; elsewhere, in float32, and where wide tiles load element by
    # element, held tiles spill registers.
    most = 128 if vector == 1 else 640 if backward or not channels_last else 1024
    area = 5120 if backward else 16384
    if not hopper:  # Triton 3.7 fails to compile held tiles for Blackwell's matrix units
        most, area = 0 if backward or chip.capability > 9 else min(most, 512), 8192
    # A tile of so many channels has few positions, whose logits all warps would make: each takes channels of its own.
    wide = not backward and half and hopper and channels_last and vector == 8 and head_tile == 8
    wide = wide and 640 < channels <= 1024
    held = wide or (half and head_tile <= 64 and padded <= most and padded * head_tile <= area)
    grouped_heads = max(4, next_power_of_2(heads))
    if group > 1 and not held and not backward and half and hopper and group * grouped_heads <= 32:
        # Measured at 2048 × 7², where 16 rows are best, and at 1024 × 14², 32 to 64.
        length = max(16, next_power_of_2(group * positions))
        return SweepConfig(
            held=False, wide=False, group=group, channel_tile=16 if group * grouped_heads == 32 else 32, parts=0,
            head_tile=grouped_heads, position_tile=length, splits=1, split_length=length, per_processor=2, fused=False,
            num_warps=4, num_stages=3, maxnreg=None,
        )  # fmt: skip
    num_warps, num_stages, per_processor = 4, 3, 2
    if held and not hopper:
        position_tile = max(16, min(128, 8192 // next_power_of_2(padded)))
    elif wide:
        channel_tile, parts, position_tile = 256, 4, 16
    elif held and backward:
        position_tile = 128 if padded <= 192 and not channels_last else 64
        if padded > 192 or not channels_last:
            num_warps, per_processor = 8, 1
        if padded > 512:
            channel_tile, parts = 64, -(-channels // 64)
        if padded > 512 or (padded > 384 and (tapped or vector * itemsize < 16)):
            num_stages = 2
        if padded > 384 and tapped and vector * itemsize < 16:
            num_stages = 1  # two spill in float16 under Triton 3.6; one takes 7 % longer in bfloat16
    elif held:
        position_tile = 128 if padded <= 192 else 64 if padded <= (384 if head_tile == 8 else 512) else 32
        if padded == 256 and not channels_last and positions > 1024:
            channel_tile, parts, position_tile = 128, 2, 128
        if padded * head_tile > 10240:
            num_warps, num_stages = 8, 2
    else:
        parts = 0
        channel_tile = min(next_power_of_2(max(channels, 16)), max(32, (2048 if half else 1024) // max(head_tile, 16)))
        position_tile = 64 if half and vector > (1 if chip.capability <= 9 else 4) else 32
        num_stages = 3 if half else 2
        if half and hopper and positions <= (256 if vector > 1 else 64) and head_tile <= 16:  # whole images
            position_tile = max(64, next_power_of_2(positions))
            num_stages = 4 if channels_last else 3
            if channels_last and not backward and position_tile == 64 and head_tile == 8:
                channel_tile = min(next_power_of_2(channels), 256)
            if position_tile > 64 or (backward and vector == 1):
                channel_tile = min(channel_tile, 64)
            if position_tile > 64 or vector == 1:
                num_warps = 8
        elif backward and vector == 1 and tapped:
            position_tile = 16
        if head_tile > 64:
            position_tile, num_warps = 32, 8
            channel_tile = channel_tile if half else 16
        if backward and not (half and hopper):
            channel_tile, position_tile = min(channel_tile, 64), 16
            num_warps, num_stages = 4 if half else 8, 2
        elif chip.capability > 10 and head_tile > 8:
            position_tile = min(position_tile, 32)
        elif chip.amd and head_tile > 64:
            position_tile = 16
    position_tile = min(position_tile, max(16, next_power_of_2(positions)))
    while num_stages > 1 and num_stages * position_tile * channel_tile * max(parts, 1) * itemsize > chip.shared:
        num_stages -= 1
    tiles = -(-positions // position_tile)
    if backward:
        splits = busiest_splits(max(images, 1), tiles, per_processor * chip.processors)
    elif alike:
        splits = -(-tiles // (TILES_OF_PROGRAM * (2 if wide else 1)))  # as many positions: a wide tile has half of them
    elif 4 * images <= chip.processors or (2 * images <= chip.processors and channels * positions * itemsize >= 2**19):
        # A merge follows: worth its launch where most of the chip would idle, with two tiles a program at least, four
        # in channels_last where an image has many (measured in bfloat16 with 25 and 49).
        fewest = 4 if half and channels_last and not wide and tiles >= 25 else 2
        splits = max(1, min(-(-tiles // fewest), -(-2 * chip.processors // max(images, 1))))
    else:
        splits = 1
    split_length = -(-tiles // splits) * position_tile
    return SweepConfig(
        held=held,
        wide=wide,
        group=1,
        channel_tile=channel_tile,
        parts=parts,
        head_tile=head_tile,
        position_tile=position_tile,
        splits=-(-positions // split_length),
        split_length=split_length,
        per_processor=per_processor,
        fused=backward and held and (padded * head_tile <= 3072 or (channels_last and not tapped)),
        num_warps=num_warps,
        num_stages=1 if itemsize == 8 else num_stages,
        maxnreg=None if hopper else MOST_REGISTERS,
    )
