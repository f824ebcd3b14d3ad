"""What attention costs a network: WARN-28-10's training step over WRN-28-10's. python -m benchmarks.step

Batch 128 of 32×32 images, 100 labels, bfloat16 autocast, channels_last, attention depth 3 and width 4, plain SGD:
eager; captured, which is the eager step replayed as a CUDA graph, so the device's time alone; under torch.compile.
Blocks of steps of the two nets take turns, so that clocks and heat meet both; the ratio is between neighbours. Peak
memory is a net's own: weights, what a step saves, gradients.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from ar_kernels.models import WideAttentiveResNet, WideResNet

from .results import save

MODES = ("eager", "captured", "compiled")


class Training:
    """One net in training on one fixed batch."""

    def __init__(self, model: torch.nn.Module, mode: str, batch: int, labels: int, device: str) -> None:
        self.device, self.mode = device, mode
        self._before = self._allocated()
        model = model.to(device, memory_format=torch.channels_last).train()
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        self._model = torch.compile(model) if mode == "compiled" else model
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
            loss = F.cross_entropy(self._model(self._images), self._labels)
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


def compare(mode: str, blocks: int, steps: int, depth: int, width: int, batch: int, labels: int, device: str) -> dict:
    """Milliseconds of a step of both nets, block by block, and the attentive net's share over the plain one's."""
    torch.manual_seed(0)
    torch.compiler.reset()
    nets, seconds, peaks, times = {}, {}, {}, {"plain": [], "attentive": []}
    for name, model in (
        ("plain", WideResNet(depth, width, labels)),
        ("attentive", WideAttentiveResNet(depth, width, labels, attention_depth=3, attention_width=4)),
    ):
        nets[name] = Training(model, mode, batch, labels, device)
        seconds[name] = round(nets[name].warm_up(min(10, steps)), 2)
        peaks[name] = nets[name].peak_mb() if mode != "captured" else None  # a graph's memory stays allocated
    for index in range(blocks):
        for name in ("plain", "attentive") if index % 2 == 0 else ("attentive", "plain"):
            times[name].append(nets[name].block(steps))
    ratios = [own / plain for own, plain in zip(times["attentive"], times["plain"])]
    row = {"mode": mode, "depth": depth, "width": width, "batch": batch, "L": labels, "steps": steps}
    for name, found in times.items():
        row[f"{name}_ms"] = round(statistics.median(found), 3)
        row[f"{name}_blocks_ms"] = [round(value, 3) for value in found]
    row |= {"ratio": round(statistics.median(ratios), 4), "ratio_min": round(min(ratios), 4)}
    row |= {"ratio_max": round(max(ratios), 4), "first_steps_seconds": seconds}
    if all(peaks.values()):
        row["peak_mb"] = {name: round(value, 1) for name, value in peaks.items()}
        row["peak_ratio"] = round(peaks["attentive"] / peaks["plain"], 4)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON file (default: benchmarks/results)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: all")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of either net")
    parser.add_argument("--steps", type=int, default=50, help="steps in a block")
    parser.add_argument("--depth", type=int, default=28)
    parser.add_argument("--width", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--labels", type=int, default=100)
    arguments = parser.parse_args()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.benchmark = True
    rows = []
    for mode in (arguments.mode or MODES) if device == "cuda" else MODES[:1]:
        sizes = (arguments.depth, arguments.width, arguments.batch, arguments.labels)
        row = compare(mode, arguments.blocks, arguments.steps, *sizes, device)
        rows.append(row)
        print(*(f"{name} {value}" for name, value in row.items() if "blocks" not in name), sep="  ", flush=True)
        path = save("step", {"rows": rows}, arguments.out)  # now: compiling the next may take what time is left
    print(path)


if __name__ == "__main__":
    main()
