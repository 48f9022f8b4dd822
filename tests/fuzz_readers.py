"""Feeds damaged files to all that reads files: `python tests/fuzz_readers.py --inputs 20000`.

Each input is a good file with bytes changed, cut out, doubled or set to extremes. A reader must
return, or raise an InputError of one line, within 10 seconds and 2 GB. Where it hangs or crashes,
the bar says at which input, and a traceback where. Input n of a seed is always the same.
"""

import argparse
import faulthandler
import io
import random
import resource
import shutil
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from PIL import Image  # noqa: E402
from tqdm import tqdm  # noqa: E402

import data  # noqa: E402
from clip_text import Tokenizer  # noqa: E402
from conftest import small_model  # noqa: E402
from magicvideo import MagicVideo  # noqa: E402
from runs import InputError, load_checkpoint, save_checkpoint  # noqa: E402
from clip_files import write_clip  # noqa: E402
from stable_diffusion import read_json, read_weights  # noqa: E402

SECONDS = 10
BYTES = 2 * 2**30
CAPTIONS = ("metadata.jsonl", "metadata.csv", "captions.json", "clip.txt")
READERS = {  # all other files are clips and captions, which are read with their folder
    "model.pt": MagicVideo.load,
    "checkpoint.pt": lambda path: load_checkpoint(path, "magicvideo-training"),
    "pytorch_model.bin": lambda path: read_weights(path.parent),
    "config.json": read_json,
    "merges.txt": Tokenizer.from_clip,
}


def good_files(folder: Path) -> dict[str, bytes]:
    """Make a small good file of every kind that is read."""
    clip = data.ShapesDataset("train", 6, 16)[0]["video"]
    for suffix in (".gif", ".webp", ".png", ".mp4"):
        write_clip(folder / f"clip{suffix}", clip, 8)
    model = small_model()
    model.save(folder / "model.pt")
    save_checkpoint(folder / "checkpoint.pt", {"format": "magicvideo-training", "ema": [clip[0]]})
    save_checkpoint(folder / "pytorch_model.bin", {"weight": clip[0]})
    merges = [" ".join(pair) for pair in model.tokenizer.merges[:40]]
    texts = {
        "metadata.jsonl": '{"file_name": "clip.gif", "text": "a"}\n{"file_name": "b", "text": ""}',
        "metadata.csv": 'file_name,text\nclip.gif,"a red, round circle"\nb,blue\n',
        "captions.json": '{"clip.gif": "a red circle", "b": ""}',
        "clip.txt": "a red circle, moving léft\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "config.json": '{"block_out_channels": [320, 640], "act_fn": "silu", "norm_eps": 1e-05}',
    }
    return {**{path.name: path.read_bytes() for path in folder.iterdir()},
            **{name: text.encode() for name, text in texts.items()}}


def damage(content: bytes, rng: random.Random) -> bytes:
    """Change a file in one to four places."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        end = at + rng.choice((1, 1, 2, 4, 16, 64))
        other = rng.randrange(len(content) + 1)
        content[at:end] = rng.choice([
            rng.randbytes(end - at),
            bytes([rng.choice((0, 1, 0x7F, 0x80, 0xFF))]) * (end - at),
            bytes(byte ^ 1 << rng.randrange(8) for byte in content[at : at + 1]),
            b"",
            2 * content[at:end],
            content[other : other + end - at],
        ])
        if rng.random() < 1 / 8:
            del content[at:]
    return bytes(content)


def try_file(folder: Path, files: dict[str, bytes], name: str, content: bytes) -> str:
    """Read a file -> "read", "refused", or what went wrong; beside it lie clips for captions."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "b").mkdir(parents=True)
    for k in (1, 2):
        Image.new("RGB", (16, 16)).save(folder / "b" / f"{k}.png")
    if name in CAPTIONS:
        (folder / "clip.gif").write_bytes(files["clip.gif"])
    (folder / name).write_bytes(content)
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
    try:
        if name in READERS:
            READERS[name](folder / name)
        else:
            assert data.ClipFolder(folder, frames=2, size=16)[0]
        return "read"
    except InputError as error:
        return "refused" if "\n" not in str(error) else f"not one line: {error!r}"
    except ValueError as error:  # the callers of Tokenizer.from_clip make an InputError of it
        is_line = name == "merges.txt" and "\n" not in str(error)
        return "refused" if is_line else traceback.format_exc()
    except BaseException:
        return traceback.format_exc()
    finally:
        faulthandler.cancel_dump_traceback_later()


def main(arguments: list[str] | None = None) -> int:
    """Print how many inputs of each kind were read, refused, or went wrong; return the last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    kinds = Counter()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        files = good_files(Path(folder))
        for name in files:
            assert try_file(Path(folder) / "clips", files, name, files[name]) == "read", name
        for number in tqdm(range(flags.inputs), file=sys.__stderr__, disable=None):
            name = sorted(files)[number % len(files)]
            content = damage(files[name], random.Random(f"{flags.seed} {number}"))
            result = try_file(Path(folder) / "clips", files, name, content)
            kinds[name, result if result in ("read", "refused") else "wrong"] += 1
            if result not in ("read", "refused"):
                print(f"input {number}, {name}: {result}", file=sys.stderr)
    resource.setrlimit(resource.RLIMIT_AS, limits)
    for (name, kind), count in sorted(kinds.items()):
        print(f"{name:18} {kind:8} {count}")
    wrong = sum(kinds[name, "wrong"] for name in files)
    print(f"{flags.inputs} inputs, {wrong} went wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main() > 0)
