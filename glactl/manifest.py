"""With what a run was made: versions, platform, git, arguments and the environment that counts."""

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from glactl import __version__
from glactl.device import device_name
from glactl.spec import RunSpec, spec_hash
from glactl.versions import installed

PACKAGES = ("torch", "triton", "numpy", "pydantic", "tokenizers", "datasets")
ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "GLACTL_DEVICE",
    "GLACTL_TILES",
)


def manifest_of(spec: RunSpec) -> dict[str, Any]:
    """The manifest of a run of `spec` that is made now."""
    return {
        "glactl": __version__,
        "created": now(),
        "argv": sys.argv,
        "spec_hash": spec_hash(spec),
        "seed": spec.seed,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: installed(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        "git": _git(),
    }


def measured_on(device: torch.device, commit: str | None = None) -> dict[str, Any]:
    """Where numbers were measured, which stands before them: the device, versions, and the commit,
    which of a tree without git must be told."""
    tree = _git()
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": installed("triton"),
        "python": platform.python_version(),
        "commit": commit or (tree and tree["commit"]),
    }


def _git() -> dict[str, Any] | None:
    """The commit of this source tree and whether it was changed; None outside of a work tree."""
    here = Path(__file__).resolve().parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10
        ).stdout

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not some repository around us
        commit = git("rev-parse", "HEAD").strip()
        return {"commit": commit, "changed": bool(git("status", "--porcelain").strip())}
    except (OSError, subprocess.SubprocessError):
        return None


def now() -> str:
    """The time, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
