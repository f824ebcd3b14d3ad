"""tests/emulator runs what csrc/cuda is made of as a GPU would, and finds the mistakes that a GPU hides.

With --device cuda the right answers are a GPU's: whether the emulator is right about them."""

import re
import shutil
from pathlib import Path

import emulator
import pytest
import torch

pytestmark = pytest.mark.skipif(emulator.why_not() is not None, reason=str(emulator.why_not()))

TINY = Path(emulator.__file__).parent / "tiny.cu"
MISTAKES = {
    name.strip(): number
    for enum in re.findall(r"enum \w+ \{(.*?)\};", re.sub("//.*", "", TINY.read_text(encoding="utf-8")), re.DOTALL)
    for number, name in enumerate(enum.strip(" \n,").split(","))
}


@pytest.fixture(scope="module")
def tiny() -> emulator.Library:
    return emulator.build(TINY)


@pytest.fixture(scope="module")
def either(request: pytest.FixtureRequest) -> emulator.Library | emulator.OnGpu:
    if request.config.getoption("--device") == "cpu":
        return request.getfixturevalue("tiny")
    if not shutil.which("nvcc") or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs nvcc and a Hopper GPU")
    return emulator.build_for_gpu(TINY)


def test_nothing_is_missing():
    """What primitives.cuh has in PTX, the emulator has as well."""

    def functions(file: Path) -> set[str]:
        return set(
            re.findall(r"^(?:\w+ )*?(?:void|bool|float4?|u?int\w+\*?) (\w+)\(", file.read_text("utf-8"), re.MULTILINE)
        )

    primitives = emulator.ROOT / "csrc" / "cuda" / "primitives.cuh"
    missing = functions(primitives) - functions(emulator.FOLDER / "primitives.h")
    assert missing == {"swizzled", "packed", "origin", "encode_map"}  # not in PTX
    assert {"mma", "shared_memory", "store_to_cluster"} <= functions(primitives)


# ---------------------------------------------------------------------------------------------- right answers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_round_as_torch_rounds(either, dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = torch.cat([every * factor for factor in (1.0, 1 + 2**-9, 1 + 2**-11, 1 + 3 * 2**-12, 0.3)])
    bits, back = torch.empty(every.shape, dtype=dtype), torch.empty_like(every)
    either.convert(every, bits, back, every.numel() // 2, int(dtype == torch.float16))
    assert torch.equal(bits.nan_to_num(7), every.to(dtype).nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), every.to(dtype).float().nan_to_num(7))


@pytest.mark.parametrize("depth", [16, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_of_fragments(either, dtype, depth):
    """Small integers, so that every order of the sums gives the same."""
    a, b = (torch.randint(-9, 9, size).to(dtype) for size in ((16, 16), (16, 8)))
    c = torch.empty(16, 8)
    either.product(a, b, c, depth, int(dtype == torch.float16))
    assert torch.equal(c, a.float() @ b.float())


@pytest.mark.parametrize("how", range(3))
def test_transposes(either, how):
    matrix = torch.arange(256, dtype=torch.int16).reshape(16, 16)
    result = torch.empty_like(matrix)
    either.transpose(matrix, result, how)
    assert torch.equal(result, matrix.T)


@pytest.mark.parametrize("start", [128, 1024, 1408])
@pytest.mark.parametrize("swizzle, width", [(0, 24), (1, 16), (2, 32), (3, 64)])
@pytest.mark.parametrize("at", [(0, 0, 0, 0), (56, 5, 3, 2), (8, 2, 3, 1), (40, 3, 1, 1), (72, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("rank", [3, 4])
def test_boxes(either, rank, at, swizzle, width, start):
    """Zeros come from beyond the end, and nothing goes there; 16-byte chunks lie where bits of their address say."""
    sizes, box = (72, 7, 5, 3), (width, 5, 3, 2)
    if rank == 3:
        sizes, box, at = (*sizes[:3], 1), (*box[:3], 1), (*at[:3], 0)
    tensor = torch.randn(sizes[::-1]).half()
    indices = [torch.arange(x, x + count) for x, count in zip(at[::-1], box[::-1])]
    inside = torch.ones(())
    for index, size in zip(indices, sizes[::-1]):
        inside = inside[..., None] * ((index >= 0) & (index < size))
    clamped = torch.meshgrid(*(i.clamp(0, size - 1) for i, size in zip(indices, sizes[::-1])), indexing="ij")
    expected = tensor[clamped] * inside.half()
    raw = torch.empty(expected.numel() // 8, 8).half()
    back = torch.full_like(tensor, 7)
    lists = [torch.tensor(sizes), torch.tensor(box), torch.tensor(at, dtype=torch.int32)]
    either.box(tensor, back, *lists, raw, rank, swizzle, start)
    address = torch.arange(raw.shape[0]) * 16 + start
    place = (address ^ ((address >> 7 & (1 << swizzle) - 1) << 4)) - start
    assert torch.equal(raw[place // 16].flatten(), expected.flatten())
    copied = torch.full_like(tensor, 7)
    for position in inside.nonzero().tolist():
        there = tuple(index[i] for index, i in zip(indices, position))
        copied[there] = tensor[there]
    assert torch.equal(back, copied)


@pytest.mark.parametrize("seed", range(4))
def test_runs_of_bytes(either, seed):
    x = torch.randn(100)
    y, again = torch.zeros_like(x), torch.zeros_like(x)
    either.bulk(x, y, again, x.nbytes, 0, seed=seed, strict=seed % 2 == 1)
    assert torch.equal(y, 3 * x) and torch.equal(again, 3 * x)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_a_pipeline(either, seed, strict):
    x = torch.randn(5, 64, 64).half()
    y = torch.empty_like(x)
    either.pipeline(x, y, 5, 0, seed=seed, strict=strict)
    assert torch.equal(y, 2 * x)


@pytest.mark.parametrize("seed", range(4))
def test_named_barriers(either, seed):
    result = torch.zeros(6, 96, dtype=torch.int32)
    either.turns(result, 96, 6, seed=seed)
    assert torch.equal(result, torch.arange(6, dtype=torch.int32).square()[:, None].expand(6, 96))


@pytest.mark.parametrize("seed", range(4))
def test_whether_any_thread_says_so(either, seed):
    numbers, result = torch.full((96,), 9, dtype=torch.int32), torch.full((6, 96), 9, dtype=torch.int32)
    numbers[[0, 40, 95]] = torch.tensor([1, 4, 1], dtype=torch.int32)
    either.any(numbers, result, 96, 6, seed=seed)
    assert torch.equal(result, torch.tensor([0, 1, 0, 0, 1, 0], dtype=torch.int32)[:, None].expand(6, 96))


@pytest.mark.parametrize("seed", range(4))
def test_threads_that_have_left_are_not_waited_for(either, seed):
    result = torch.zeros(3, dtype=torch.int32)
    either.early(result, 3, 16, seed=seed)
    assert result.tolist() == [4950] * 3


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("blocks", [2, 8])
def test_clusters(either, blocks, seed):
    result = torch.zeros(3 * blocks, 4)
    either.cluster(result, 3, blocks, 0, seed=seed)
    sums = (torch.arange(3 * blocks) + 1.0).reshape(3, blocks).sum(1).repeat_interleave(blocks)
    assert torch.equal(result, sums[:, None] * torch.tensor([1.0, 2, 3, 4]))


def test_conflicts_are_counted(tiny):
    """None with the swizzle; of eight rows of 32 bytes without it, two lie in the same banks."""
    x = torch.zeros(5, 64, 64).half()
    tiny.pipeline(x, x.clone(), 5, 0)
    (reads,) = (place for place in tiny.report() if place.name == "load_matrix")
    assert (reads.calls, reads.matrices, reads.wavefronts, reads.worst, reads.early) == (80, 320, 320, 4, 0)
    tiny.transpose(torch.zeros(16, 16), torch.zeros(16, 16), 1)
    (reads,) = (place for place in tiny.report() if place.name == "load_matrix")
    assert (reads.calls, reads.matrices, reads.wavefronts, reads.worst) == (1, 4, 8, 8)
    assert "load_matrix: 1 calls, 4 matrices each in 8 wavefronts, at worst 8" in str(reads)


# ---------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("kNoWait", None),
        ("kNoRelease", None),
        ("kNoStoreBarrier", r"bytes that were written at tiny.cu:\d+ by warp \d, whose lane \d+ has not passed fence"),
        ("kTooManyBytes", r"deadlock: (.|\n)*barrier_wait at tiny.cu.* \(phase 0 lacks 0 of 1 arrivals and 16 bytes\)"),
        ("kTooFewBytes", r"got 16 bytes more than its phase 0 was told to expect, by the copy asked for at tiny.cu:"),
        ("kNoInitFence", r"initialised at tiny.cu:\d+ by a thread that has not passed fence_barrier_init since"),
        ("kNoInitBarrier", "the barrier at offset 32784 was not initialised"),
        ("kNoFence", r"tensor_store: bytes that were written at tiny.cu:\d+ by warp 1, whose lane 0 has not passed"),
        ("kNoWaitRead", r"is written: a copy from it was asked for at tiny.cu:\d+, and bulk_wait_read has not"),
        ("kNoLastWaitRead", "is given back without a bulk_wait_read"),
        ("kNoCommit", "without a bulk_commit"),
        ("kArrivesTwice", None),
        ("kOutside", r"16 bytes at offset \d+ lie outside of the block's 32816 bytes"),
        ("kUnaligned", r"offset \d+ in shared memory is not a multiple of 16\n  block 0, warp \d, lane 5"),
        ("kOnlySome", r"other lanes of the warp wait in load_matrix|all 32 lanes must come"),
        (
            "kPointerOutside",
            r"an access at offset 33792 of block 0's 32816 bytes .*, at (tiny.cu:\d+|instruction \w+), after:",
        ),
        ("kPointerUnaligned", r"an access that is not aligned, .*, at (tiny.cu:\d+|instruction \w+), after:"),
        ("kDivergent", "load_matrix: other lanes of the warp are at tiny.cu"),
        ("kNamedHalf", r"deadlock: (.|\n)*warp 1, 16 lanes from 0 to 15: named_sync at tiny.cu"),
    ],
)
def test_mistakes_in_a_pipeline(tiny, mistake, message):
    """In one of few orders of the threads at the latest: by name, or since the result is wrong."""
    x = torch.randn(5, 64, 64).half()
    found = []
    for seed in range(10):
        y = torch.empty_like(x)
        try:
            tiny.pipeline(x, y, 5, MISTAKES[mistake], seed=seed)
            found.append("the result is wrong" if not torch.equal(y, 2 * x) else "")
        except emulator.EmulatorError as error:
            found.append(str(error))
    print(*found, sep="\n")
    assert any(re.search(message or ".", each) for each in found)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("kNoPlainFence", r"written before tiny.cu:\d+ by warp 1, whose lane 8 has not passed fence_proxy_async since"),
        ("kWritesUnderCopy", "offset 128 is written while a copy to it is under way"),
        ("kNoBulkWait", "the result is wrong"),
    ],
)
def test_mistakes_with_plain_writes(tiny, mistake, message):
    x, y = torch.randn(100), torch.zeros(100)
    found = []
    for seed in range(10):
        again = torch.zeros(100)
        try:
            tiny.bulk(x, y.zero_(), again, x.nbytes, MISTAKES[mistake], seed=seed, strict=True)
            found.append("the result is wrong" if not torch.equal(again, 3 * x) else "")
        except emulator.EmulatorError as error:
            found.append(str(error))
    print(*found, sep="\n")
    assert any(re.search(message, each) for each in found)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("kNoFirstWait", "block . of the cluster may not have started, there was no cluster_wait"),
        ("kLeaves", "block . of the cluster has left"),
        ("kWaitOfBlock", "barrier_wait_cluster is what sees it"),
        ("kNoSuchRank", "the cluster has 2 blocks, not one of rank 2"),
    ],
)
def test_mistakes_in_a_cluster(tiny, mistake, message):
    found = []
    for seed in range(20):
        try:
            tiny.cluster(torch.zeros(2, 4), 1, 2, MISTAKES[mistake], seed=seed)
        except emulator.EmulatorError as error:
            found.append(str(error))
    print(*found, sep="\n")
    assert any(re.search(message, each) for each in found)


def test_more_shared_memory_than_there_is(tiny):
    with pytest.raises(emulator.EmulatorError, match="at most 232448 bytes of shared memory, asked for 232449"):
        tiny.early(torch.zeros(1, dtype=torch.int32), 1, 227 * 1024 + 1)
    tiny.early(torch.zeros(1, dtype=torch.int32), 1, 227 * 1024)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset": 4}, "the data must be aligned to 16 bytes"),
        ({"sizes": (68, 4, 4, 4)}, "strides are multiples of 16"),
        ({"box": (128, 2, 2, 2)}, "the box's rows are longer than the swizzle's"),
        ({"box": (64, 257, 1, 1)}, "1 to 256 elements"),
        ({"start": 64}, "tensor_load to: offset 64 in shared memory is not a multiple of 128"),
        ({"at": (0, 0, -1, 0)}, "tensor_load: coordinate 2 of the box is -1, before the tensor's begin"),
    ],
    ids=str,
)
def test_what_the_copy_engine_refuses(tiny, change, message):
    given = {"offset": 0, "sizes": (64, 4, 4, 4), "box": (64, 2, 2, 2), "at": (0, 0, 0, 0), "start": 1024}
    arguments = given | change
    tensor = torch.zeros(70 * 4**3 + 8).half()[arguments["offset"] :]
    lists = [torch.tensor(arguments[name]) for name in ("sizes", "box", "at")]
    lists[2] = lists[2].int()
    with pytest.raises(emulator.EmulatorError, match=message):
        tiny.box(tensor, tensor, *lists, torch.zeros(2**16), 4, 3, arguments["start"])


def test_the_same_seed_does_the_same(tiny):
    """What was found can be looked into."""
    x = torch.randn(5, 64, 64).half()
    results = []
    for _ in range(2):
        results.append(torch.empty_like(x))
        tiny.pipeline(x, results[-1], 5, MISTAKES["kNoWait"], seed=3)
    assert torch.equal(results[0].view(torch.int16), results[1].view(torch.int16))
