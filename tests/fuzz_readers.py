"""Feeds damaged files to everything that reads files: `python tests/fuzz_readers.py --inputs 20000`.

Each input is a good file with bytes changed, cut out, doubled, moved or set to extremes. A reader must return, or raise
an InputError of one line, within 10 seconds and 2 GB. It works in a process of its own, so that a crash or a hang is
seen, with a file that another one watches; what fails is kept in --out.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import batches  # noqa: E402
import data  # noqa: E402
from clip_text import Tokenizer  # noqa: E402
from kill_runs import SMALLER  # noqa: E402
from magicvideo import MagicVideo, read_checkpoint, write_checkpoint  # noqa: E402

SECONDS, BYTES = 10, 2 * 2**30


def good_files(folder: Path) -> dict[str, bytes]:
    """A small good file of every kind that is read."""
    clip = data.ShapesDataset("train", 6, 16)[0]["video"]
    for suffix in (".gif", ".webp", ".png", ".mp4"):
        data.write_clip(folder / f"clip{suffix}", clip, 8)
    model = MagicVideo(SMALLER, Tokenizer.train(data.shape_captions("train"), 560, 12))
    model.save(folder / "model.pt", torch.float16)
    write_checkpoint(folder / "checkpoint.pt", {"format": "magicvideo-training", "step": 3, "average": [clip[0]]})
    write_checkpoint(folder / "latents.pt", {"format": "magicvideo-latents", "key": "x", "kept": {"mean": clip}})
    texts = {
        "metadata.jsonl": '{"file_name": "clip.gif", "text": "a red circle"}\n{"file_name": "b", "text": "blue"}\n',
        "metadata.csv": 'file_name,text\nclip.gif,"a red, round circle"\nb,blue\n',
        "clip.txt": "a red circle, moving léft\n",
        "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in model.tokenizer.merges[:40]) + "\n",
    }
    return {**{path.name: path.read_bytes() for path in folder.iterdir()},
            **{name: text.encode() for name, text in texts.items()}}


def read(folder: Path, name: str) -> None:
    """What the programs do with a file of that name."""
    path = folder / name
    if name.startswith("clip.") and name != "clip.txt":
        for seconds in (0, 30):  # headers alone, and to the end
            data.SCAN_SECONDS = seconds
            data.ClipFolder(folder, frames=2, size=16)[0]
    elif name in ("metadata.jsonl", "metadata.csv", "clip.txt"):
        data.ClipFolder(folder, frames=2, size=16).captions
    elif name == "model.pt":
        MagicVideo.load(path)
    elif name == "checkpoint.pt":
        read_checkpoint(path, "magicvideo-training")
    elif name == "latents.pt":
        batches.Latents.found(batches.Latents.__new__(batches.Latents), path, "x")
    elif name == "merges.txt":
        Tokenizer.from_clip(path)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """One to four changes of one file."""
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at, length = chance.randrange(len(content) + 1), chance.choice((1, 1, 2, 4, 16, 64))
        kind = chance.randrange(8)
        if kind == 0:
            content[at : at + length] = chance.randbytes(length)
        elif kind == 1:
            content[at : at + length] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF))]) * length
        elif kind == 2 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 3:
            del content[at : at + length]
        elif kind == 4:
            content[at:at] = content[at : at + length]
        elif kind == 5:
            other = chance.randrange(len(content) + 1)
            content[at : at + length] = content[other : other + length]
        elif kind == 6:
            del content[at:]
        else:
            content[at:at] = chance.randbytes(length)
    return bytes(content)


def one(folder: Path, name: str) -> str:
    """What a reader did with the file: "read", "refused", or what went wrong."""
    try:
        read(folder, name)
    except data.InputError as error:
        return "refused" if "\n" not in str(error) and len(str(error)) < 1000 else f"not one line: {error!r}"
    except ValueError as error:  # the tokenizer, whose callers make an InputError of it
        if name == "merges.txt" and "\n" not in str(error):
            return "refused"
        return traceback.format_exc()
    except MemoryError:
        return f"more than {BYTES / 2**30:.0f} GB"
    except BaseException:
        return traceback.format_exc()
    return "read"


def place(folder: Path, files: dict[str, bytes], name: str, content: bytes) -> None:
    """Nothing but a file of that name and content in the folder, beside good clips that captions can name."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "b").mkdir(parents=True)
    for k in (1, 2):
        data.Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "b" / f"{k}.png")
    if name in ("metadata.jsonl", "metadata.csv", "clip.txt"):
        (folder / "clip.gif").write_bytes(files["clip.gif"])
    (folder / name).write_bytes(content)


def worker(folder: Path, files: dict[str, bytes], numbers: range, seed: int, report: Path) -> None:
    """Tries inputs, one after the other, and writes before each which it is, and after it what came of it."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + BYTES, now + BYTES))
    names = sorted(files)
    with open(report, "a", buffering=1) as lines:
        for number in numbers:
            chance = random.Random(f"{seed} {number}")
            name = names[number % len(names)]
            place(folder, files, name, damaged(files[name], chance))
            lines.write(json.dumps([number, name, "begun"]) + "\n")
            lines.write(json.dumps([number, name, one(folder, name)]) + "\n")


def main(arguments: list[str] | None = None) -> int:
    """Prints how many inputs of each kind were read, refused, or went wrong; returns the last number."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/fuzz", help="folder for inputs that went wrong")
    flags = parser.parse_args(arguments)
    found, wrong, next_input = Counter(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "good").mkdir()
        files = good_files(folder / "good")
        for name in files:
            place(folder / "clips", files, name, files[name])
            assert one(folder / "clips", name) == "read", f"{name} is good"
        report = folder / "report"
        while next_input < flags.inputs:
            report.write_text("")
            child = os.fork()
            if not child:
                devnull = os.open(os.devnull, os.O_WRONLY)
                os.dup2(devnull, 2)  # tqdm, and what decoders print
                try:
                    worker(folder / "clips", files, range(next_input, flags.inputs), flags.seed, report)
                finally:
                    os._exit(0)
            size, since, killed = 0, time.monotonic(), False
            while os.waitpid(child, os.WNOHANG)[0] == 0:
                time.sleep(0.05)
                if (grown := report.stat().st_size) > size:
                    size, since = grown, time.monotonic()
                elif time.monotonic() - since > SECONDS:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    killed = True
                    break
            lines = [json.loads(line) for line in report.read_text().splitlines()]
            for number, name, outcome in lines:
                if outcome != "begun":
                    found[name, outcome if outcome in ("read", "refused") else "WRONG"] += 1
                    if outcome not in ("read", "refused"):
                        wrong.append((number, name, outcome))
            if lines and lines[-1][2] == "begun":  # it hung or died here
                number, name, _ = lines[-1]
                found[name, "WRONG"] += 1
                wrong.append((number, name, f"took more than {SECONDS} s" if killed else "the process died"))
            next_input = lines[-1][0] + 1 if lines else flags.inputs
        for number, name, outcome in wrong:
            kept = Path(flags.out) / f"{number}-{name}"
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(damaged(files[name], random.Random(f"{flags.seed} {number}")))
            print(f"{kept}: {outcome}")
        for name in sorted({name for name, _ in found}):
            print(f"{name:16}" + ", ".join(f"{found[name, what]} {what}" for what in ("read", "refused", "WRONG")))
    print(f"{sum(found.values())} inputs, {len(wrong)} went wrong")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main() > 0)
