"""An attended layer's node of autograd in C++ (csrc/node), where one was built for this torch and this Python, and the
Triton operators as compiled graphs call them.

Without it ops._WantedGatedAttend and ops._run_operator do the same in Python: a call then takes more of the host's
time, no more than that.

The environment variable AR_KERNELS_NODE=0, read at import, turns it off.
"""

import functools
import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import native

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
VERSION = re.sub(r"^(\d+\.\d+\.\d+)\+.*", r"\1", torch.__version__)
PATH = Path(__file__).with_name(f"_node-{VERSION}{SUFFIX}")
"""Of the file that setup.py builds beside such a torch: its classes are laid out as that one's are, no other's. Builds
of one release do not differ in that; of what is no release, any two may."""

python: Sequence[Callable[..., Any]] = ()
"""What it calls where Python has to do it: ops._made, ops._gradients and ops._run_operator, set there."""

wanted = os.environ.get("AR_KERNELS_NODE", "1") != "0"


def why_not() -> str | None:
    """What stops the node from being used; None if nothing does."""
    if not wanted:
        return "AR_KERNELS_NODE=0 turns it off"
    found = _load()
    return found if isinstance(found, str) else None


def module() -> ModuleType | None:
    """What csrc/node exports, or None: why_not says why."""
    found = _load() if wanted else None
    return found if isinstance(found, ModuleType) else None


@functools.cache
def _load() -> ModuleType | str:
    if not PATH.exists():
        others = ", ".join(sorted(path.name for path in PATH.parent.glob("_node-*")))
        return f"there is no {PATH.name}" + (f", only {others}" if others else "")
    reason = native.why_not("cpu")
    if reason is not None:
        return reason
    spec = importlib.util.spec_from_file_location("ar_kernels._node", PATH)
    assert spec is not None and spec.loader is not None
    try:
        loaded = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(loaded)
    except ImportError as error:
        return f"{PATH.name} cannot be loaded: {error}"
    if loaded.sources != native.sources():
        return f"{PATH.name} and {native.PATH.name} were not built together"
    try:
        loaded.set_python(*python)
    except TypeError:
        return f"{PATH.name} was built from an older csrc"
    return loaded
