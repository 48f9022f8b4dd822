"""Kills trainings where it hurts most and sees that nothing is lost: `python tests/kill_runs.py --kills 40`.

An undisturbed run comes first. Then runs are killed (SIGKILL: no code of theirs runs any more), half of them at random
moments, half inside a save: amid writing, before the flush, before the rename, between the two files. What is left must
load, and the resumed run must end with the very weights of the undisturbed one. So must one whose disk was full, and
those that were asked to stop (SIGTERM, Ctrl-C), which must save and leave within 5 seconds.
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch  # noqa: E402

import magicvideo  # noqa: E402
import train  # noqa: E402
from clip_text import CLIPTextConfig  # noqa: E402
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig, read_checkpoint  # noqa: E402
from unet3d import UNetConfig  # noqa: E402
from vae import VAEConfig  # noqa: E402

FLAGS = ["--vae-steps", "8", "--image-steps", "8", "--video-steps", "8", "--cache", "8", "--batch-size", "2",
         "--vae-batch-size", "4", "--device", "cpu", "--sample-every", "6", "--save-every", "2"]
SMALLER = MagicVideoConfig(
    size=32, text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
    vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
    unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=32, frames=4))
PLACES = ("amid writing", "before the flush", "before the rename", "after the rename")


def started(out: Path, prepare=lambda: None) -> int:
    """A process that trains in `out`, or goes on there -> its number; status 2 is an error of a user's."""
    child = os.fork()
    if child:
        return child
    status = 1
    with suppress(BaseException):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        torch.set_num_threads(1)
        PRESETS["tiny"] = SMALLER
        prepare()
        try:
            resume = (out / "checkpoint.pt").exists()
            train.main(["--resume", "--out", str(out), "--device", "cpu"] if resume else [*FLAGS, "--out", str(out)])
            status = 0
        except train.InputError:
            status = 2
    os._exit(status)


def ended(child: int) -> int:
    """Waits -> the process's status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_inside_save(place: str, nth: int):
    """Makes the nth file that `write_checkpoint` writes the last thing that a process does."""
    writes, save, fsync, replace = iter(range(1, 10_000)), torch.save, os.fsync, os.replace
    at = {"now": 0}

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saved(contents, path) -> None:
        at["now"] = next(writes)
        save(contents, path)
        if at["now"] == nth and place == "amid writing":
            os.truncate(path, os.path.getsize(path) // 2)
            die()
        if at["now"] == nth and place == "before the flush":
            die()

    def flushed(number) -> None:
        fsync(number)
        if at["now"] == nth and place == "before the rename":
            die()

    def renamed(*names) -> None:
        replace(*names)
        if at["now"] == nth and place == "after the rename":
            die()

    magicvideo.torch.save, magicvideo.os.fsync, magicvideo.os.replace = saved, flushed, renamed


def fill_disk(out: Path) -> None:
    """From here on no file can grow as large as a checkpoint, as with a quota."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = (out / "checkpoint.pt").stat().st_size // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def whole(out: Path) -> bool:
    """Whether all that is in `out` loads, where there is anything."""
    if (out / "checkpoint.pt").exists():
        read_checkpoint(out / "checkpoint.pt", "magicvideo-training")
    if (out / "model.pt").exists():
        MagicVideo.load(out / "model.pt")
    return True


def same(out: Path, reference: dict) -> bool:
    """Whether `out` holds a model with these very weights."""
    found = MagicVideo.load(out / "model.pt").state_dict()
    return found.keys() == reference.keys() and all(torch.equal(found[name], reference[name]) for name in found)


def main(arguments: list[str] | None = None) -> int:
    """Prints what happened to every run; returns how many were lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    chance, lost = random.Random(flags.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder, begun = Path(folder), time.time()
        assert ended(started(folder / "undisturbed")) == 0
        length, reference = time.time() - begun, MagicVideo.load(folder / "undisturbed" / "model.pt").state_dict()
        for k in range(flags.kills):
            out, place = folder / f"killed-{k}", PLACES[k // 2 % len(PLACES)] if k % 2 else "at random"
            if k % 2:
                nth = chance.randrange(1, 29)  # 12 checkpoints, 12 models, latents, and the model at the end
                child = started(out, lambda: kill_inside_save(place, nth))
            else:
                child, nth = started(out), round(chance.uniform(0, length), 2)
                time.sleep(nth)
                with suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            status = ended(child)
            kept = out / "checkpoint.pt"
            step = "nothing" if not kept.exists() else "{stage} {step}".format(
                **read_checkpoint(kept, "magicvideo-training"))
            good = whole(out) and ended(started(out)) == 0 and same(out, reference)
            lost += not good
            verdict = "good" if good else "LOST"
            print(f"kill {k + 1}: {place} {nth}, status {status}, kept {step}: {verdict}", flush=True)

        out = folder / "full"
        child = started(out)
        while not (out / "checkpoint.pt").exists():
            time.sleep(0.05)
        os.kill(child, signal.SIGTERM)
        ended(child)
        status = ended(started(out, lambda: fill_disk(out)))
        left = [path.name for path in out.iterdir() if path.name.endswith(".part")]
        good = status == 2 and not left and whole(out) and ended(started(out)) == 0 and same(out, reference)
        lost += not good
        print(f"full disk: status {status}: {'good' if good else 'LOST'}")

        for stop in (signal.SIGTERM, signal.SIGINT):
            out = folder / stop.name
            child = started(out)
            time.sleep(chance.uniform(0.3, 0.7) * length)
            asked = time.time()
            os.kill(child, stop)
            status, seconds = ended(child), time.time() - asked
            good = seconds < 5 and status in (0, 2) and whole(out) and ended(started(out)) == 0 and same(out, reference)
            lost += not good
            print(f"{stop.name}: left after {seconds:.2f} s with status {status}: {'good' if good else 'LOST'}")
    print(f"{flags.kills + 3 - lost} of {flags.kills + 3} runs ended as the undisturbed one did")
    return lost


if __name__ == "__main__":
    sys.exit(main() > 0)
