"""Result files: JSON with the device, the versions and the commit that the figures belong to."""

import json
import os
import platform
import subprocess
from datetime import date
from pathlib import Path

import torch

from ar_kernels.experiments.files import write_atomically

FOLDER = Path(__file__).parent / "results"


def commit() -> str:
    """The commit measured: AR_KERNELS_COMMIT where the checkout was copied without its history, else git's word."""
    given = os.environ.get("AR_KERNELS_COMMIT")
    if given:
        return given
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(describe, capture_output=True, text=True, cwd=Path(__file__).parent)
    return answer.stdout.strip() or "unknown"


def environment() -> dict[str, str]:
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": device,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": commit(),
        "date": date.today().isoformat(),
    }


def save(name: str, content: dict, folder: Path | None = None) -> Path:
    """Writes results/<name>-<device>.json (or into folder) with the environment in front; returns the path."""
    where = environment()
    slug = where["device"].lower().replace("nvidia", "").strip().replace(" ", "-")
    path = (folder or FOLDER) / f"{name}-{slug}.json"
    text = json.dumps(where | content, indent=1) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
