"""`glactl doctor`: what the machine has, whether the kernels are right on it, what is missing.

Every check tells what it found, one word, and what is lost where it is not "ok":

    ok         as it should be
    missing    something is slower or cannot be done; the rest works
    broken     nothing, or nothing right, can be done: the command ends with code 3, or with 1
               where the kernels do not agree with their definition
"""

import importlib.util
import os
import platform
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

from glactl import console
from glactl.device import pick_device
from glactl.kernels import gla_step
from glactl.profile.cases import allowed_error
from glactl.profile.operators import OPERATORS, Shape, error, relative
from glactl.versions import driver, installed

PATIENCE = 3.0  # seconds for the hub
DISK, MEMORY = 5 * 2**30, 4 * 2**30  # bytes, below which something does not fit
OPTIONAL = {
    "transformers": "an export to hf is not compared with transformers' own model",
    "fla": "no flash-linear-attention beside our kernels (profile --fla)",
}
REQUIRED = ("datasets", "lm_eval", "tokenizers", "safetensors", "matplotlib")
Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Check:
    """One line of the table. costs: what is lost, "" where nothing is."""

    name: str
    found: str
    status: Status = "ok"
    costs: str = ""
    exit_code: int = field(default=3, repr=False)  # of the command, where it is broken


class Unwell(OSError):
    """Something that everything needs is broken."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def doctor_command(*, device: str | None = None, json: bool = False) -> None:
    """Run `glactl doctor`; the arguments are the command's options.

    Raises:
        ValueError, DeviceUnavailable: as of pick_device.
        Unwell: a check is broken.
    """
    where = pick_device(device)
    rows = checks(where)
    if json:
        console.result({"checks": [asdict(row) for row in rows]})
    else:
        table = [[row.name, row.found, row.status, row.costs] for row in rows]
        console.table(["", "found", "status", "what that costs"], table)
    broken = [row for row in rows if row.status == "broken"]
    if broken:
        told = "; ".join(f"{row.name}: {row.found} ({row.costs})" for row in broken)
        raise Unwell(told, max(broken, key=lambda row: row.exit_code == 3).exit_code)


def checks(where: torch.device) -> list[Check]:
    """Every line, in the order of the table; some seconds, more where kernels are compiled."""
    return [
        python(),
        Check("torch", torch.__version__),
        triton(where),
        nvidia(where),
        the_device(where),
        *(kernel(op.name, where) for op in OPERATORS if op.name != "attention"),
        steps(where),
        *packages(),
        data(),
        hub(),
        disk(),
        memory(where),
    ]


def python() -> Check:
    """The interpreter."""
    return Check("Python", f"{platform.python_version()} at {sys.prefix}")


def triton(where: torch.device) -> Check:
    """The kernels' compiler, which a CPU has no use for."""
    found = installed("triton")
    if found is not None:
        return Check("triton", found)
    cost = "kernels run in their PyTorch form, several times slower" if _gpu(where) else ""
    return Check("triton", "not installed", "missing" if cost else "ok", cost)


def nvidia(where: torch.device) -> Check:
    """The driver."""
    found = driver()
    if found is None:
        return Check("driver", "no NVIDIA driver", "missing", "everything runs on the CPU")
    if torch.version.cuda is None:
        return Check("driver", found, "missing", "this torch is built without CUDA: CPU alone")
    return Check("driver", f"{found}, torch built for CUDA {torch.version.cuda}")


def the_device(where: torch.device) -> Check:
    """Where commands compute if nothing else is said."""
    if _gpu(where):
        bf16 = torch.cuda.is_bf16_supported(False)
        cost = "" if bf16 else "no bf16: products are of fp32, several times slower"
        name = f"{where}, {torch.cuda.get_device_name(where)}"
        return Check("device", name, "ok" if bf16 else "missing", cost)
    n = torch.get_num_threads()
    found = f"cpu, {platform.machine()}, {n} thread{'s' if n > 1 else ''}"
    return Check("device", found, "missing", "models of more than some million weights take days")


def kernel(name: str, where: torch.device) -> Check:
    """Whether an operator, forward and backward, is its recurrence in fp64 on this device."""
    operator = next(op for op in OPERATORS if op.name == name)
    dtype = torch.bfloat16 if _gpu(where) else torch.float32
    form = "triton" if _gpu(where) and installed("triton") else "chunked PyTorch form"
    start = time.monotonic()
    try:
        worst, T = error(operator, Shape(1, 150, 2, 64, 64, dtype), where, 0)
    except Exception as caught:  # whatever a compiler, a driver or a launch raises
        first = (str(caught).strip() or type(caught).__name__).splitlines()[0]
        return Check(f"kernel {name}", first[:120], "broken", "does not run here", 3)
    seconds = time.monotonic() - start
    found = f"{form}, {seconds:.1f} s, error {worst:.0e} over {T} tokens in {_short(dtype)}"
    if not worst <= allowed_error(dtype):
        return Check(f"kernel {name}", found, "broken", "results are wrong here", 1)
    return Check(f"kernel {name}", found)


def steps(where: torch.device) -> Check:
    """Whether one-token steps of a key gate are their recurrence."""
    shape = Shape(2, 8, 2, 64, 64, torch.bfloat16 if _gpu(where) else torch.float32)
    inputs = OPERATORS[1].inputs(shape, where, 0)
    state = torch.zeros(2, 2, 64, 64, device=where)
    try:
        tokens = zip(*(x.unbind(1) for x in inputs), strict=True)
        ours = [gla_step(q, k, v, state, gk=gk) for q, k, v, gk in tokens]
    except Exception as caught:  # as of `kernel`
        return Check("kernel step", str(caught)[:120], "broken", "does not run here")
    truth = OPERATORS[1].reference(*(x.double() for x in inputs))
    worst = relative(torch.stack(ours, dim=1), truth)
    right = worst <= allowed_error(shape.dtype)
    found = f"error {worst:.0e} over {shape.T} tokens in {_short(shape.dtype)}"
    status: Status = "ok" if right else "broken"
    return Check("kernel step", found, status, "" if right else "results are wrong here", 1)


def packages() -> list[Check]:
    """Libraries that commands import late."""
    gone = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    found = ", ".join(name for name in REQUIRED if name not in gone)
    cost = f"pip install {' '.join(gone)}" if gone else ""
    rows = [Check("packages", found, "broken" if gone else "ok", cost)]
    for name, lost in OPTIONAL.items():
        have = importlib.util.find_spec(name) is not None
        text = installed(name) or "installed" if have else "not installed"
        rows.append(Check(name, text, "ok" if have else "missing", "" if have else lost))
    return rows


def data() -> Check:
    """The text that needs no network: the documentation of the running Python."""
    from glactl.tasks.corpus import documents

    try:
        size = sum(len(text) for text in documents("pydoc"))
    except Exception as caught:  # as of a Python without its sources
        lost = "the default data set is not here: data.source needs a file or a folder"
        return Check("data", str(caught).splitlines()[0][:120], "missing", lost)
    return Check("data", f"pydoc, {size / 1e6:.1f} M characters")


def hub() -> Check:
    """Whether the Hugging Face hub answers within PATIENCE."""
    from huggingface_hub import constants

    lost = "data sets and models of the hub come from its cache alone; files and --sample work"
    if constants.HF_HUB_OFFLINE:
        return Check("hub", "HF_HUB_OFFLINE is set", "missing", lost)
    answer: list[str] = []

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
                answer.append(f"{constants.ENDPOINT} answers ({reply.status})")
        except urllib.error.HTTPError as caught:  # an answer, if not a friendly one
            answer.append(f"{constants.ENDPOINT} answers ({caught.code})")
        except (OSError, ValueError):
            return

    # a name server may take longer than any timeout of the request
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if answer:
        return Check("hub", answer[0])
    return Check("hub", f"{constants.ENDPOINT} does not answer in {PATIENCE:g} s", "missing", lost)


def disk() -> Check:
    """Room for runs here, and whether files can be made."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    found = f"{_size(free)} free in {here}"
    if not os.access(here, os.W_OK):
        return Check("disk", f"{here} cannot be written", "broken", "runs need a folder")
    if free < DISK:
        return Check("disk", found, "missing", "checkpoints of large models do not fit")
    return Check("disk", found)


def memory(where: torch.device) -> Check:
    """Memory that is free now, of the device."""
    if _gpu(where):
        free, total = torch.cuda.mem_get_info(where)
    else:
        free, total = _ram()
    found = f"{_size(free)} free of {_size(total)}" if total else "not known"
    low = total > 0 and free < MEMORY
    lost = "smaller batches: train.batch_size, profile --tokens" if low else ""
    return Check("memory", found, "missing" if low else "ok", lost)


def _ram() -> tuple[int, int]:
    """Bytes free and in all, (0, 0) where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0, 0
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return sizes.get("MemAvailable", 0), sizes.get("MemTotal", 0)


def _gpu(where: torch.device) -> bool:
    return where.type == "cuda"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB"
