"""Kills trainings where it hurts most and sees that nothing is lost: `python tests/kill_runs.py`.

An undisturbed run comes first. Then runs are killed (SIGKILL), half of them at random moments, half
inside a save: amid writing, before the flush, before and after the rename. What is left must load,
and the resumed run must end with the very weights of the undisturbed one. So must one whose disk
was full, and those that were asked to stop (SIGTERM, Ctrl-C), which must save and leave within 5
seconds. With --stage interpolate or upscale the runs train that stage of the cascade.
"""

import argparse
import os
import random
import resource
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402

import runs  # noqa: E402
import train  # noqa: E402
from cascade import CASCADE_STAGES  # noqa: E402
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig  # noqa: E402
from runs import load_checkpoint  # noqa: E402
from test_train import TINIER  # noqa: E402

FLAGS = ["--vae-steps", "8", "--image-steps", "8", "--video-steps", "8", "--cache", "8",
         "--interpolate-steps", "24", "--upscale-steps", "24", "--batch-size", "2",
         "--vae-batch-size", "4", "--sample-every", "6", "--save-every", "2"]
PLACES = ("amid writing", "before the flush", "before the rename", "after the rename")


def start(out: Path, flags: list[str], prepare=lambda: None) -> int:
    """Start a process that trains in `out`, or goes on there; status 2 is an InputError."""
    child = os.fork()
    if child:
        return child
    status = 1
    with suppress(BaseException):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)
        PRESETS["tiny"] = MagicVideoConfig(**TINIER)
        prepare()
        begin = ["--resume"] if (out / "checkpoint.pt").exists() else flags
        try:
            runs.run_command("train.py", lambda: train.main(
                [*begin, "--out", str(out), "--device", "cpu"]))
            status = 0
        except SystemExit as ended:
            status = ended.code
    os._exit(status)


def wait(child: int) -> int:
    """Return the process's status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_inside_save(place: str, nth: int) -> None:
    """Make the nth file that `save_checkpoint` writes the last thing that a process does."""
    save, fsync, replace = torch.save, os.fsync, os.replace
    count = 0

    def die_at(here: str) -> None:
        if count == nth and place == here:
            os.kill(os.getpid(), signal.SIGKILL)

    def saved(contents, path) -> None:
        nonlocal count
        count += 1
        save(contents, path)
        if count == nth and place == "amid writing":
            os.truncate(path, os.path.getsize(path) // 2)
        die_at("amid writing")
        die_at("before the flush")

    def flushed(number) -> None:
        fsync(number)
        die_at("before the rename")

    def renamed(*names) -> None:
        replace(*names)
        die_at("after the rename")

    runs.torch.save, runs.os.fsync, runs.os.replace = saved, flushed, renamed


def fill_disk(out: Path) -> None:
    """Let no file grow as large as a checkpoint, as with a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (out / "checkpoint.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Load the weights of a model, those of its cascade too."""
    model = MagicVideo.load(out / "model.pt")
    return model.state_dict() | {f"{stage} {name}": weight for stage, saved in model.cascade.items()
                                 for name, weight in saved.items()}


def ends_like(out: Path, flags: list[str], reference: dict) -> bool:
    """Check that what is in `out` loads, and that the resumed run ends with these weights."""
    if (out / "checkpoint.pt").exists():
        load_checkpoint(out / "checkpoint.pt", "magicvideo-training")
    if (out / "model.pt").exists():
        MagicVideo.load(out / "model.pt")
    if wait(start(out, flags)) != 0:
        return False
    found = weights(out)
    return found.keys() == reference.keys() and all(
        torch.equal(found[name], reference[name]) for name in reference)


def main(arguments: list[str] | None = None) -> int:
    """Print what happened to every run; return how many were lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stage", choices=CASCADE_STAGES)
    flags = parser.parse_args(arguments)
    chance = random.Random(flags.seed)
    lost = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = FLAGS
        if flags.stage:
            assert wait(start(folder / "model", FLAGS)) == 0
            run = [*FLAGS, "--stage", flags.stage, "--init-from", str(folder / "model")]
        begun = time.time()
        assert wait(start(folder / "undisturbed", run)) == 0
        length = time.time() - begun
        reference = weights(folder / "undisturbed")
        for k in range(flags.kills):
            out = folder / f"killed-{k}"
            place = PLACES[k // 2 % len(PLACES)] if k % 2 else "at random"
            nth = chance.randrange(1, 26)  # 12 checkpoints, 12 models, and the model at the end
            if k % 2:
                child = start(out, run, lambda: kill_inside_save(place, nth))
            else:
                child = start(out, run)
                time.sleep(chance.uniform(0, length))
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            status = wait(child)
            good = ends_like(out, run, reference)
            lost += not good
            print(f"kill {k + 1}: {place} {nth}, status {status}: {'good' if good else 'LOST'}",
                  flush=True)

        out = folder / "full"
        child = start(out, run)
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        wait(child)
        status = wait(start(out, run, lambda: fill_disk(out)))
        good = status == 2 and not list(out.glob("*.part")) and ends_like(out, run, reference)
        lost += not good
        print(f"full disk: status {status}: {'good' if good else 'LOST'}")

        for stop in (signal.SIGTERM, signal.SIGINT):
            out = folder / stop.name
            child = start(out, run)
            time.sleep(chance.uniform(0.3, 0.7) * length)
            asked = time.time()
            os.kill(child, stop)
            status = wait(child)
            seconds = time.time() - asked
            good = status in (0, 2) and ends_like(out, run, reference)
            verdict = "LOST" if not good else "good" if seconds < 5 else "late"
            lost += verdict != "good"
            print(f"{stop.name}: left after {seconds:.2f} s: {verdict}")
    print(f"{flags.kills + 3 - lost} of {flags.kills + 3} runs ended as the undisturbed one did")
    return lost


if __name__ == "__main__":
    sys.exit(main() > 0)
