"""torch.export and AOTInductor: what was exported runs in another process, which has no Triton."""

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from backbones import OwnNet
from torch import nn

from ar_kernels import AttendRectify, AttentionModule, native, use_implementation
from ar_kernels.models import WideAttentiveResNet

LABELS = 5
ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    def __init__(self, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.attention = AttentionModule(6, LABELS, 3, kernel_size=kernel_size)

    def forward(self, images):
        out = self.attention(self.conv(images), masks=True, tap=True)
        return out.hypothesis, out.masks + out.feature_map.mean(dim=1, keepdim=True)


MODELS = {
    "module": Net,
    "3×3 module": lambda: Net(kernel_size=3),
    "WARN": lambda: WideAttentiveResNet(10, 1, LABELS, attention_depth=2, attention_width=2),
    "AttendRectify": lambda: AttendRectify(OwnNet(LABELS), ["middle.0", "end"], LABELS, heads=2),
}


def exported(name: str, implementation: str, device: torch.device) -> tuple:
    """The program, images of another batch and resolution, and what the model makes of them."""
    torch.manual_seed(0)
    model = MODELS[name]().to(device).eval()
    images = torch.randn(2, 3, 8, 12, device=device)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    several = isinstance(model, AttendRectify)  # its forward takes *inputs
    other = torch.randn(3, 3, 16, 8, device=device)
    with use_implementation(implementation), torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=((sizes,),) if several else (sizes,))
        return program, other, model(other)


@pytest.mark.parametrize("name", MODELS)
def test_any_batch_and_resolution(name, implementation, device):
    program, images, expected = exported(name, implementation, device)
    targets = {str(node.target) for node in program.graph.nodes}
    assert any(".layer." in target for target in targets) == (implementation != "eager")
    torch.testing.assert_close(program.module()(images), expected)


PROCESS = """
import sys
import torch

how, natives = sys.argv[1], sys.argv[2:]

def run(name):
    images, expected = torch.load(f"{name}.tensors")
    if how == "AOTInductor":
        got = torch._inductor.aoti_load_package(f"{name}.pt2")(images)
    else:
        got = torch.export.load(f"{name}.pt2").module()(images)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

with torch.no_grad():
    run("eager")
    assert "ar_kernels" not in sys.modules
    for name in natives:
        try:
            run(name)
        except RuntimeError:
            continue
        raise AssertionError(f"{name} ran without the package")
    import ar_kernels
    for name in natives:
        run(name)
    if how == "export":
        try:
            run("triton")
        except RuntimeError as error:
            print(error)
"""


@pytest.mark.parametrize("how", ["export", "AOTInductor"])
def test_in_a_process_without_triton(how, device, tmp_path):
    """Eager needs not even the package; native the package; the Triton operators say what they miss."""
    pytest.importorskip("triton")
    natives = ["native"] if native.why_not(device.type) is None else []
    for name in ("eager", *natives, *(["triton"] if how == "export" else [])):
        program, images, expected = exported("module", name, device)
        torch.save((images, expected), tmp_path / f"{name}.tensors")
        if how == "AOTInductor":
            package(program, tmp_path / f"{name}.pt2", device)
        else:
            torch.export.save(program, tmp_path / f"{name}.pt2")
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('no triton here')\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", PROCESS, how, *natives]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    if how == "export":
        assert run.stdout.startswith("the operators of ar_kernels cannot run: "), run.stdout
        assert run.stdout.endswith("under use_implementation('eager') or ('native') runs without Triton\n")


BARE = """
import sys
import torch

model, x = torch.nn.Linear(3, 2).to(sys.argv[1]), torch.randn(4, 3, device=sys.argv[1])
with torch.no_grad():
    program = torch.export.export(model, (x,))
    package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[2] + "/bare.pt2")
    torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))
"""


@functools.cache
def _bare_aotinductor(device: str, compiler: str) -> str | None:
    """Why AOTInductor does not run a linear layer of torch's own, in a process that may crash; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"CXX": compiler, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, "-c", BARE, device, folder]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    return f"signal {-run.returncode}" if run.returncode < 0 else run.stderr.strip().splitlines()[-1]


def package(program: torch.export.ExportedProgram, path: Path, device: torch.device) -> str:
    """What AOTInductor makes of a program. A compiler that links libstdc++ statically makes packages that end or crash
    the process as they are loaded, a linear layer's too: on a GPU the next one in line is taken then, and the test
    skipped if there is none. Not asked on a CPU: it costs half a minute."""
    compiler, reasons = os.environ.get("CXX", "g++"), {}
    if device.type == "cuda":
        for name in dict.fromkeys((compiler, "g++", "clang++")):
            reasons[name] = _bare_aotinductor(device.type, name) if shutil.which(name) else "not there"
            if reasons[name] is None:
                compiler = name
                break
        else:
            version = f"AOTInductor of torch {torch.__version__}"
            pytest.skip(f"{version} cannot run a linear layer on {device.type} here: {reasons}")
    with torch._inductor.config.patch({"cpp.cxx": (compiler,)}):
        return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@pytest.mark.gpu
def test_aotinductor_of_the_triton_operators(device, tmp_path):
    """They stay whole in the package, which then runs them where Python, the package and Triton are."""
    pytest.importorskip("triton")
    program, images, expected = exported("module", "triton", device)
    path = package(program, tmp_path / "module.pt2", device)
    torch.testing.assert_close(torch._inductor.aoti_load_package(path)(images), expected, rtol=1e-4, atol=1e-4)
