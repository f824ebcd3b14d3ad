"""How sweeps are cut: everything is covered, and what is compiled does not depend on the batch."""

import math

import pytest
import torch

pytest.importorskip("triton", reason="the triton package is not installed")

from ar_kernels.kernels import attend3x3  # noqa: E402
from ar_kernels.kernels.heuristics import (  # noqa: E402
    MOST_REGISTERS,
    Chip,
    busiest_splits,
    channel_parts,
    next_power_of_2,
    sweep_config,
)
from ar_kernels.kernels.tiles import map_strides, row_group  # noqa: E402

CHANNELS = (1, 3, 16, 64, 65, 96, 160, 320, 384, 640, 1024, 2048)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("most", [128, 256])
def test_channel_parts_hold_all_channels_and_waste_less_than_one(channels, most):
    tile, count = channel_parts(channels, most)
    assert tile & (tile - 1) == 0 and 16 <= tile <= most
    assert (count - 1) * tile < channels <= count * tile


@pytest.mark.parametrize(
    "images, tiles, programs, splits",
    [(128, 16, 132, 1), (128, 16, 264, 2), (64, 4, 132, 2), (8, 13, 132, 13), (256, 49, 132, 1), (1, 49, 132, 49)],
)
def test_splits_keep_programs_busy(images, tiles, programs, splits):
    assert busiest_splits(images, tiles, programs) == splits


@pytest.mark.parametrize(
    "images, channels, positions, itemsize, channels_last, splits",
    [
        (1, 256, 3136, 2, True, 13),
        (1, 256, 3136, 2, False, 13),  # 25 tiles of 128 positions
        (8, 512, 784, 2, True, 7),  # 25 tiles
        (8, 512, 784, 2, False, 7),  # 13
        (32, 96, 3136, 2, True, 7),
        (1, 160, 1024, 2, True, 4),  # eight tiles
        (1, 1024, 196, 2, True, 7),  # 13 of a wide cut's
        (1, 2048, 784, 4, True, 13),  # of 32 positions
    ],
)
def test_splits_of_few_images(images, channels, positions, itemsize, channels_last, splits):
    """Forward: four tiles a program at least where that was measured, else two."""
    chip = Chip(132, 9, 227 * 1024)
    assert sweep_config(images, channels, positions, 4, itemsize, 8, channels_last, chip).splits == splits


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("capability", [8, 9, 10])
def test_splits_cover_every_position_and_tiles_are_those_of_any_batch(backward, channels_last, itemsize, capability):
    for channels in CHANNELS:
        for positions in (1, 49, 196, 1024, 3136):
            compiled = set()
            for images in (1, 2, 8, 33, 64, 128, 257):
                arguments = (
                    images,
                    channels,
                    positions,
                    4,
                    itemsize,
                    4,
                    channels_last,
                    Chip(132, capability, 99 * 1024),
                )
                config = sweep_config(*arguments, backward=backward)
                assert config.splits * config.split_length >= positions > (config.splits - 1) * config.split_length
                assert config.split_length % config.position_tile == 0
                assert not config.held or config.parts * config.channel_tile >= channels
                assert not config.fused or config.held
                names = (
                    "held",
                    "wide",
                    "channel_tile",
                    "parts",
                    "head_tile",
                    "position_tile",
                    "fused",
                    "num_warps",
                    "num_stages",
                )
                compiled.add(tuple(getattr(config, name) for name in names))
            assert len(compiled) == 1, (channels, positions)


@pytest.mark.parametrize("capability", [8, 9, 10])
@pytest.mark.parametrize("channels_last", [False, True])
def test_alike_an_image_is_cut_the_same_in_any_batch_and_on_more_processors(channels_last, capability):
    for channels in CHANNELS:
        for positions in (1, 49, 1024, 3136, 100000):
            cuts = {
                sweep_config(
                    images,
                    channels,
                    positions,
                    4,
                    2,
                    8,
                    channels_last,
                    Chip(processors, capability, 99 * 1024),
                    alike=True,
                )
                for images in (1, 2, 33, 257)
                for processors in (4, 132)
            }
            assert len(cuts) == 1
            assert next(iter(cuts)).splits > 1 or positions <= 1024


@pytest.mark.parametrize(
    ("sizes", "strides", "group"),
    [
        ((2, 136, 7, 7), (6664, 49, 7, 1), 8),  # 49 elements: only eight channels are whole 16 bytes
        ((2, 136, 14, 14), (26656, 196, 14, 1), 2),
        ((2, 136, 12, 12), (19584, 144, 12, 1), 1),  # aligned as they are
        ((2, 132, 7, 7), (6468, 49, 7, 1), 1),  # no whole number of groups
        ((2, 136, 15, 15), (30600, 225, 15, 1), 1),  # too long a row
        ((2, 136, 7, 7), (6664, 1, 952, 136), 1),  # channels_last
        ((2, 136, 7, 7), (6800, 50, 7, 1), 1),  # a gap between channels
        ((2, 136, 7, 7), (6665, 49, 7, 1), 1),  # images that start anywhere
    ],
)
def test_channels_that_fill_whole_16_bytes_together_are_one_row(sizes, strides, group):
    positions = math.prod(sizes[2:])
    assert row_group(map_strides(sizes, strides, 2), sizes[1], positions, 2) == group
    cut = sweep_config(256, sizes[1], positions, 4, 2, 1, False, Chip(132, 9, 227 * 1024), group=group)
    assert cut.group == group and (group == 1 or (cut.splits == 1 and cut.position_tile >= group * positions))


@pytest.mark.parametrize("heads", [1, 4, 16])
@pytest.mark.parametrize("height, width", [(1, 1), (7, 7), (14, 14), (5, 300), (56, 56), (300, 3), (1, 70000)])
def test_bands_of_3x3_heads_cover_every_line_and_their_scratch_is_no_larger_than_dz(heads, height, width, monkeypatch):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    for images in (1, 32, 128, 257):
        size, strides = (images, 96, height, width), (96 * height * width, 1, 96 * width, 96)
        cut = attend3x3._cut(torch.Size(size), strides, torch.bfloat16, 0, heads, "ieee")
        sums = attend3x3._tap_sums(cut, images, heads, of_image=True, parts=1)
        items, bands, lines, pitch = sums.launch.sizes[:4]
        assert bands * lines >= height > (bands - 1) * lines and items == images * bands
        assert sums.launch.grid[0] == min(items, 2 * 132)
        assert pitch >= (lines + 2) * width + 32 and sums.scratch == (sums.launch.grid[0], 9 * heads, pitch)
        assert math.prod(sums.scratch) * 4 <= math.prod(size) * 2 or lines == 1


@pytest.mark.parametrize("images, height, width", [(1, 1, 33), (3, 5, 64), (256, 56, 56), (2, 300, 256)])
def test_lines_that_are_tiles_are_shared_among_programs_that_run_at_once(images, height, width, monkeypatch):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    size, strides = (images, 96, height, width), (96 * height * width, 1, 96 * width, 96)
    launch, scratch, _ = attend3x3._sums(
        attend3x3._cut(torch.Size(size), strides, torch.bfloat16, 0, 4, "ieee"), images, 4, True
    )
    all_lines, lines = launch.sizes[:2]
    tile, programs = launch.constants["S_TILE"], launch.grid[0]
    assert scratch is None and launch.kernel is attend3x3.line_sums_kernel and tile >= width
    assert programs * tile <= 4 * 64 * 132 and (programs - 1) * lines < all_lines == images * height <= programs * lines


@pytest.mark.parametrize(
    "width, heads, dtype",
    [
        (32, 4, torch.bfloat16),
        (257, 4, torch.bfloat16),
        (56, 4, torch.float32),
        (56, 17, torch.float16),
        (112, 16, torch.bfloat16),
    ],
)
def test_other_maps_sum_over_taps_in_bands(width, heads, dtype, monkeypatch):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    cut = attend3x3._cut(torch.Size((2, 96, 8, width)), (768 * width, 1, 96 * width, 96), dtype, 0, heads, "ieee")
    assert attend3x3._sums(cut, 2, heads, False).launch.kernel is attend3x3.tap_sums_kernel


@pytest.mark.parametrize(
    "images, channels, width, heads, dtype, forward, backward",
    [
        (256, 256, 56, 4, torch.bfloat16, True, True),
        (120, 136, 33, 3, torch.bfloat16, True, True),
        (256, 256, 56, 4, torch.float16, True, False),
        (140, 256, 56, 4, torch.bfloat16, False, True),  # most multiprocessors would wait for the last images
        (58, 136, 64, 3, torch.bfloat16, False, True),
        (50, 256, 56, 4, torch.bfloat16, False, False),  # few lines a program
        (256, 256, 32, 4, torch.bfloat16, False, False),
        (256, 256, 65, 4, torch.bfloat16, False, False),
        (256, 128, 56, 4, torch.bfloat16, False, False),
        (256, 264, 56, 4, torch.bfloat16, False, False),
        (256, 256, 56, 2, torch.bfloat16, False, False),
        (256, 256, 56, 5, torch.bfloat16, False, False),
        (256, 256, 56, 4, torch.float32, False, False),
    ],
)
def test_lines_with_all_their_channels_are_summed_and_pooled_at_once(
    images, channels, width, heads, dtype, forward, backward, monkeypatch
):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    size, strides = torch.Size((images, channels, 56, width)), (56 * width * channels, 1, width * channels, channels)
    plan = attend3x3._forward_plan.__wrapped__(size, strides, dtype, 0, heads, heads, "ieee", False, False)
    assert (plan.at_once is not None) == forward and plan.parts[1] == plan.gates.constants["PARTS"]
    plan = attend3x3._forward_plan.__wrapped__(size, strides, dtype, 0, heads, heads, "ieee", True, False)
    assert plan.at_once is None  # the batch may not decide how an image is summed
    cut = attend3x3._cut(size, strides, dtype, 0, heads, "ieee")
    launch = attend3x3._line_gradients(cut, images, dtype, heads, 1)
    assert (launch is not None) == backward
    if backward:
        (programs, _, _), (all_lines, lines) = launch.grid, launch.sizes[:2]
        assert programs <= 132 and (programs - 1) * lines < all_lines == images * 56 <= programs * lines
    fast = Chip(132, 9, 227 * 1024, bandwidth=4.9e12)
    monkeypatch.setattr(attend3x3, "chip", lambda index: fast)
    assert attend3x3._whole_lines(attend3x3._cut(size, strides, dtype, 0, heads, "ieee"), heads) is None


@pytest.mark.parametrize(
    ("images", "channels", "side", "heads", "dtype", "gated_alone", "alike", "expected"),
    [
        (256, 2048, 7, 4, torch.bfloat16, True, False, True),
        (256, 2048, 7, 4, torch.bfloat16, False, False, False),  # P has a gradient of its own
        (256, 2048, 7, 4, torch.bfloat16, True, True, False),  # the batch decides whether an image is a tile
        (256, 2048, 7, 4, torch.float16, True, False, False),
        (256, 2048, 7, 3, torch.bfloat16, True, False, False),
        (256, 1024, 14, 4, torch.bfloat16, True, False, False),
        (8, 2048, 7, 4, torch.bfloat16, True, False, False),  # images are shared by several programs
    ],
)
def test_images_that_are_tiles_need_neither_p_nor_dp(
    images, channels, side, heads, dtype, gated_alone, alike, expected, monkeypatch
):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    size, strides = torch.Size((images, channels, side, side)), (channels * side**2, 1, channels * side, channels)

    def plan(taps_first):
        return attend3x3._backward_plan.__wrapped__(
            size, strides, None, strides, dtype, 0, heads, heads, True, True, "ieee", taps_first, alike, gated_alone
        )

    assert (plan(False).gated_sums is not None) == expected
    assert plan(False).gradient.constants["GATED"] == (heads if expected else 0)
    if expected:
        assert plan(False).gated_sums.turn is not None and plan(True).gated_sums.turn is None


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("side", [1, 7, 14, 56])
@pytest.mark.parametrize("images", [1, 8, 64, 256])
def test_shares_of_3x3_weights_take_no_more_than_an_eighth_of_dz_or_one_an_image(images, side, itemsize, monkeypatch):
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, 9, 227 * 1024))
    channels, heads = 256, 4
    size, strides = torch.Size((images, channels, side, side)), (channels * side**2, 1, channels * side, channels)
    plan = attend3x3._backward_plan.__wrapped__(
        size, strides, None, strides, {2: torch.bfloat16, 4: torch.float32}[itemsize], 0, heads, heads, True, True,
        "ieee", True, False, True,
    )  # fmt: skip
    share, dz = 9 * heads * channels * 4, size.numel() * itemsize
    programs, chunks, _ = (plan.at_once or plan.mask_weights).grid
    assert programs * share <= max(dz // 8, images * share) and plan.weights.sizes == (programs, images)
    assert programs >= min(images, 132 // chunks, dz // 8 // share)
    programs, chunks, _ = plan.gradient.grid
    items, splits = plan.gradient.sizes[:2]
    assert programs == min(items, max(1, 2 * 132 // chunks)) and items == images * splits


@pytest.mark.parametrize(
    ("heads", "dtype", "capability", "channel_tile", "registers"),
    [
        (4, torch.bfloat16, 9, 256, None),
        (16, torch.bfloat16, 9, 64, None),
        (4, torch.float32, 9, 64, MOST_REGISTERS),
        (4, torch.float16, 8, 256, MOST_REGISTERS),
        (4, torch.float32, 8, 64, MOST_REGISTERS),
    ],
)
def test_channel_tiles_of_3x3_heads_fill_their_area(heads, dtype, capability, channel_tile, registers, monkeypatch):
    """16,384 sums in half precision, a quarter in float32, among taps and heads padded to a power of two."""
    monkeypatch.setattr(attend3x3, "chip", lambda index: Chip(132, capability, 160 * 1024))
    cut = attend3x3._cut(torch.Size((2, 512, 7, 7)), (25088, 1, 3584, 512), dtype, 0, heads, "ieee")
    assert cut.channel_tile(16384, 256) == channel_tile and cut.maxnreg == registers


@pytest.mark.parametrize("channels", [3, 256, 264, 2048])
def test_gates_of_3x3_heads_cover_all_channels_in_chunks_that_a_program_holds(channels):
    tile, chunks = attend3x3._channel_chunks(channels)
    assert tile == next_power_of_2(tile) <= 256 and (chunks - 1) * tile < channels <= chunks * tile


@pytest.mark.parametrize(
    ("sizes", "strides", "itemsize", "vector"),
    [
        ((2, 8, 4, 6), (192, 24, 6, 1), 2, 8),  # a channel's rows follow each other: 24 positions, however short a row
        ((2, 8, 24), (192, 24, 1), 2, 8),
        ((2, 8, 14, 14), (1568, 196, 14, 1), 2, 4),
        ((2, 8, 14, 14), (1568, 196, 14, 1), 4, 4),
        ((2, 8, 7, 7), (392, 49, 7, 1), 2, 1),
        ((2, 40, 7, 7), (1960, 1, 280, 40), 2, 8),
        ((2, 12, 7, 7), (588, 1, 84, 12), 2, 4),
        ((2, 8, 4, 16), (1280, 160, 20, 1), 2, 4),  # rows with a gap
        ((2, 8, 4, 6), (384, 48, 12, 2), 2, 1),  # nothing lies next to each other
    ],
)
def test_rows_load_in_vectors_as_wide_as_they_are_aligned(sizes, strides, itemsize, vector):
    assert map_strides(sizes, strides, itemsize).vector == vector


@pytest.mark.parametrize(
    "layout, expected",
    [("channels_last", (80, 1, 0, 2, "c", 8)), ("contiguous", (80, 5, 0, 1, "s", 8))],
)
def test_strides_count_vectors_but_for_the_unit_stride(layout, expected):
    """Kernels are compiled for a unit stride of 1, however wide a row's vectors are."""
    sizes = (2, 16, 5, 8)
    strides = (640, 1, 128, 16) if layout == "channels_last" else (640, 40, 8, 1)
    assert map_strides(sizes, strides, 2)[:6] == expected
