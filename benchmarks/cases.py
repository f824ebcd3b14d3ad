"""What is measured: layers of the networks that attention is for, in every dtype and layout, the telling ones first."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
"""Memory formats of a map by name; contiguous is NCHW."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "nchw": "contiguous", "nhwc": "channels_last"}


@dataclass(frozen=True)
class Case:
    """A feature map [N, C, side, side] with K attention heads and L labels."""

    N: int
    C: int
    side: int
    L: int
    K: int = 4

    def __str__(self) -> str:
        return f"{self.N}x{self.C}x{self.side}-L{self.L}-K{self.K}"


@dataclass(frozen=True)
class Shard:
    """What one process measures in one go: a case in one dtype and one layout."""

    case: Case
    dtype: str
    layout: str

    def __str__(self) -> str:
        return f"{self.case}-{self.dtype}-{self.layout}"

    @property
    def nbytes(self) -> int:
        """|Z|: the bytes of one feature map."""
        return self.case.N * self.case.C * self.case.side**2 * DTYPES[self.dtype].itemsize

    def fields(self) -> dict[str, int | str]:
        """The columns that name this shard in a row of results."""
        case = self.case
        own = {"N": case.N, "C": case.C, "side": case.side, "L": case.L, "K": case.K}
        return own | {"dtype": self.dtype, "layout": self.layout}


CASES = (
    Case(128, 160, 32, 100),
    Case(128, 320, 16, 100),
    Case(128, 640, 8, 100),
    Case(256, 256, 56, 1000),
    Case(256, 512, 28, 1000),
    Case(256, 1024, 14, 1000),
    Case(256, 2048, 7, 1000),
    Case(64, 384, 14, 200),
    Case(32, 96, 56, 1000),
    Case(1, 256, 56, 1000),
    Case(8, 512, 28, 200),
    Case(1024, 256, 56, 10),
)
"""WRN-28-10's three maps, ResNet-50's four, a small and a narrow net, one image, a small batch, 2³¹ elements' brink."""

OTHER_HEADS = tuple(replace(case, K=heads) for case in (CASES[1], CASES[7]) for heads in (1, 2, 8, 16))

CPU_CASES = (
    Case(32, 160, 32, 100),
    Case(32, 320, 16, 100),
    Case(32, 640, 8, 100),
    Case(32, 256, 28, 1000),
    Case(8, 160, 16, 100),
    Case(4, 64, 14, 10),
)
"""WRN-28-10's three maps and one of ResNet-50's in smaller batches, and two small ones."""

BASELINES = frozenset(CASES[:4] + CASES[5:7])
"""The cases on which torch.compile may also search (max-autotune), which takes a minute each."""


def shards(device: str = "cuda") -> list[Shard]:
    """All shards by importance: K = 4 in bfloat16, float16, float32, each channels_last before NCHW; then other K."""
    if device == "cpu":
        dtypes = ("float32", "bfloat16")
        return [Shard(case, dtype, layout) for dtype in dtypes for layout in LAYOUTS for case in CPU_CASES]
    return [
        Shard(case, dtype, layout)
        for cases in (CASES, OTHER_HEADS)
        for dtype in DTYPES
        for layout in LAYOUTS
        for case in cases
    ]


def select(everything: Iterable[Shard], only: Sequence[str] = ()) -> list[Shard]:
    """The shards that any of `only` names; all of them where `only` is empty.

    Each of `only` is terms joined by commas that must all hold: field=value, with alternatives as in C=160|320, or a
    part of the shard's name (128x320x16-L100-K4-bfloat16-channels_last). bf16, fp16, fp32, nchw and nhwc are known.
    Raises ValueError where a field is unknown or a term fits no shard at all.
    """
    everything = list(everything)
    if not only:
        return everything
    found = {shard: None for one in only for shard in everything if all(_fits(shard, t) for t in one.split(","))}
    if not found:
        raise ValueError(f"--only {' --only '.join(only)} fits none of {len(everything)} shards, e.g. {everything[0]}")
    return [shard for shard in everything if shard in found]


def _fits(shard: Shard, term: str) -> bool:
    field, equals, value = term.strip().partition("=")
    if not equals:
        part = re.escape(_ALIASES.get(field.lower(), field))
        return re.search(rf"(^|[-x]){part}", str(shard)) is not None  # 8x512 is no part of 128x512x28
    fields = shard.fields() | {"case": str(shard.case)}
    if field not in fields:
        raise ValueError(f"--only knows the fields {', '.join(fields)}, got {field!r}")
    return str(fields[field]) in [_ALIASES.get(choice.lower(), choice) for choice in value.split("|")]
