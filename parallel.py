"""One training on several cores and in several processes: a batch in parts, and the ranks of torchrun (all ours).

    torchrun --nproc-per-node 8 train.py --out runs/mine ...      one process a GPU, on one machine or many

Every process is a rank: it takes its share of each batch, and before each step the gradients of all are averaged. They
start alike and take equal steps, so their weights stay equal. Rank 0 alone writes files and speaks.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from data import InputError
from progress import mean_bands

# ----------------------------------------------------------------------------------------------------------------------
# Ranks


def started_by_torchrun() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun says it; 0 and 1 without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs of a machine the one of this process."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def join(device: torch.device) -> None:
    """Under torchrun, waits for the other processes; from here on they are ranks."""
    if started_by_torchrun()[1] > 1:
        # torchrun keeps one store for all its restarts: without a prefix a rank would call the dead at their addresses
        store, number, count = next(rendezvous("env://"))
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=count)


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which of the processes this is, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def restarted() -> bool:
    """Whether torchrun has started this process again after another one died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


@torch.no_grad()
def average_over_ranks(tensors: list[Tensor]) -> None:
    """Every tensor becomes its mean over all ranks, in place; raises InputError where one of them has ended."""
    if world() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])  # one message instead of hundreds
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:
            raise InputError(f"rank {rank()}: another rank has ended, its reason is above; add --resume to go on from "
                             f"the last checkpoint") from error
        for tensor, mean in zip(tensors, (flat / world()).split([tensor.numel() for tensor in tensors])):
            tensor.copy_(mean.view_as(tensor))


# ----------------------------------------------------------------------------------------------------------------------
# Cores


def backward(losses: list[tuple[float, Callable]], parameters: list[nn.Parameter], pool: ThreadPoolExecutor,
             autocast: Callable) -> tuple[float, list]:
    """Parts of a batch, (its share, its loss) each -> the batch's loss, gradients going into p.grad, and its bands.

    On a CPU each core takes a part of its own, since two cores share the small products of a small network badly; on a
    GPU one part follows the other, which is gradient accumulation: as large a batch in less memory.
    """
    def run(part: tuple[float, Callable]) -> tuple:
        share, loss = part
        with autocast():
            value, bands = loss()
        value = share * value
        return value.item(), bands, torch.autograd.grad(value, parameters, allow_unused=True)

    values, bands = [], []
    with threads(torch.get_num_threads() // min(len(losses), pool._max_workers)):
        for value, of_part, gradients in pool.map(run, losses):
            for p, gradient in zip(parameters, gradients):
                if gradient is not None:
                    p.grad = gradient if p.grad is None else p.grad.add_(gradient)
            values.append(value)
            bands.append(of_part)
    return sum(values), mean_bands(bands)


@contextmanager
def threads(count: int):
    """Torch's operations take `count` threads each, one at least, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free for those of the next step, where each step had pages zeroed anew."""
    with suppress(OSError, TypeError, AttributeError):  # systems without glibc do as they do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no large blocks of their own, which go back to the kernel at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
