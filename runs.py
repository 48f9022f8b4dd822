"""What surrounds the loop of `train.py`: the files of a run and its processes (all ours).

A run writes OUT/model.pt, checkpoint.pt, log.csv, loss.png (with matplotlib) and samples/. Its
ranks are the processes of torchrun, or those that `start_ranks` starts on a CPU with several cores.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


class InputError(ValueError):
    """A mistake of the user's: one line that names the file or flag and the remedy (ours)."""


# --------------------------------------------------------------------------------------------------
# Files


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
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file or folder here, and nothing is downloaded; give a "
                         f"model.pt of train.py, or a Stable Diffusion folder")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch has many for a damaged file
        raise InputError(f"{path}: not a model.pt of train.py, or cut off; train again") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != kind:
        raise InputError(f'{path}: not a "{kind}" file; sample.py reads model.pt, --resume '
                         f"checkpoint.pt")
    return checkpoint


def claim_folder(out: str | None, name: str, n: int = 1) -> tuple[Path, TextIO]:
    """Make a run's folder, OUT or a new runs/NAME[-N] -> it and its log.csv, open and locked.

    The lock ends with the file or the process; Windows and some networks have none. Raises
    InputError where another training has the folder, or it cannot be made.
    """
    folder = Path(out or f"runs/{name}{f'-{n}' if n > 1 else ''}")
    try:
        folder.mkdir(parents=True, exist_ok=bool(out))
        log = open(folder / "log.csv", "a")
        with suppress(ImportError):
            import fcntl
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(f"--out {out}: another training writes there; wait for its end, or choose "
                         f"another folder") from error
    except OSError as error:
        if isinstance(error, FileExistsError) and not out:
            return claim_folder(out, name, n + 1)
        if error.errno in (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP):  # a network without locks
            return folder, log
        raise InputError(f"--out {folder}: cannot be written ({error.strerror}); choose "
                         f"another") from error
    return folder, log


def plot_losses(rows: list[dict], picture: Path) -> None:
    """Draw the losses of log.csv, a column for each stage; nothing without matplotlib."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own is known in the notebook alone
    try:
        from matplotlib.figure import Figure
    except ImportError:
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


@contextmanager
def stop_signals():
    """Collect Ctrl-C and SIGTERM in a list: the step at hand is finished and saved first."""
    stop = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: stop.append(True)) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_command(name: str, main: Callable) -> None:
    """Run a command; a mistake of the user's ends it with one line and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a caption may not be in the console's encoding
        stream.reconfigure(errors="backslashreplace")
    torch.set_flush_denormal(True)  # many weights come near zero, which makes a CPU slow
    try:
        main()
    except (InputError, OSError, ModuleNotFoundError) as error:
        remedy = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {error}{remedy}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{name}: stopped, nothing written", file=sys.stderr)
        sys.exit(130)


def is_run(folder: Path) -> bool:
    """Tell whether a folder holds a run: its log.csv begins with the columns of ours."""
    try:
        with open(folder / "log.csv", "rb") as file:
            return file.readline().startswith(b"stage,step,loss")
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# Processes


def usable_cores() -> int:
    """Count the cores that this process may use, which can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def pick_device(name: str | None) -> torch.device:
    """Return the device of that name, or the best there is. InputError if it is not there."""
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if name and name.split(":")[0] not in available:
        raise InputError(f"--device {name}: not on this machine; use {' or '.join(available)}")
    return torch.device(name or available[0])


def start_ranks(count: int, arguments: list[str]) -> list[subprocess.Popen]:
    """Start this command again as ranks 1 .. count - 1 of torchrun; this process becomes rank 0.

    Matrices are so small that two processes keep two cores busier than two threads do.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, os.cpu_count() // count)
    torch.set_num_threads(threads)
    os.environ |= {"RANK": "0", "WORLD_SIZE": str(count), "OMP_NUM_THREADS": str(threads),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [subprocess.Popen([sys.executable, *arguments], env={**os.environ, "RANK": str(i)})
            for i in range(1, count)]


def join_ranks(device: torch.device) -> torch.device:
    """Wait for the other processes, if there are any; returns this one's device."""
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        store, number, count = next(rendezvous("env://"))
        # torchrun keeps one store for all its restarts: without a prefix ranks would connect to the
        # addresses of processes that are dead
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=number, world_size=count)
    return device
