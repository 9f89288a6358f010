"""What the environment is made of, told without importing any of it."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from glactl import __version__

PACKAGES = ("torch", "triton", "numpy", "datasets", "lm-eval", "tokenizers", "safetensors")


def installed(name: str) -> str | None:
    """The version of an installed distribution, None where there is none."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def driver() -> str | None:
    """The version of NVIDIA's driver, None where none answers within 5 s."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = found.stdout.split() if found.returncode == 0 else []
    return lines[0] if lines else None


def lines() -> list[str]:
    """What `glactl --version` prints."""
    packages = [f"{name} {installed(name) or 'not installed'}" for name in PACKAGES]
    gpu = driver()
    where = f"{os.cpu_count()} CPUs" + (f", NVIDIA driver {gpu}" if gpu else ", no NVIDIA driver")
    return [
        f"glactl {__version__}",
        f"Python {platform.python_version()}",
        ", ".join(packages),
        f"{platform.platform()}, {where}",
    ]
