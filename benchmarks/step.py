"""What attention costs a network: WARN-28-10's training step over WRN-28-10's. python -m benchmarks.step

Batch 128 of 32×32 images, 100 labels, bfloat16 autocast, channels_last, attention depth 3 and width 4, plain SGD:
eager; captured, which is the eager step replayed as a CUDA graph, so the device's time alone; under torch.compile,
and under its mode reduce-overhead, which replays CUDA graphs of both directions.
--model official: ar_kernels.official's WARN with 3×3 heads, regulariser on, and the official form in plain PyTorch.
Blocks of steps of the nets take turns, so that clocks and heat meet all; ratios are between neighbours, over the plain
net. Peak memory is a net's own: weights, what a step saves, gradients. cuDNN chooses its kernels anew in each process,
which moves a ratio by a hundredth or two: --processes measures in several, a row each, and prints their median.
"""

import argparse
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F

from ar_kernels import official
from ar_kernels.models import WideAttentiveResNet, WideResNet

from . import official_form
from .results import save

COMPILED = {"compiled": None, "reduce-overhead": "reduce-overhead"}
"""torch.compile's own names of the modes that are compiled."""

MODES = ("eager", "captured", *COMPILED)

WITH_GRAPHS = ("captured", "reduce-overhead")
"""Modes whose memory stays allocated to CUDA graphs, so that a step's peak is not told."""

REG_W = 0.001
"""The weight of the official nets' mask regulariser."""

MODELS = {
    "attentive": {
        "attentive": lambda *sizes: WideAttentiveResNet(*sizes, attention_depth=3, attention_width=4),
    },
    "official": {
        "official": lambda *sizes: official.WideResNetAttention(*sizes, 0, 3, 4, REG_W),
        "official_form": lambda *sizes: official_form.WideResNetAttention(*sizes, 0, 3, 4, REG_W),
    },
}
"""What --model compares with the plain net: by name, (depth, width, labels) → net. The first is ours."""


class Training:
    """One net in training on one fixed batch."""

    def __init__(self, model: torch.nn.Module, mode: str, batch: int, labels: int, device: str) -> None:
        self.device, self.mode = device, mode
        self._before = self._allocated()
        model = model.to(device, memory_format=torch.channels_last).train()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self._model = torch.compile(model, mode=COMPILED[mode]) if mode in COMPILED else model
        images = torch.randn(batch, 3, 32, 32, device=device)
        self._images = images.contiguous(memory_format=torch.channels_last)
        self._labels = torch.randint(0, labels, (batch,), device=device)

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def step(self) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            output = self._model(self._images)
            if isinstance(output, tuple):  # the official nets': a log mix, and the regulariser
                loss = F.nll_loss(output[0], self._labels) + output[1]
            else:
                loss = F.cross_entropy(output, self._labels)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def warm_up(self, steps: int) -> float:
        """Seconds of the first steps: where the net is compiled, mostly that."""
        start = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        seconds = time.perf_counter() - start
        if self.mode == "captured":
            self._capture()
        return seconds

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.step()

        def replay() -> torch.Tensor:
            graph.replay()
            return loss

        self.step = replay

    def block(self, steps: int) -> float:
        """Milliseconds of one step, by the clock over a block of them."""
        self._wait()
        start = time.perf_counter()
        for _ in range(steps):
            loss = self.step()
        self._wait()
        seconds = time.perf_counter() - start
        if not bool(torch.isfinite(loss)):
            raise RuntimeError("the loss is not finite: no time is told of such a step")
        return seconds * 1e3 / steps

    def peak_mb(self) -> float | None:
        """The most that a step holds, weights included; in 10⁶ bytes."""
        if self.device != "cuda":
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        self._wait()
        return (torch.cuda.max_memory_allocated() - self._before) / 1e6


def _check_same(ours: torch.nn.Module, other: torch.nn.Module) -> None:
    """Gives other the weights of ours; raises RuntimeError unless both then make the same of two images (float32)."""
    other.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        outputs = [net.eval()(images)[0] for net in (ours, other)]
    if not torch.allclose(*outputs, rtol=1e-3, atol=1e-3):
        raise RuntimeError("the nets do not compute the same: no time is told of them")


def compare(
    mode: str,
    blocks: int,
    steps: int,
    depth: int,
    width: int,
    batch: int,
    labels: int,
    device: str,
    model: str = "attentive",
) -> dict:
    """Milliseconds of a step of each net, block by block, and the share of the attentive ones over the plain one."""
    torch.manual_seed(0)
    torch.compiler.reset()
    ours, *others = MODELS[model]
    nets, seconds, peaks, times = {}, {}, {}, {name: [] for name in ("plain", ours, *others)}
    made = {name: make(depth, width, labels) for name, make in ({"plain": WideResNet} | MODELS[model]).items()}
    for name in others:
        _check_same(made[ours], made[name])
    for name, net in made.items():
        nets[name] = Training(net, mode, batch, labels, device)
        seconds[name] = round(nets[name].warm_up(min(10, steps)), 2)
        peaks[name] = None if mode in WITH_GRAPHS else nets[name].peak_mb()
    for index in range(blocks):
        for name in times if index % 2 == 0 else reversed(times):
            times[name].append(nets[name].block(steps))
    row = {"model": model, "mode": mode, "depth": depth, "width": width, "batch": batch, "L": labels, "steps": steps}
    for name, found in times.items():
        row[f"{name}_ms"] = round(statistics.median(found), 3)
        row[f"{name}_blocks_ms"] = [round(value, 3) for value in found]
    for name in (ours, *others):
        ratio = "ratio" if name == ours else f"{name}_ratio"
        ratios = [own / plain for own, plain in zip(times[name], times["plain"])]
        row |= {ratio: round(statistics.median(ratios), 4), f"{ratio}_min": round(min(ratios), 4)}
        row |= {f"{ratio}_max": round(max(ratios), 4)}
    row["first_steps_seconds"] = seconds
    if all(peaks.values()):
        row["peak_mb"] = {name: round(value, 1) for name, value in peaks.items()}
        row["peak_ratio"] = round(peaks[ours] / peaks["plain"], 4)
    return row


def _compare_tuned(*arguments) -> dict:
    torch.backends.cudnn.benchmark = True
    return compare(*arguments)


def _compare_elsewhere(*arguments) -> dict:
    """compare, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_compare_tuned, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    parser.add_argument("--model", choices=MODELS, default="attentive", help="what is compared with the plain net")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of either net")
    parser.add_argument("--steps", type=int, default=50, help="steps in a block")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--labels", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1, help="that measure one after the other, a row each")
    arguments = parser.parse_args()
    if arguments.processes < 1:
        parser.error(f"--processes must be at least 1, got {arguments.processes}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = "step" if arguments.model == "attentive" else f"step-{arguments.model}"
    sizes = (arguments.depth, arguments.width, arguments.batch, arguments.labels)
    rows = []
    for mode in (arguments.mode or MODES) if device == "cuda" else MODES[:1]:
        found = []
        for _ in range(arguments.processes):
            row = _compare_elsewhere(mode, arguments.blocks, arguments.steps, *sizes, device, arguments.model)
            rows.append(row)
            found.append(row["ratio"])
            print(*(f"{key} {value}" for key, value in row.items() if "blocks" not in key), sep="  ", flush=True)
            path = save(name, {"rows": rows}, arguments.out)  # now: compiling the next may take what time is left
        if len(found) > 1:
            print(f"{mode}: median ratio {statistics.median(found):.4f} of {len(found)} processes")
    print(path)


if __name__ == "__main__":
    main()
