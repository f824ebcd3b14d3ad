"""Streaming kernels for the floors, over 32-bit words; imported on a GPU only."""

import triton
import triton.language as tl


@triton.jit
def read_kernel(source, sink, size, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    for start in range(0, size, tl.num_programs(0) * TILE):
        total ^= tl.load(source + start + first, mask=start + first < size, other=0)
    word = tl.xor_sum(total, axis=0)
    if word == 0x5EED5EED:  # hardly ever; the loads must not be optimised away
        tl.store(sink, word)


@triton.jit
def copy_kernel(source, target, size, TILE: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    for start in range(0, size, tl.num_programs(0) * TILE):
        words = tl.load(source + start + first, mask=start + first < size)
        tl.store(target + start + first, words, mask=start + first < size)
