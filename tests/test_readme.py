"""The documents' Python blocks run, each document's in their order and one namespace; README's files are there."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from ar_kernels.official import WideResNetAttention

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("name", "least"), [("README.md", 5), ("docs/porting.md", 4)])
def test_code_blocks_run(name, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = WideResNetAttention(10, 1, 5, 0, 3, 2, 0.001)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1).state_dict()
    content = {"state_dict": net.state_dict(), "optimizer": optimizer, "training_time": 1.0, "epoch": 1}
    torch.save(content, "checkpoint.pth")  # what docs/porting.md loads
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # its compiled part, built for CUDA, beside a CPU torch
        importlib.import_module("torchvision_on_cpu_torch")
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= least
    namespace: dict[str, object] = {}
    for block in blocks:
        line = text[: text.index(block)].count("\n")
        exec(compile("\n" * line + block, name, "exec"), namespace)


def test_links_and_targets_exist():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).is_file(), target
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
