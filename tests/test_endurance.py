"""Trainings that are killed, and memory that must not grow."""

import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import test_experiments
import torch
from torch import nn

import ar_kernels

ROOT = Path(__file__).parent.parent

# ---------------------------------------------------------------------------------------------- kills

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import ar_kernels
from ar_kernels.experiments.training import Recipe, Run, train

STEPS = 120

def work(folder, resume):
    torch.manual_seed(0)
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)
            self.attention = ar_kernels.AttentionModule(4, 3, 2)
        def forward(self, x):
            return self.attention(self.norm(self.conv(x))).hypothesis
    def batch_of(step):
        generator = torch.Generator().manual_seed(step)
        return torch.randn(4, 1, 8, 8, generator=generator), torch.randint(3, (4,), generator=generator)
    with Run(folder, {"seed": 0}, resume=resume) as run:
        train(Net(), batch_of, Recipe(steps=STEPS, batch_size=4), run, checkpoint_every=2)

def child(folder, resume):
    pid = os.fork()  # before any thread was started; an import of torch for each kill would take minutes
    if pid == 0:
        work(folder, resume)
        os._exit(0)
    return pid

folder = Path(sys.argv[1])
assert os.waitpid(child(folder / "unbroken", False), 0)[1] == 0
metrics = folder / "broken" / "metrics.jsonl"

def lines():
    return metrics.read_bytes().count(b"\\n") if metrics.exists() else 0

chance, kills, goal = random.Random(int(sys.argv[3])), 0, 0
while kills < int(sys.argv[2]):
    pid = child(folder / "broken", kills > 0)
    goal += chance.randrange(6)  # lines of metrics until it is killed: 0 while it starts; all together less than STEPS
    while lines() < goal:
        time.sleep(0.001)
    time.sleep(chance.random() * 0.01)  # at any moment of a step
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status), (kills, status, "ended before it was killed")
    kills += 1
    print(kills, lines())
assert os.waitpid(child(folder / "broken", True), 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_killed_twenty_times_it_ends_as_the_unbroken_run(tmp_path):
    """SIGKILL at random moments, of the start as well: in a step, in a write, between checkpoint and metrics."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    seed = str(int.from_bytes(os.urandom(4), "big"))
    command = [sys.executable, "-c", KILLED, str(tmp_path), "20", seed]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, f"seed {seed}: {run.stdout}{run.stderr}"
    lines = [int(line.split()[1]) for line in run.stdout.splitlines()]
    assert len(lines) == 20 and max(lines) > 0, run.stdout
    test_experiments.assert_same_run(tmp_path / "broken", tmp_path / "unbroken")
    assert len((tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()) == 120


# ---------------------------------------------------------------------------------------------- memory

STEPS = 10_000


def a_training(device: torch.device, implementation: str | None):
    """A step of a tiny attentive net with everything on: a tap, masks, global gates, rectification."""
    torch.manual_seed(0)
    conv, attention = nn.Conv2d(2, 4, 1).to(device), ar_kernels.AttentionModule(4, 3, 2).to(device)
    gates = ar_kernels.GlobalGates(4, 2).to(device)
    optimizer = torch.optim.SGD([*conv.parameters(), *attention.parameters(), *gates.parameters()], lr=0.01)
    images, labels = torch.randn(4, 2, 8, 8, device=device), torch.tensor([0, 1, 2, 0], device=device)

    def step() -> None:
        with ar_kernels.use_implementation(implementation):
            layer = attention(conv(images), global_gates=gates, masks=True, tap=True)
            own = layer.feature_map.mean(dim=(2, 3))[:, :3]
            output = ar_kernels.rectify([layer.hypothesis, own], layer.global_scores)
            loss = nn.functional.cross_entropy(output, labels) + 1e-3 * layer.masks.square().sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

    return step


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(value, torch.Tensor) for value in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="there is no /proc to read memory from")
def test_ten_thousand_steps_on_a_cpu_take_no_more_memory(device):
    """After a warm-up neither tensors nor resident memory grow: one map of 4 KB kept per step would be 36 MB."""
    if device.type != "cpu":
        pytest.skip("on a GPU the test below measures")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    step = a_training(device, None)
    for _ in range(STEPS // 10):
        step()
    tensors, memory = live_tensors(), resident()
    for _ in range(STEPS - STEPS // 10):
        step()
    assert live_tensors() <= tensors
    assert resident() - memory < 4 * 2**20


@pytest.mark.gpu
def test_ten_thousand_steps_on_a_gpu_take_no_more_memory(device):
    for implementation in ("triton", "eager"):
        step = a_training(device, implementation)
        for _ in range(STEPS // 10):
            step()
        torch.cuda.synchronize()
        tensors, memory = live_tensors(), torch.cuda.memory_allocated()
        reserved = torch.cuda.memory_reserved()
        for _ in range(STEPS - STEPS // 10):
            step()
        torch.cuda.synchronize()
        assert live_tensors() <= tensors
        assert torch.cuda.memory_allocated() <= memory and torch.cuda.memory_reserved() <= reserved


def test_attending_modules_hold_nothing_after_a_step(device):
    """No module keeps a tensor of a step that is over."""
    tensors = []
    step = a_training(device, None)
    for _ in range(3):
        step()
        tensors.append(live_tensors())
    assert tensors[1] == tensors[2]
