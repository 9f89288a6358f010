"""Several processes that train one model, one for each device, as torchrun starts them.

    torchrun --nproc-per-node 2 -m glactl.cli train spec.yaml

A step has the same rows whatever the number W of processes. It is cut into n micro-batches, n being
train.accumulate or the next number that W divides and that divides the rows, and process r takes
the micro-batches m with m mod W = r. With L the sum of the step's cross-entropies and N the targets
of all processes, each computes the gradient of W L_r / N on its own rows, and PyTorch takes the
mean over processes:

    g = (1 / W) sum_r W dL_r / N = dL / N                                               (1)

which is the gradient of one process, but for the order of sums. `ddp` keeps the whole model in
every process; `fsdp` (fully_shard) keeps 1 / W of each weight, of its gradient and its moments, and
gathers the weights of some layers at a time, in fp32: as many as have UNIT parameters, for each
gathering costs the host some milliseconds, as long as a GPU takes for a small layer. Weights that
take KEPT of a device at most stay there from the forward pass to the backward one; larger ones are
gathered a second time. `auto` takes ddp where weights, gradients and moments fill at most SHARE of
a device, which leaves the rest to activations.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from glactl.device import pick_device

Mode = Literal["none", "ddp", "fsdp"]

UNIT = 2**26  # parameters, 256 MiB
KEPT = 0.1  # of a device's memory: weights of 2 B parameters (8 GB) on 80 GB
SHARE = 0.4  # of a device's memory: 1.3 B parameters (21 GB) on 80 GB, not on 40


@dataclass(frozen=True)
class Group:
    """The processes of a run, seen from one of them.

    rank: this one, from 0. saver: a group for checkpoints alone, where there are several.
    """

    rank: int = 0
    world: int = 1
    saver: dist.ProcessGroup | None = None

    @property
    def lead(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """x summed over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in some process."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.world > 1 else flag

    def told(self, value: Any) -> Any:
        """The value of the first process, in all."""
        found = [value]
        if self.world > 1:
            dist.broadcast_object_list(found)
        return found[0]

    def gathered(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        found = [value]
        if self.world > 1:
            found = [None] * self.world
            dist.all_gather_object(found, value)
        return found


ALONE = Group()


@contextmanager
def joined(device: str | None = None) -> Iterator[tuple[Group, torch.device]]:
    """The processes that torchrun started, or this one alone, and the device of this one.

    Args:
        device: as of `pick_device`; of several processes each takes the GPU of its number.

    Raises:
        ValueError: a numbered GPU for several processes.
        DeviceUnavailable: there is no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ALONE, pick_device(device)
        return
    where = pick_device(device)
    if where.type == "cuda":
        if where.index is not None:
            raise ValueError(f"device {where} is one, and there are {world} processes; give cuda")
        where = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(where)
    dist.init_process_group("cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo")
    try:
        yield Group(dist.get_rank(), world, dist.new_group(backend="gloo")), where
    finally:
        dist.destroy_process_group()


def parts_of(rows: int, wanted: int, world: int) -> int:
    """Micro-batches of a step; see above. Raises ValueError where the rows cannot be shared."""
    for n in range(wanted, rows + 1):
        if n % world == 0 and rows % n == 0:
            return n
    raise ValueError(
        f"a step of {rows} rows cannot be shared by {world} processes; nearest train.batch_size: "
        f"{max(round(rows / world), 1) * world}"
    )


def choose(wanted: str, world: int, state: int, memory: int) -> tuple[Mode, str]:
    """How processes share a model, and why.

    Args:
        wanted: train.parallel.
        world: processes.
        state: bytes of weights, gradients and moments.
        memory: bytes of a device.

    Raises:
        ValueError: several processes, and none of them to have a part.
    """
    if world == 1:
        return "none", "one process"
    if wanted == "none":
        raise ValueError(f"train.parallel is none, and there are {world} processes; allowed: one")
    if wanted != "auto":
        return "ddp" if wanted == "ddp" else "fsdp", "as train.parallel says"
    size = f"{state / 2**30:.3g} GiB of weights, gradients and moments"
    if state <= SHARE * memory:
        return "ddp", f"{size} fit each device's {memory / 2**30:.3g} GiB"
    return "fsdp", f"{size} are over {SHARE:.0%} of a device's {memory / 2**30:.3g} GiB"


def device_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def spread(
    whole: nn.Module, layers: list[nn.Module], mode: Mode, device: torch.device
) -> nn.Module:
    """What to call in the place of `whole`, whose gradients are then those of all processes.

    Args:
        whole: gives a loss; all its parameters are used.
        layers: parts of it, in the order in which they run, that fsdp gathers some at a time. fsdp
            moves all to `device`.
    """
    if mode == "none":
        return whole
    if mode == "ddp":
        # without device_ids inputs stay where they are: targets on the CPU, read without a wait
        return DistributedDataParallel(whole, gradient_as_bucket_view=True)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    size = sum(p.nbytes for p in whole.parameters())
    again = not stays(size, device_memory(device))
    for unit in _units(layers):
        fully_shard(unit, mesh=mesh, reshard_after_forward=again)
    fully_shard(whole, mesh=mesh)
    return whole


def stays(size: int, memory: int) -> bool:
    """Whether weights of so many bytes, gathered by fsdp, stay until the backward pass."""
    return size <= KEPT * memory


def _units(layers: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Neighbours that have UNIT parameters together, fewer only at the end."""
    unit, held = [], 0
    for layer in layers:
        unit.append(layer)
        held += sum(p.numel() for p in layer.parameters())
        if held >= UNIT or layer is layers[-1]:
            yield unit
            unit, held = [], 0


def syncing(called: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: with ddp, gradients are shared after the last one only.

    fsdp shares them each time, as it has no room for whole ones.
    """
    if isinstance(called, DistributedDataParallel) and not last:
        return called.no_sync()
    return nullcontext()


def settle(called: nn.Module) -> None:
    """Give back what a forward pass without a backward one has gathered."""
    for module in called.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
