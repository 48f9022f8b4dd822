"""What the commands share (all ours): mistakes in one line, the files of a run, signals, processes,
optimizers with their schedule, and the moving average of the weights.

A run writes OUT/model.pt, checkpoint.pt, log.csv, loss.png (with matplotlib) and samples/.
"""

import csv
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tiny import Muon


class InputError(ValueError):
    """A mistake of the user's: one line that names the file or flag and the remedy (ours)."""


# --------------------------------------------------------------------------------------------------
# Files of a run


def save_checkpoint(path: str | Path, checkpoint: dict) -> None:
    """Write a file whole or not at all: to a temporary name, flushed, renamed. Or InputError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: cannot be written ({reason}), what was saved before is whole; "
                         f"make room or choose another --out") from error


def load_checkpoint(path: str | Path, kind: str) -> dict:
    """Read a file of `save_checkpoint`, memory-mapped, running no code, or raise InputError."""
    path = Path(path)
    if path.suffix == ".safetensors":
        raise InputError(f"{path}: holds weights without their sizes; give a model.pt of train.py, "
                         f"or a whole Stable Diffusion folder in diffusers' layout")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder here, and nothing is downloaded; give a "
                         f"model.pt of train.py, or a Stable Diffusion folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); change its "
                         f"permissions") from error
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: not a model.pt of train.py, or cut off; train again") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != kind:
        raise InputError(f'{path}: not a "{kind}" file; sample.py reads model.pt, --resume '
                         f"checkpoint.pt")
    return checkpoint


BINS = 4  # of the timestep: t in [0, 250), [250, 500), [500, 750), [750, 1000)
COLUMNS = ("stage", "step", "loss", "held_out_loss", "learning_rate", "seconds",
           *(f"loss_bin_{i}" for i in range(BINS)))  # of log.csv


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run: its log.csv begins with the columns of ours."""
    try:
        with open(folder / "log.csv", "rb") as file:
            return file.readline().startswith(b"stage,step,loss")
    except OSError:
        return False


def claim_folder(out: str | None, name: str, n: int = 1) -> tuple[Path, TextIO]:
    """Make a run's folder, OUT or a new runs/NAME[-N] -> it and its log.csv, open and locked.

    The lock ends with the file or the process; Windows and some networks have none. Raises
    InputError where another training has the folder, where log.csv is somebody else's, or where the
    folder cannot be made.
    """
    folder = Path(out or f"runs/{name}{f'-{n}' if n > 1 else ''}")
    log = folder / "log.csv"
    try:
        folder.mkdir(parents=True, exist_ok=bool(out))
        if log.exists() and log.stat().st_size and not is_run(folder):
            raise InputError(f"--out {folder}: its log.csv is of no run of train.py, and would be "
                             f"overwritten; name another folder")
        file = open(log, "a")
    except OSError as error:
        if isinstance(error, FileExistsError) and not out:
            return claim_folder(out, name, n + 1)
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose "
                         f"another") from error
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {folder}: another training writes there; wait for its end, or "
                         f"choose another folder") from error
    except (ImportError, OSError):  # there are no locks here
        pass
    return folder, file


def append_log(path: Path, row: dict) -> None:
    """Add a row to log.csv, on a line of its own even if a kill has cut off the last one."""
    with open(path, "a+", newline="") as file:
        size = file.tell()
        file.seek(max(0, size - 1))
        is_cut_off = size > 0 and file.read() != "\n"
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not size:
            writer.writeheader()
        file.write("\n" * is_cut_off)
        writer.writerow(row)


def read_log(path: Path) -> list[dict]:
    """Read the rows of log.csv; of a step that was trained twice, after a kill, its last row."""
    rows = csv.DictReader(path.read_text().splitlines())
    whole = [row for row in rows if None not in row.values() and None not in row]
    return [*{(row["stage"], row["step"]): row for row in whole}.values()]


def lowest_held_out_loss(path: Path, stage: str) -> str:
    """Find the lowest held-out loss of a stage in log.csv -> "STEP, LOSS", "" if there is none."""
    found = [(float(row["held_out_loss"]), row["step"]) for row in read_log(path)
             if row["stage"] == stage and row["held_out_loss"]]
    return f"{min(found)[1]}, {min(found)[0]:.4f}" if found else ""


def plot_losses(rows: list[dict], picture: Path) -> None:
    """Draw the losses of log.csv, one plot for each stage; draw nothing without matplotlib."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own backend is known in the notebook alone
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not rows:
        return
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(5 * len(stages), 4), layout="constrained")
    for axes, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages):
        for name in [name for name in rows[0] if "loss" in name]:
            points = [(int(row["step"]), float(row[name])) for row in rows
                      if row["stage"] == stage and row[name]]
            if points:
                axes.plot(*zip(*points), label=name, linewidth=0.5)
        axes.set(title=f"stage {stage}", xlabel="step", yscale="log")
        axes.legend()
    figure.savefig(picture)


# --------------------------------------------------------------------------------------------------
# Commands and signals


def run_command(name: str, main: Callable) -> None:
    """Run a command; a mistake of the user's ends it with one line and exit status 2."""
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the shell
            setattr(sys, stream, open(os.devnull, "w"))
        if hasattr(getattr(sys, stream), "reconfigure"):  # a notebook's streams have none
            # a caption may not be in the console's encoding
            getattr(sys, stream).reconfigure(errors="backslashreplace")
    torch.set_flush_denormal(True)  # many weights come near zero, which makes a CPU slow
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    rank = process_rank()
    before = None
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and "WORLD_SIZE" not in os.environ:  # processes that wait for others end at once
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        main()
    except (InputError, OSError, ModuleNotFoundError) as error:
        remedy = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        if rank:
            time.sleep(1)  # a mistake that all processes meet is told by the first, which ends this
        print(f"{name}{f', process {rank}' if rank else ''}: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if rank == 0:
            print(f"{name}: stopped, nothing written", file=sys.stderr)
        sys.exit(130)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list: the current step is finished and saved first."""
    stop = []
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        signals = ()  # only the main thread may handle them
    before = {number: signal.signal(number, lambda *_: stop.append(True)) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# Devices and processes


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best there is. InputError if it is not there."""
    available = {"cpu": 1}
    if torch.backends.mps.is_available():
        available = {"mps": 1, **available}
    if torch.cuda.is_available():
        available = {"cuda": torch.cuda.device_count(), **available}
    try:
        device = torch.device(name or [*available][0])
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= available.get(device.type, 0):
        raise InputError(f"--device {name}: not on this machine; use {' or '.join(available)}")
    return device


def check_precision(device: torch.device, precision: str) -> None:
    """Raise InputError for bf16 where this torch has no bfloat16 on the device."""
    with suppress(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with autocast(device, precision):
            if precision == "fp32" or torch.is_autocast_enabled(device.type):
                return
    raise InputError(f"--precision {precision}: this torch does not train so on {device.type}; "
                     f"use fp32")


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Run a forward pass in a precision: autocast for bf16, nothing for fp32.

    On a CPU attention is not the fused one, whose backward pass is slow in bfloat16.
    """
    with ExitStack() as contexts:
        if precision == "bf16":
            contexts.enter_context(torch.autocast(device.type, torch.bfloat16))
            if device.type == "cpu":
                contexts.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def free_memory(device: torch.device) -> float:
    """Return how much memory is free on a device, in GB; infinity where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 1e9
    free = math.inf
    with suppress(OSError, ValueError, StopIteration):  # Linux alone; a container may have less
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) / 1e6 for line in lines if "MemAvailable" in line)
        folder = Path("/sys/fs/cgroup")
        used, most = ((folder / f"memory.{kind}").read_text() for kind in ("current", "max"))
        free = min(free, (int(most) - int(used)) / 1e9)
    return free


def usable_cores() -> int:
    """Return how many cores this process may use, which can be fewer than the machine has."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):  # what a container may use of them; "max" is no number
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def process_rank() -> int:
    """Return which of the processes that train together this is; the first is 0."""
    return int(os.environ.get("RANK", 0))


def process_count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def add_up(x: Tensor) -> None:
    """Add a tensor up over all processes, in place; each of them waits for the others."""
    if process_count() > 1:
        dist.all_reduce(x)


def start_processes(count: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Start this command again as processes 1 .. count - 1; the present one becomes process 0.

    The matrices are so small that two processes keep two cores busier than two threads do. Raises
    InputError where processes cannot talk to each other.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError as error:
        raise InputError(f"--ranks {count}: this machine has no loopback network "
                         f"({error.strerror or error}); add --ranks 1") from error
    threads = max(1, usable_cores() // count)
    torch.set_num_threads(threads)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, *arguments], env={**os.environ, "RANK": str(i)})
            for i in range(1, count)]


def join_processes(device: torch.device, others: list[subprocess.Popen]) -> torch.device:
    """Wait for the other processes, if there are any; returns the device of this one.

    `others` are those that this process has started. Raises InputError if one of them ends.
    """
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if process_count() == 1:
        return device
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun watches over its processes
        dist.init_process_group(backend)
        return device
    rank, count = process_rank(), process_count()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), count,
                          is_master=rank == 0, wait_for_workers=False)
    store.add("joined", 1)
    while store.add("joined", 0) < count:
        for process in others:
            if process.poll() is not None:
                raise InputError(f"another process ended before the training began, with status "
                                 f"{process.returncode}; add --ranks 1")
        time.sleep(0.05)
    dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return device


def leave_processes(others: list[subprocess.Popen]) -> None:
    """End the processes that this one has started, if any are left, and be one process again."""
    for process in others:  # they have ended, or wait for this one, which has failed
        process.kill()
    if others:
        if dist.is_initialized():
            dist.destroy_process_group()
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


# --------------------------------------------------------------------------------------------------
# Optimizers and the moving average


def build_optimizers(modules: list[nn.Module], groups: list[dict],
                     muon: bool) -> list[torch.optim.Optimizer]:
    """Make AdamW and, with `muon`, Muon for the weight matrices of `modules` in `groups`.

    AdamW keeps embeddings, norms, biases, adaptors and the outermost layers.
    """
    matrices = set()
    for module in modules if muon else []:
        for name, layer in module.named_modules():
            is_outermost = name.split(".")[-1] in ("conv_in", "conv_out")
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not is_outermost:
                matrices.add(layer.weight)
    for_adamw = []
    for_muon = []
    for group in groups:
        parameters = group["params"]
        for_adamw.append({**group, "params": [p for p in parameters if p not in matrices]})
        for_muon.append({**group, "params": [p for p in parameters if p in matrices]})
    fused = next(modules[0].parameters()).device.type in ("cpu", "cuda")  # all in one kernel
    adamw = torch.optim.AdamW(for_adamw, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    return [adamw, Muon(for_muon)] if muon else [adamw]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], peaks: tuple[float, ...], step: int,
                       steps: int, warmup: int) -> None:
    """Set the learning rate of every group: a cosine from its start, times a linear warm-up."""
    for optimizer, peak in zip(optimizers, peaks):
        for group in optimizer.param_groups:
            done = max(0, step - group["start"])
            rise = min(1.0, (done + 1) / max(warmup, 1))
            fall = 0.5 * (1 + math.cos(math.pi * done / (steps - group["start"])))
            group["lr"] = peak * rise * fall


class EMA:
    """Moving average of weights; its decay rises as (1 + n) / (10 + n), to forget the start.

    torch's AveragedModel would copy the whole model, where this keeps what is trained.
    """

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.count = 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights, after a step of the optimizer."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for average, p in zip(self.shadow, self.parameters):
            average.lerp_(p, 1 - decay)  # average <- decay average + (1 - decay) weight

    @contextmanager
    def applied(self):
        """Exchange weights and averages for a while."""
        weights = [p.data for p in self.parameters]
        self.copy_to_weights()
        try:
            yield
        finally:
            for p, weight in zip(self.parameters, weights):
                p.data = weight

    def copy_to_weights(self) -> None:
        """Put the averages in the model."""
        for p, average in zip(self.parameters, self.shadow):
            p.data = average
