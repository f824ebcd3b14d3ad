"""Random cases against float64: shapes, strides, dtypes, heads, biases, layouts, what is asked for and differentiated.

A case's budget is derived, not chosen (Monte Carlo arithmetic). What is exact, the reference computes in float64. The
formulas that the kernels implement, eager's, are run in float64 as well, with every operation's result moved by one ulp
of the dtype that sums are kept in, up or down at random, the terms of every sum likewise, and what enters or leaves a
matrix product as a half by one ulp of that half; how far their results move is the *spread*. A correct implementation
rounds where these runs are moved, by half an ulp at most, but each partial sum too, and the runs are a sample. So
|got − exact| ≤ 4 spread + ulp·|exact|, the last term for the rounding of the result itself.

Cases are fixed by seeds: the same in every run. --cases changes how many there are (2,000; 5,000 with --device cuda).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from layers import EPS
from torch.utils._python_dispatch import TorchDispatchMode

import ar_kernels
from ar_kernels import native
from ar_kernels.reference import accumulator_dtype

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHARDS, SHARDS_ON_A_GPU = 10, 40
"""Tests that share the cases, so that processes can share them."""

STRUCTURES = 200
"""On a GPU, where another of them compiles anew: how many combinations of all but sizes and values there are."""

DRAWS = 5
"""Runs that the spread is taken from."""


@dataclass(frozen=True)
class Case:
    """One call. Structure: all that kernels are compiled for; the rest are sizes and values."""

    call: str  # "attend", "module" or "rectify"
    dtype: torch.dtype
    weights: torch.dtype
    channels: int
    heads: int
    taps: int  # 1 or 9
    globals: int
    gated: bool
    biases: tuple[bool, bool, bool]  # of masks, outputs, gates
    by_head: bool
    asked: tuple[bool, bool, bool, bool]  # logits, masks, mean, tap
    frozen: str  # which inputs get no gradient
    order: tuple[int, ...]  # of the map's dimensions in memory
    gap: int  # between its rows, and in front of it
    expanded: tuple[bool, ...]  # dimensions of stride 0
    gradients: str  # strides of the outputs' gradients
    mix: str
    gating: str | None
    listed: bool
    images: int = 2
    height: int = 2
    width: int = 2
    labels: int = 3
    scale: float = 1.0
    seed: int = 0

    @property
    def flat(self) -> bool:
        return len(self.order) == 3


def structure(pick: Callable[[Sequence], object], cuda: bool) -> dict:
    call = pick(["attend", "module", "module", "module", "rectify"])
    dtype = pick([torch.float64, torch.float32, torch.float16, torch.bfloat16])
    taps = pick([1, 1, 9])
    rank = pick([3, 4, 4]) if taps == 1 else 4
    order = tuple(range(rank))
    layout = pick(["contiguous", "channels_last", "any"])
    if layout == "channels_last":
        order = (0, *order[2:], 1)
    elif layout == "any":
        order = pick([(1, 0, *order[2:]), (*order[1:], 0), order[::-1], (0, *order[:0:-1])])
    flag = [False, True]
    return {
        "call": call,
        "dtype": dtype,
        "weights": pick([dtype, torch.float32]) if dtype.itemsize == 2 else dtype,
        "channels": pick([1, 8, 37, 64] if cuda else [1, 2, 3, 5, 8, 16, 31, 64, 130]),
        "heads": pick([1, 4, 7] if cuda else [1, 2, 3, 4, 7, 16]),
        "taps": taps,
        "globals": pick([0, 0, 2] if cuda else [0, 0, 1, 3]),
        "gated": pick([True, True, False]),
        "biases": (pick(flag), pick(flag), pick(flag)),
        "by_head": pick(flag),
        "asked": (pick(flag), pick(flag), pick(flag), pick(flag)),
        "frozen": pick(["", "", "map", "weights"]),
        "order": order,
        "gap": pick([0, 0, 1, 8]),
        "expanded": tuple(pick([False, False, False, True]) for _ in order) if pick(flag) else (False,) * rank,
        "gradients": pick(["contiguous", "contiguous", "transposed", "expanded"]),
        "mix": pick(["logit", "log", "prob"]),
        "gating": pick(["softmax", "sigmoid", None]),
        "listed": pick(flag),
    }


@st.composite
def cases(draw, cuda: bool = False, small: bool = False) -> Case:
    if cuda:
        pick = random.Random(draw(st.integers(0, STRUCTURES - 1))).choice
    else:
        pick = lambda values: draw(st.sampled_from(values))  # noqa: E731
    sides = [1, 2, 3, 13] if small else [1, 2, 3, 4, 7, 8, 13]
    return Case(
        **structure(pick, cuda),
        images=draw(st.sampled_from([1, 2] if small else [0, 1, 2, 3, 5])),
        height=draw(st.sampled_from(sides)),
        width=draw(st.sampled_from(sides)),
        labels=draw(st.sampled_from([1, 2, 3, 7, 20])),
        scale=draw(st.sampled_from([1.0, 1.0, 1e-3, 8.0])),
        seed=draw(st.integers(0, 2**16)),
    )


# ---------------------------------------------------------------------------------------------- a case's tensors


def tensors_of(case: Case, device: torch.device) -> dict[str, torch.Tensor]:
    """Inputs by name, their values such that logits and outputs are near 1 times the scale."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(shape: Sequence[int], scale: float, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * scale).to(dtype).to(device)

    if case.call == "rectify":
        depth = case.heads
        hypotheses = normal((case.images, depth, case.labels), 2 * case.scale, case.dtype)
        return {"hypotheses": hypotheses, "scores": normal((case.images, depth), 0.5, accumulator_dtype(case.dtype))}
    kernel = (3, 3) if case.taps == 9 else ()
    fan_in, k = case.channels * case.taps, case.heads
    sides = (case.height * case.width,) if case.flat else (case.height, case.width)
    t = {"feature_map": normal((case.images, case.channels, *sides), case.scale, case.dtype)}
    t["mask_weight"] = normal((k, case.channels, *kernel), fan_in**-0.5, case.weights)
    if case.biases[0]:
        t["mask_bias"] = normal((k,), 1.0, case.weights)
    if case.call == "attend":
        return t
    rows = (k, case.labels, case.channels, *kernel) if case.by_head else (case.labels, k * fan_in)
    t["output_weight"] = normal(rows, fan_in**-0.5, case.weights)
    if case.biases[1]:
        t["output_bias"] = normal((k, case.labels), 1.0, case.weights)
    if case.gated:
        t["gate_weight"] = normal((k, case.channels, *kernel), fan_in**-0.5, case.weights)
        if case.biases[2]:
            t["gate_bias"] = normal((k,), 1.0, case.weights)
    if case.globals:
        for name in ("global_mask_weight", "global_gate_weight"):
            t[name] = normal((case.globals, case.channels, *kernel), fan_in**-0.5, case.weights)
    return t


def laid_out(case: Case, feature_map: torch.Tensor) -> torch.Tensor:
    """The map's values with the case's strides; along an expanded dimension, its first slice's throughout."""
    for dim, expanded in enumerate(case.expanded):
        if expanded and feature_map.shape[dim] > 0:
            feature_map = feature_map.narrow(dim, 0, 1)
    shape = [feature_map.shape[dim] for dim in case.order]
    shape[-1] += case.gap
    storage = feature_map.new_zeros(case.gap + feature_map.new_empty(0).new_empty(shape, device="meta").numel())
    memory = storage[case.gap :].view(shape).narrow(-1, 0, shape[-1] - case.gap)
    placed = memory.permute([case.order.index(dim) for dim in range(len(case.order))])
    placed.copy_(feature_map)
    full = {dim: size for dim, size in enumerate(sizes_of(case))}
    return placed.expand([full[dim] for dim in range(placed.dim())])


def sizes_of(case: Case) -> tuple[int, ...]:
    sides = (case.height * case.width,) if case.flat else (case.height, case.width)
    return case.images, case.channels, *sides


def gradient_like(case: Case, value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    grad = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
    if case.gradients == "transposed" and grad.dim() > 1:
        return grad.transpose(0, -1).contiguous().transpose(0, -1)
    if case.gradients == "expanded":  # as .sum() over images sends them
        return grad[:1].expand(grad.shape) if grad.shape[0] else grad
    return grad


# ---------------------------------------------------------------------------------------------- a case's results


def run(
    case: Case, inputs: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor] | None, implementation: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs and gradients by name, and the outputs' gradients that were sent (drawn where none are given)."""
    frozen = {"map": {"feature_map", "hypotheses"}, "weights": {"mask_weight", "gate_weight", "scores"}, "": set()}
    inputs = {name: t.detach().requires_grad_(name not in frozen[case.frozen]) for name, t in inputs.items()}
    logits, masks, mean, tap = case.asked
    if case.call == "rectify":
        hypotheses = list(inputs["hypotheses"].unbind(1)) if case.listed else inputs["hypotheses"]
        y = ar_kernels.rectify(
            hypotheses, inputs["scores"], mix=case.mix, gating=case.gating, implementation=implementation
        )
        outputs = {"output": y}
    else:
        options = {"masks": masks, "mean": mean, "tap": tap, "implementation": implementation}
        if case.call == "attend":
            outputs = ar_kernels.attend(**inputs, logits=logits, **options)._asdict()
        else:
            outputs = ar_kernels.attention_module(**inputs, **options)._asdict()
        outputs = {name: value for name, value in outputs.items() if value is not None}
    if gradients is None:
        generator = torch.Generator().manual_seed(case.seed + 1)
        gradients = {name: gradient_like(case, value, generator) for name, value in outputs.items()}
    reached = [name for name, value in outputs.items() if value.requires_grad]
    wanted = [name for name, value in inputs.items() if value.requires_grad]
    received = torch.autograd.grad(
        [outputs[name] for name in reached],
        [inputs[name] for name in wanted],
        [gradients[name].to(outputs[name].dtype) for name in reached],
        allow_unused=True,
    )
    results = {name: value.detach() for name, value in outputs.items()}
    results |= {f"d_{name}": value for name, value in zip(wanted, received) if value is not None}
    return results, gradients


class Moved(TorchDispatchMode):
    """Within, every operation's float64 result is moved by one ulp up or down, `fine`, as are the terms of sums; what a
    product of matrices takes and gives by one `coarse` ulp, but for the tensors in `exact`, which are there unrounded,
    and for sums over these. Views and what is done in place are left alone.
    """

    def __init__(self, fine: float, coarse: float, exact: list[torch.Tensor], generator: torch.Generator) -> None:
        super().__init__()
        self.fine, self.coarse, self.generator = fine, coarse, generator
        self.steps = {coarse: LEAST if coarse == EPS[torch.float16] else 0.0}
        self.kept = {tensor.untyped_storage().data_ptr() for tensor in exact}

    def moved(self, value: object, ulp: float) -> object:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float64:
            return value
        signs = torch.empty(value.shape, dtype=torch.float64).bernoulli_(generator=self.generator).mul_(2).sub_(1)
        return value + signs * (value.abs() * ulp + self.steps.get(ulp, 0.0))

    def is_exact(self, value: object) -> bool:
        return isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() in self.kept

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        if torch.Tag.inplace_view in operator.tags or operator.is_view or operator._schema.is_mutable:
            return operator(*arguments, **options)
        after, name = self.fine, operator._schema.name
        if name in SUMS:
            arguments = [self.moved(a, self.fine) for a in arguments]
        elif name in PRODUCTS:
            after = self.fine if any(map(self.is_exact, arguments)) else self.coarse  # what has read the map stays
            arguments = [self.moved(a, self.fine if self.is_exact(a) else self.coarse) for a in arguments]
        return torch.utils._pytree.tree_map(lambda value: self.moved(value, after), operator(*arguments, **options))


LEAST = 2**-24
"""The step between float16's smallest numbers, where an ulp is no share of the number."""

SUMS = {f"aten::{name}" for name in ("sum", "mean", "logsumexp")}
PRODUCTS = {f"aten::{name}" for name in ("mm", "bmm", "addmm", "convolution", "convolution_backward")}


def budgets(case: Case, inputs: dict, gradients: dict) -> dict[str, tuple[torch.Tensor, float]]:
    """By name: the exact result, and how far rounding may move it before it is stored. All of it on the CPU, where an
    operation of so few numbers takes a few microseconds.
    """
    inputs, gradients = ({name: value.cpu().double() for name, value in each.items()} for each in (inputs, gradients))
    exact, _ = run(case, inputs, gradients, "reference")
    rounded = {"eager": run(case, inputs, gradients, "eager")[0]}
    if case.dtype == torch.float64:  # what is taken for exact is rounded as well
        rounded["reference"] = exact
    spread = dict.fromkeys(exact, 0.0)
    generator = torch.Generator().manual_seed(case.seed + 2)
    fine, coarse = EPS[accumulator_dtype(case.dtype)], EPS[case.dtype]
    unrounded = [v for name, v in inputs.items() if name == "feature_map" or case.weights == case.dtype]
    for name, unmoved in DRAWS * list(rounded.items()):
        with Moved(fine, coarse, unrounded, generator):
            results, _ = run(case, inputs, gradients, name)
        for name, value in results.items():
            spread[name] = max(spread[name], largest(value - unmoved[name]))
    return {name: (value, 4 * spread[name]) for name, value in exact.items()}


def largest(value: torch.Tensor) -> float:
    return value.abs().max().item() if value.numel() else 0.0


def check(case: Case, implementations: Sequence[str], device: torch.device, seen: list | None = None) -> None:
    inputs = tensors_of(case, device)
    if case.call != "rectify":
        inputs["feature_map"] = laid_out(case, inputs["feature_map"])
    results, gradients = run(case, inputs, None, "eager")
    truth = budgets(case, inputs, gradients)
    for implementation in implementations:
        if implementation != "eager":
            results, _ = run(case, inputs, gradients, implementation)
        for name, (exact, budget) in truth.items():
            if name not in results:  # autograd may leave out what does not reach an input: it must be zero then
                assert not exact.any(), f"{implementation}: {name} is missing"
                continue
            value = results[name]
            budget += EPS[value.dtype] * largest(exact) + (LEAST if value.dtype == torch.float16 else 0.0)
            assert value.shape == exact.shape, f"{implementation}: {name} is {list(value.shape)}"
            error = largest(value.cpu().double() - exact)
            if seen is not None:
                seen.append((error / budget if budget else error, implementation, name, case))
            assert error <= budget, f"{implementation}: {name} is off by {error:.3e}, allowed {budget:.3e}"
        for name in results.keys() - truth.keys():
            assert not results[name].any(), f"{implementation}: {name} should not be there"


# ---------------------------------------------------------------------------------------------- tests


def run_cases(strategy: st.SearchStrategy, count: int, seed: int, implementations, device) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(strategy)
    def every_case(case):
        check(case, implementations, device)

    every_case()


def number_of_cases(request: pytest.FixtureRequest, device: torch.device) -> int:
    return request.config.getoption("--cases") or (5000 if device.type == "cuda" else 2000)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_random_cases:
        shards = SHARDS_ON_A_GPU if metafunc.config.getoption("--device") == "cuda" else SHARDS
        numbers = range(shards)
        metafunc.parametrize(("shard", "shards"), [(shard, shards) for shard in numbers], ids=map(str, numbers))


def test_random_cases(shard, shards, request, device):
    """39 of 40 cases; on a GPU all of them, the kernels' compiled forms included."""
    cuda = device.type == "cuda"
    implementations = ["eager", "triton"] if cuda else ["eager"]
    if native.why_not(device.type) is None:
        implementations.append("native")
    count = number_of_cases(request, device)
    count = (count if cuda else count - count // 40) // shards
    run_cases(cases(cuda=cuda), count, shard, implementations, device)


@pytest.mark.parametrize("shard", range(2))
def test_random_cases_in_the_interpreter(shard, request, device):
    """The rest of the cases, of few programs."""
    pytest.importorskip("triton")
    if device.type != "cpu":
        pytest.skip("on a GPU every case runs the Triton kernels")
    count = number_of_cases(request, device) // 40 // 2
    run_cases(cases(small=True), count, 100 + shard, ["triton"], device)


# ---------------------------------------------------------------------------------------------- failures it found


@pytest.mark.parametrize("taps", [1, 9])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_masks_of_one_position_have_no_gradient(dtype, taps, fused, device):
    """δ once was made of dP unrounded, dA of dP as it was rounded for a product: their difference is not 0."""
    case = Case(
        "module", dtype, torch.float32, channels=8, heads=1, taps=taps, globals=2, gated=False,
        biases=(True, False, False), by_head=False, asked=(False, False, False, True),
        frozen="weights", order=(0, 1, 2, 3), gap=0, expanded=(False,) * 4, gradients="contiguous",
        mix="log", gating="softmax", listed=True,
        images=1, height=1, width=1, labels=1,
    )  # fmt: skip
    check(case, [fused], device)
