"""Measures shards: ours, the rivals and the floors of one shard in one process, correctness first.

A row is one implementation on one shard in one direction:

operation       attend (P from Z and W_H), layer (attention_module with mask, gate and output weights), floor
direction       forward (no graph of autograd), forward_backward (all gradients), for floors read and copy
implementation  ours (the default choice; `chosen` names it), triton, native and eager (by name), a rival's name, with
                +compile (torch.compile) or +max-autotune (mode="max-autotune-no-cudagraphs"), for floors floor
p20_us ...      timing.measure's figures; host_us is Python's share, peak_mb is above the inputs, 10⁶ bytes
floor_us        read (forward) or read + copy (forward_backward) of the same bytes; read_us, copy_us
ours_us         what ours took in the same process; on a CPU in the same minute, call by call in turn
correct         or, instead of times: out_of_memory, failed (why), skipped (why; a later run tries again)
error           the largest of error / allowed over the result and the gradients
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import ar_kernels
from ar_kernels import reference

from .cases import BASELINES, CASES, DTYPES, LAYOUTS, Shard, select
from .floors import floors
from .results import Results, path_of
from .rivals import RIVALS, Rival, Weights
from .timing import CACHED_BYTES, free, keep_memory, measure, measure_beside, rotation, touch_memory

LEVELS = ("none", "eager", "compiled", "max-autotune")
"""How many rivals: none, uncompiled ones, also compiled ones, also those that search; each has all before it."""

DIRECTIONS = ("forward", "forward_backward")

Row = dict[str, object]
Report = Callable[[Row], None]


LARGE_ON_CPU = 2**20
"""Bytes of a map from which allocations come from the system each time."""


class Budget:
    """Seconds to spend, and what things took so far: nothing is to begin that cannot be expected to end in time."""

    FIRST_GUESS = {"ours": 12.0, "eager": 4.0, "compiled": 20.0, "max-autotune": 90.0}
    """Seconds by kind on a GPU, for the first of its kind."""

    def __init__(self, seconds: float = float("inf"), clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._seen: dict[str, float] = {}

    def left(self) -> float:
        return self._end - self._clock()

    def expects(self, kind: str) -> float:
        """Seconds that the next of this kind may take."""
        return self._seen.get(kind, self.FIRST_GUESS[kind])

    def learn(self, kind: str, seconds: float) -> None:
        """The slower of the last one and of a fading memory of those before."""
        self._seen[kind] = max(seconds, 0.7 * self._seen.get(kind, 0.0))


# ---------------------------------------------------------------------------------------------- inputs


class Problem:
    """The inputs of one shard: distinct maps, weights in the map's dtype, gradients of the results.

    maps: how many; None for as many as leave nothing of one in L2 when its turn comes again. The same seed for the
    same shard: every process measures the same numbers.
    """

    def __init__(self, shard: Shard, device: str, maps: int | None = None, seed: int = 0) -> None:
        torch.manual_seed(seed)
        case, dtype = shard.case, DTYPES[shard.dtype]
        self.shard, self.device, self.layout = shard, device, LAYOUTS[shard.layout]
        count = maps or (rotation(shard.nbytes) if device == "cuda" else min(4, rotation(shard.nbytes)))

        def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
            return (torch.randn(shape, device=device) * scale).to(dtype)

        def make_map() -> Tensor:
            z = torch.randn(case.N, case.C, case.side, case.side, device=device, dtype=dtype)
            return z.contiguous(memory_format=self.layout).requires_grad_()

        self.maps = [make_map() for _ in range(count)]
        scale = case.C**-0.5
        heads, labels, channels = case.K, case.L, case.C
        mask, gate = (normal(heads, channels, scale=scale) for _ in range(2))
        self._weights = {1: (mask, normal(labels, heads * channels, scale=scale), gate)}
        self._normal = normal
        self._exact: dict[object, list[Tensor]] = {}
        self.pooled_grad = normal(case.N, heads, channels, dtype=torch.float32)
        self.grad = normal(case.N, labels)
        self.picked = sorted({0, case.N - 1})  # the last image has the largest offsets

    def weights_of(self, taps: int) -> Weights:
        """W_H, W_O, W_G in the map's dtype: of 1×1 heads (taps 1) [K, C], [L, K·C], [K, C]; of 3×3 heads (taps 9)
        [K, C, 3, 3], [L, K, C, 3, 3], [K, C, 3, 3].
        """
        if taps not in self._weights:
            case, scale = self.shard.case, self.shard.case.C**-0.5 / 3
            mask, gate = (self._normal(case.K, case.C, 3, 3, scale=scale) for _ in range(2))
            self._weights[taps] = mask, self._normal(case.L, case.K, case.C, 3, 3, scale=scale), gate
        return self._weights[taps]

    def exact_attend(self) -> list[Tensor]:
        """P, dZ and dW_H in float64, of the picked images alone."""
        if "attend" not in self._exact:
            self._exact["attend"] = self._differentiate(
                lambda z, mask: reference.attend(z, mask)[0], self.weights_of(1)[:1], self.pooled_grad
            )
        return self._exact["attend"]

    def exact_layer(self, taps: int = 1) -> list[Tensor]:
        """The hypothesis, dZ and the gradients of weights_of(taps) in float64, of the picked images alone."""
        if taps not in self._exact:
            mask, output, gate = self.weights_of(taps)
            weights = mask, output.flatten(1), gate  # the reference has 3×3 taps last, [L, K·C·9]
            found = self._differentiate(lambda *inputs: reference.attention_module(*inputs)[0], weights, self.grad)
            found[3] = found[3].view_as(output)
            self._exact[taps] = found
        return self._exact[taps]

    def _differentiate(self, function: Callable[..., Tensor], weights: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
        inputs = [value.double() for value in (self.maps[0].detach()[self.picked], *weights)]
        search, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False  # for one call it does not pay
        try:
            return _with_gradients(function, inputs, grad[self.picked].double())
        finally:
            torch.backends.cudnn.benchmark = search


@dataclass
class Contender:
    """One implementation of one operation: function(z, *parameters) → result, grad: the result's gradient."""

    operation: str
    name: str
    kind: str
    function: Callable[..., Tensor]
    parameters: tuple[Tensor, ...]
    grad: Tensor
    exact: Callable[[], list[Tensor]]
    """The result, dZ and the parameters' gradients in float64, of the picked images alone."""
    yardstick: Callable[..., Tensor]
    """An uncompiled function in the map's dtype: what roundings are bound to cost."""

    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            return self.function(z, *self.parameters)

    def forward_backward(self, z: Tensor, grad: Tensor | None = None) -> list[Tensor]:
        grad = self.grad if grad is None else grad
        result = self.function(z, *self.parameters)
        return list(torch.autograd.grad(result, (z, *self.parameters), grad.to(result.dtype)))


def _with_gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    inputs = [value.detach().requires_grad_() for value in inputs]
    result = function(*inputs)
    return [result.detach(), *torch.autograd.grad(result, inputs, grad.to(result.dtype))]


def our_contenders(problem: Problem) -> Iterator[Contender]:
    """ours and, by name, triton, native and eager where they can run and are not what the default chooses."""
    mask, output, gate = (weight.detach().requires_grad_() for weight in problem.weights_of(1))

    def can_run(name: str) -> bool:
        if (name, problem.device) == ("triton", "cpu"):
            return False  # Triton's interpreter runs there, and says nothing about speed
        return ar_kernels.explain(problem.maps[0], mask, implementation=name).chosen == name

    def attend(z: Tensor, mask: Tensor, implementation: str | None) -> Tensor:
        return ar_kernels.attend(z, mask, implementation=implementation).pooled

    def layer(z: Tensor, mask: Tensor, output: Tensor, gate: Tensor, implementation: str | None) -> Tensor:
        return ar_kernels.attention_module(z, mask, output, gate, implementation=implementation).hypothesis

    chosen = ar_kernels.explain(problem.maps[0], mask).chosen
    for name in ("ours", "triton", "native", "eager"):
        if name != "ours" and (name == chosen or not can_run(name)):
            continue
        named = partial(attend, implementation=None if name == "ours" else name)
        eager, exact = partial(attend, implementation="eager"), problem.exact_attend
        yield Contender("attend", name, "ours", named, (mask,), problem.pooled_grad, exact, eager)
        named = partial(layer, implementation=None if name == "ours" else name)
        eager, exact = partial(layer, implementation="eager"), problem.exact_layer
        yield Contender("layer", name, "ours", named, (mask, output, gate), problem.grad, exact, eager)


def rival_contender(problem: Problem, rival: Rival, kind: str) -> Contender:
    weights = problem.weights_of(rival.taps)
    parameters = tuple(value.detach().requires_grad_() for value in rival.store(weights, problem.layout))

    def exact() -> list[Tensor]:
        result, dz, *gradients = problem.exact_layer(rival.taps)
        return [result, dz, *rival.store(tuple(gradients), problem.layout)]

    function, name = rival.function, rival.name
    if kind == "compiled":
        function, name = torch.compile(function, dynamic=False), f"{name}+compile"
    elif kind == "max-autotune":
        function = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
        name = f"{name}+max-autotune"
    return Contender("layer", name, kind, function, parameters, problem.grad, exact, rival.function)


# ---------------------------------------------------------------------------------------------- correctness


def _distance(mine: Tensor, truth: Tensor) -> float:
    if not truth.any():  # the gradient of an only head's score: its gate is 1 whatever it is
        return float("inf") if mine.any() else 0.0
    return float((mine.double() - truth).norm() / truth.norm())


def error(contender: Contender, problem: Problem, inference: bool = True) -> float:
    """The largest of error / allowed over the result and all gradients, at most 1 where the contender is right.

    The very function and shape that will be timed run once; inference: also without autograd. The result's gradient
    is 0 but for two images, so these alone decide all gradients, and float64 need not be computed for more. Errors
    are relative RMS; allowed is twice (the yardstick's + eps). The yardstick, a rival's own uncompiled run or our eager
    path, runs on the whole batch too: PyTorch makes products of two images in another way, and more exactly. It
    must itself stay near its roundings, by which alone an uncompiled rival is judged, and eager: within 8 eps in
    half precision, where results are rounded a few times by eps / 2 and sums are kept in float32, and 64 eps in
    float32, where sums of thousands of terms round as well (on a CPU they are off by 1.3 and 17 eps at most). A
    wrong formula is off by about 1.
    """
    truth, z = contender.exact(), problem.maps[0]
    eps, picked = torch.finfo(z.dtype).eps, problem.picked
    masked = torch.zeros_like(contender.grad)
    masked[picked] = contender.grad[picked]

    def picked_of(found: Sequence[Tensor]) -> list[Tensor]:
        result, dz, *gradients = found
        return [result.detach()[picked], dz[picked], *gradients]

    result = contender.function(z, *contender.parameters)
    dz, *gradients = torch.autograd.grad(result, (z, *contender.parameters), masked.to(result.dtype))
    if any(bool(dz[image].any()) for image in range(1, z.shape[0] - 1, max(1, z.shape[0] // 8))):
        return float("inf")  # an image got a gradient that belongs to another
    found = [result, dz, *gradients]
    is_its_own = contender.yardstick is contender.function
    moved = found if is_its_own else _with_gradients(contender.yardstick, [z, *contender.parameters], masked)
    yardstick = picked_of(moved)
    pairs = list(zip(picked_of(found), yardstick, truth))
    if inference:
        pairs.append((contender.forward(z)[picked], yardstick[0], truth[0]))
    worst = 0.0
    for own, between, exact in pairs:
        rounded = _distance(between, exact)
        ratio = _distance(own, exact) / (2 * (rounded + eps))
        if not (rounded <= (64 if z.dtype == torch.float32 else 8) * eps and ratio == ratio):  # NaN is wrong too
            return float("inf")
        worst = max(worst, ratio)
    return worst


# ---------------------------------------------------------------------------------------------- measuring


def measure_contender(
    contender: Contender, problem: Problem, directions: Sequence[str], ours: Contender | None = None
) -> Iterator[Row]:
    """A row for each direction; where the result is wrong, or there is none, one that says so in place of times.

    ours: what to measure beside it on a CPU.
    """
    base: Row = {"operation": contender.operation, "implementation": contender.name}
    remaining = list(directions)
    try:
        ratio = error(contender, problem, "forward" in directions)
        free()
        base |= {"correct": ratio <= 1, "error": round(ratio, 3) if ratio < float("inf") else None}
        while remaining:
            direction = remaining[-1]  # backwards: the bars are about the last one first
            call, figures = getattr(contender, direction), {}
            if base["correct"]:  # no speed is told of a wrong result
                calls = [partial(call, z) for z in problem.maps]
                if ours is not None and problem.device == "cpu":
                    figures = measure_beside(calls, [partial(getattr(ours, direction), z) for z in problem.maps])
                else:
                    figures = measure(calls, problem.device, problem.shard.nbytes <= CACHED_BYTES)
            remaining.pop()
            yield base | {"direction": direction} | figures
    except Exception as exception:  # whatever stops an implementation is a result too
        why = _why(exception)
        for direction in remaining:
            yield base | {"direction": direction} | why
    finally:
        free()


def _why(exception: BaseException) -> Row:
    """What to write of an exception; lets go of the tensors that its frames hold.

    An error under capture makes the end of the capture fail as well: the first of the chain is told too.
    """
    chain = [exception]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)
    for link in chain:
        link.__traceback__ = None
    if any(isinstance(link, torch.OutOfMemoryError) or "out of memory" in str(link).lower() for link in chain):
        return {"out_of_memory": True}
    told = [f"{type(link).__name__}: {link}".strip().splitlines()[0][:200] for link in (chain[0], chain[-1])]
    return {"failed": " after ".join(dict.fromkeys(told))}


@dataclass(frozen=True)
class Plan:
    """Which rivals to measure beside ours."""

    level: str = "eager"
    """One of LEVELS."""
    names: tuple[str, ...] = ()
    """Only these of RIVALS; all where empty."""
    compiled_forward: bool = False
    """Also time compiled rivals' forward alone, which has to be compiled apart."""

    def wanted(self, shard: Shard) -> list[tuple[str, str, tuple[str, ...]]]:
        """A shard's rivals: (name, kind, directions)."""
        kinds = list(LEVELS[1 : LEVELS.index(self.level) + 1])
        if "max-autotune" in kinds and not (
            shard.case in BASELINES and (shard.dtype, shard.layout) == ("bfloat16", "channels_last")
        ):
            kinds.remove("max-autotune")
        names = [rival.name for rival in RIVALS if not self.names or rival.name in self.names]
        compiled = DIRECTIONS if self.compiled_forward else ("forward_backward",)
        return [(name, kind, DIRECTIONS if kind == "eager" else compiled) for kind in kinds for name in names]

    def missing(self, shard: Shard, results: Results) -> list[tuple[str, str, tuple[str, ...]]]:
        """Those of them that `results` has no answer of yet, in some direction."""
        return [
            (name, kind, directions)
            for name, kind, directions in self.wanted(shard)
            if not all(results.has(shard, "layer", direction, name + _SUFFIX[kind]) for direction in directions)
        ]


_SUFFIX = {"eager": "", "compiled": "+compile", "max-autotune": "+max-autotune"}


def measure_shard(shard: Shard, results: Results, plan: Plan, budget: Budget, device: str, report: Report) -> None:
    """Measures what `results` lacks of this shard, adding it row by row.

    The floors and our layer are measured each time: what rivals are told beside has to be of the same process.
    """
    started = time.monotonic()
    is_known = has_ours(shard, results)
    problem = Problem(shard, device)
    floor = floors(problem.maps, shard.nbytes <= CACHED_BYTES)
    searched = time.monotonic() - started
    read, copy = floor["read"]["p50_us"], floor["copy"]["p50_us"]
    common = shard.fields() | {"bytes": shard.nbytes, "read_us": read, "copy_us": copy}
    ours: dict[tuple[str, str], float] = {}

    def add(row: Row, seconds: float) -> None:
        row = common | row | {"seconds": round(seconds, 1)}
        if row["operation"] != "floor":
            row["floor_us"] = read if row["direction"] == "forward" else round(read + copy, 2)
            mine = ours.get((row["operation"], row["direction"]))
            if mine is not None:
                row.setdefault("ours_us", mine)
        results.add(row)
        report(row)

    chosen = ar_kernels.explain(problem.maps[0], problem.weights_of(1)[0]).chosen
    our_layer = None
    for contender in our_contenders(problem):
        if (contender.operation, contender.name) == ("layer", "ours"):
            our_layer = contender
        if is_known and (contender.operation, contender.name) != ("layer", "ours"):
            continue
        begun = time.monotonic()
        beside = our_layer if contender.operation == "layer" and contender is not our_layer else None
        for row in measure_contender(contender, problem, DIRECTIONS, beside):
            if contender.name == "ours":
                row["chosen"] = chosen
                if "p50_us" in row:
                    ours[row["operation"], row["direction"]] = row["p50_us"]
            add(row, time.monotonic() - begun)
            begun = time.monotonic()
    for direction, row in floor.items():  # last of all that is ours: has_ours
        name = {"operation": "floor", "direction": direction, "implementation": "floor", "correct": True}
        add(name | row, searched)
    budget.learn("ours", time.monotonic() - started)

    for name, kind, directions in plan.missing(shard, results):
        base = {"operation": "layer", "implementation": name + _SUFFIX[kind]}
        if budget.left() < budget.expects(kind):
            why = f"{max(budget.left(), 0):.0f} s of the budget left, {budget.expects(kind):.0f} s expected"
            for direction in directions:
                if not results.has(shard, "layer", direction, base["implementation"]):
                    add(base | {"direction": direction, "skipped": why}, 0)
            continue
        begun = time.monotonic()
        torch.compiler.reset()  # what was compiled for other shapes would make this one compile for all shapes
        rival = next(rival for rival in RIVALS if rival.name == name)
        try:
            contender = rival_contender(problem, rival, kind)
        except torch.OutOfMemoryError:
            for direction in directions:
                add(base | {"direction": direction, "out_of_memory": True}, time.monotonic() - begun)
            continue
        since = begun
        for row in measure_contender(contender, problem, directions, our_layer):
            add(row, time.monotonic() - since)
            since = time.monotonic()
        del contender
        free()
        budget.learn(kind, time.monotonic() - begun)


def prepare(selected: Sequence[Shard], processes: int) -> None:
    """Compiles the kernels of all shards into Triton's cache, in several processes at once: nothing is measured."""
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_prepare, selected))


def _prepare(shard: Shard) -> None:
    problem = Problem(shard, "cuda", maps=1)
    for contender in our_contenders(problem):
        if contender.name != "eager":
            contender.forward(problem.maps[0])
            contender.forward_backward(problem.maps[0])
    del problem, contender
    free()


def has_ours(shard: Shard, results: Results) -> bool:
    """Whether all our own rows of this shard are there: the floors' are written after them."""
    return all(results.has(shard, "floor", direction, "floor") for direction in ("read", "copy"))


def run(
    selected: Iterable[Shard],
    results: Results,
    plan: Plan | None = None,
    budget: Budget | None = None,
    device: str = "cuda",
    report: Report = lambda row: None,
) -> list[Shard]:
    """Measures the selected shards, each but those that `results` has in full; returns those left for another time."""
    plan, budget = plan or Plan(), budget or Budget()
    selected, left = list(selected), []
    if device == "cpu":
        keep_memory()
        if any(shard.nbytes >= LARGE_ON_CPU for shard in selected):
            touch_memory()
    for shard in selected:
        todo = plan.missing(shard, results)
        if has_ours(shard, results) and not todo:
            continue
        needed = budget.expects("ours") + sum(budget.expects(kind) for _, kind, _ in todo if kind == "eager")
        if budget.left() < needed:
            left.append(shard)
            continue
        measure_shard(shard, results, plan, budget, device, report)
        free()
        if plan.missing(shard, results):
            left.append(shard)
    return left


# ---------------------------------------------------------------------------------------------- beside the suite


def measure_cases(name: str, description: str | None, measure: Callable[[Shard, str, Results], None]) -> None:
    """A script's command line: measure(shard, device, results) of every case in bfloat16 and both layouts, or of what
    --only names, into results/<name>-<device>.json, begun anew."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], help="as python -m benchmarks run takes it")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu tries the script on small --only cases")
    path = path_of(name, arguments.out)
    results = Results(path, fresh=True)
    for shard in select([Shard(case, "bfloat16", layout) for layout in LAYOUTS for case in CASES], arguments.only):
        measure(shard, arguments.device, results)
    print(path)
