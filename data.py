"""The two data sets: embedded shapes, and folders of clips (`clip_files.py` reads and writes the files).

One function, `sample_frames`, cuts both data sets (paper §3.2, FPS): a random part of a video, frames uniformly in it,
and how many of them make a second. Videos are (f, 3, h, w), pixels in [-1, 1]. Read next: `vae.py`, where clips go.
"""

import csv
import io
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from clip_files import (ANIMATIONS, VIDEOS, InputError, check_clip_path, expand, grid, natural,  # noqa: F401
                        read_clip, read_pictures, scan, strip, to_uint8, write_clip, write_image)

# ---------------------------------------------------------------------------------------------------------------------
# Frames and FPS: how both data sets cut a video (paper §3.2)


def sample_frames(total: int, rate: float, frames: int, rng: np.random.Generator, fps: float | None = None):
    """A random part of a video and `frames` frames uniformly in it -> (their indices (frames,), v = their rate).

    A video of `total` frames, `rate` a second, is cut at every stride-th frame: v = rate / stride frames a second. The
    stride is uniform among those of 1 .. 6 that fit, or, given `fps`, the one nearest to rate / fps that fits; then the
    start is uniform. Raises InputError if total < frames. Source: paper §3.2, FPS (a random part, uniform frames, v);
    that the stride is an integer, and at most 6, is ours.
    """
    if total < frames:
        raise InputError(f"--frames {frames}: the video has {total}; use a longer video or --frames {total}")
    longest = (total - 1) // (frames - 1) if frames > 1 else 6
    stride = int(rng.integers(min(longest, 6)) + 1) if fps is None else min(max(round(rate / fps), 1), longest)
    start = rng.integers(total - (frames - 1) * stride)
    return start + stride * np.arange(frames), float(rate / stride)


class _Clips(torch.utils.data.Dataset):
    """What both data sets share: the settings and their checks, the epoch, the random numbers of an item."""

    def __init__(self, frames: int, size: int, seed: int, fps: float | None):
        for flag, value, least in (("--frames", frames, 1), ("--size", size, 8)):
            if value < least:
                raise InputError(f"{flag} {value}: choose {least} or more")
        if fps is not None and not fps > 0:
            raise InputError(f"--fps {fps}: choose a number above 0")
        self.frames, self.size, self.seed, self.fps, self.epoch = frames, size, seed, fps, 0

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int):
        """Draws every item anew, as torch's DistributedSampler has it: call it before iterating a loader."""
        self.epoch = epoch

    def identity(self) -> str:
        """All that the items depend on, for caches of what is made of them."""
        return f"{type(self).__name__} {self.frames} {self.size} {self.seed} {self.fps} {len(self)}"

    def _rng(self, *item: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**32, self.epoch, *item])


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data set: one object on a dark plain background

COLORS = {
    "red": (1, 0, 0), "orange": (1, 0.5, 0), "yellow": (1, 1, 0), "green": (0, 1, 0),
    "cyan": (0, 1, 1), "blue": (0, 0, 1), "magenta": (1, 0, 1), "white": (1, 1, 1),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
BACKGROUND = 0.06  # gray, in [0, 1] as COLORS are


def shape_captions(split: str) -> list[str]:
    """The captions "a {color} {shape} {motion}" of a split: 120 for "train", 24 for "test" (ours).

    Those of "test" are spread over every word: each (color, shape) pair once, each motion 4 times. They are never
    trained on: following them shows that words, not sentences, were learned. Raises InputError for another split.
    """
    if split not in ("train", "test"):
        raise InputError(f"split {split!r}: choose 'train' or 'test'")
    return [
        f"a {color} {shape} {motion}"
        for c, color in enumerate(COLORS)
        for s, shape in enumerate(SHAPES)
        for m, motion in enumerate(MOTIONS)
        if (m == (c + 2 * s) % 6) == (split == "test")
    ]


class ShapesDataset(_Clips):
    """Clips of one object that moves, grows or shrinks, drawn when asked for (ours).

    [i] -> {"video": (f, 3, h, w) in [-1, 1], "caption": str, "fps": float}. Item i has caption i modulo their number
    and depends on (seed, split, i, epoch) alone. The source video has 24 frames a second and lasts as long as the
    object's way: enough for 8 a second, and for 4 if it is slow. At 8 a second, 8 frames show an object travel at
    least 0.3 of the frame, or double or halve its area; for more `frames`, what would leave the frame is slowed.
    With `between` there are so many frames more between two of these: the same clips at a higher rate.
    Raises IndexError past the end, InputError for an impossible setting.
    """

    def __init__(self, split="train", frames=8, size=64, seed=0, fps: float | None = None, length=4800,
                 between=0):
        super().__init__(frames, size, seed, fps)
        self.captions, self.split, self.length = shape_captions(split), split, length
        self.rate = 24 * (between + 1)  # frames a second

    def identity(self) -> str:
        return f"{super().identity()} {self.split} {self.rate}"

    def __getitem__(self, i: int) -> dict:
        i = range(self.length)[i]
        caption = self.captions[i % len(self.captions)]
        _, color, shape, motion = caption.split(" ", 3)
        rng = self._rng(i, self.split == "test")

        # The way is as long as the frame allows: in frame widths, or, of a resizing object, in powers of e of its side.
        # The speed, in the same units a second, is constant: fast enough to be seen, slow enough for all frames to fit.
        edge, side, small, large = 0.025, rng.uniform(0.20, 0.36), rng.uniform(0.15, 0.20), rng.uniform(0.42, 0.55)
        resizing = motion in ("growing", "shrinking")
        way, slowest = (math.log(large / small), 0.42) if resizing else (1 - 2 * edge - side, 0.36)
        fastest = way / (max((self.frames - 1) * 24 / self.rate, 7) / 8)
        speed = rng.uniform(min(slowest, fastest), fastest)
        total = int(way / speed * self.rate + 1e-6) + 1
        indices, fps = sample_frames(total, self.rate, self.frames, rng, self.fps)

        # Left, up and shrinking are right, down and growing played backwards.
        backwards = motion in ("moving left", "moving up", "shrinking")
        done = (total - 1 - indices if backwards else indices) * speed / self.rate             # (f,)
        room = edge + (large if resizing else side) / 2
        x, y = rng.uniform(room, 1 - room, size=2)
        x = room + done if motion in ("moving left", "moving right") else x + 0 * done         # (f,)
        y = room + done if motion in ("moving up", "moving down") else y + 0 * done            # (f,)
        sides = small * np.exp(done) if resizing else side + 0 * done                          # (f,)
        covered = _coverage(shape, self.size, *(np.float32(v * self.size) for v in (x, y, sides)))
        color = np.float32(COLORS[color])[:, None, None] - np.float32(BACKGROUND)              # (3, 1, 1)
        video = (2 * BACKGROUND - 1) + 2 * color * covered[:, None]                            # (f, 3, h, w)
        return {"video": torch.from_numpy(video), "caption": caption, "fps": fps}


def _coverage(shape: str, size: int, x: np.ndarray, y: np.ndarray, side: np.ndarray) -> np.ndarray:
    """How much of each pixel the object covers (f, h, w): its centres x, y and sides (f,) are in pixels."""
    pixels = np.arange(size, dtype=np.float32) + 0.5
    x = pixels - x[:, None, None]                                                              # (f, 1, w)
    y = pixels[:, None] - y[:, None, None]                                                     # (f, h, 1)
    half = side[:, None, None] / 2

    def inside(distance):  # to an edge, in pixels, negative within: anti-aliased over one pixel
        return np.clip(0.5 - distance, 0, 1)

    if shape == "circle":
        return inside(np.sqrt(x * x + y * y) - half)
    if shape == "square":
        return inside(np.abs(x) - half) * inside(np.abs(y) - half)
    left, right = (inside((slope * x - y - half) / math.sqrt(5)) for slope in (-2, 2))
    return left * right * inside(y - half)


# ---------------------------------------------------------------------------------------------------------------------
# Folders of clips, and reading one

SCAN_SECONDS = 10  # how long a start may take to decode clips, where it can do with headers


class ClipFolder(_Clips):
    """Clips of a folder (ours): [i] -> {"video": (f, 3, size, size) in [-1, 1], "caption": str, "fps": float}.

    A clip is NAME.gif, .webp, .png (animated), .mp4, .mov, .mkv, .webm, .avi, or a folder NAME of images, its frames in
    natural order (2 before 10) at 8 a second. Captions come from metadata.jsonl or metadata.csv with file_name and
    text; else from NAME.txt; else they are "", which trains the unconditional branch. Bytes that are not UTF-8 become
    U+FFFD. The centre square is resized. Names that start with "." are skipped. Item i depends on (seed, i, epoch).

    The constructor decodes clips to their ends, for SCAN_SECONDS at most, and reads headers alone of videos and folders
    of images after that (`summary` says of how many). It raises InputError for a clip that is unreadable, cut off or
    shorter than `frames`, for a caption of a missing clip, and for a folder without clips; so does [i] for what headers
    did not tell. IndexError past the end.
    """

    def __init__(self, path: str | Path, frames: int, size: int, seed: int = 0, fps: float | None = None):
        super().__init__(frames, size, seed, fps)
        self.path, self.clips = Path(path), find_clips(path)
        self.captions, self.length = _read_captions(self.path, self.clips), len(self.clips)
        # Frame j of clip k is the stored picture sources[k][j]; rates[k] frames make a second. Of videos times[k][i] is
        # when picture i is shown.
        self.sources, self.rates, self.times, self.sizes, self.decoded = [], [], [], set(), 0
        started = time.monotonic()
        for clip in tqdm(self.clips, desc=f"reading {path}", unit="clip", leave=False, delay=2):
            whole = time.monotonic() - started < SCAN_SECONDS
            seconds, times, sizes = scan(clip, whole)
            source, rate = expand(seconds, clip)
            if len(source) < frames:
                raise InputError(f"{clip}: has {len(source)} of {frames} frames; remove it or lower --frames")
            self.sources.append(source)
            self.rates.append(rate)
            self.times.append(times)
            self.sizes |= sizes
            self.decoded += whole

    def summary(self) -> str:
        """What was found, on one line: clips, captions, sizes, frames, rates."""
        found = f"{self.path}: {len(self)} clips, {sum(map(bool, self.captions))} captions"
        sizes = [f"{w}x{h}" for w, h in sorted(sorted(self.sizes), key=math.prod)]
        lengths, rates = sorted(map(len, self.sources)), [f"{rate:.4g}" for rate in sorted(self.rates)]
        for unit, values in (("pixels", sizes), ("frames", lengths), ("frames a second", rates)):
            found += ", " + " to ".join(dict.fromkeys(str(end) for end in (values[0], values[-1]))) + f" {unit}"
        if self.decoded < len(self):
            found += f"; {len(self) - self.decoded} not decoded yet (--check-data decodes all)"
        return found

    def identity(self) -> str:
        """All that the items depend on: settings, and name, bytes and last change of every file."""
        files = (file for clip in self.clips for file in (sorted(clip.iterdir()) if clip.is_dir() else [clip]))
        found = [(str(file), (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
        return f"{super().identity()} {self.captions} {found}"

    def __getitem__(self, i: int) -> dict:
        i = range(self.length)[i]
        source = self.sources[i]
        indices, fps = sample_frames(len(source), self.rates[i], self.frames, self._rng(i), self.fps)
        wanted = [int(source[j]) for j in indices]
        pictures = read_pictures(self.clips[i], wanted, self.times[i])
        video = np.stack([_square(picture, self.size) for picture in pictures])                # (f, h, w, 3)
        video = torch.from_numpy(video).permute(0, 3, 1, 2) / 127.5 - 1                        # (f, 3, h, w)
        return {"video": video.contiguous(), "caption": self.captions[i], "fps": fps}


def find_clips(path: str | Path) -> list[Path]:
    """The clips of a folder in natural order; raises InputError where there is none."""
    path = Path(path)
    if not path.is_dir():
        raise InputError(f"{path}: {'not a folder' if path.exists() else 'no such folder'}; name one of clips")
    entries = sorted((e for e in path.iterdir() if not e.name.startswith(".")), key=natural)
    clips = [e for e in entries if e.is_dir() or e.suffix.lower() in ANIMATIONS + VIDEOS]
    if not clips:
        raise InputError(f"{path}: no clips in it; put {', '.join(ANIMATIONS + VIDEOS)} or folders of images there")
    return clips


def check_clips(path: str | Path, frames: int) -> list[str]:
    """Decodes every clip of a folder to its end -> one line for each that cannot be used, and for its captions."""
    bad, clips = [], find_clips(path)
    for clip in tqdm(clips, desc=f"reading {path}", unit="clip", dynamic_ncols=True):
        try:
            found = len(expand(scan(clip, whole=True)[0], clip)[0])
            if found < frames:
                raise InputError(f"{clip}: has {found} of {frames} frames; remove it or lower --frames")
        except InputError as error:
            bad.append(str(error))
    try:
        _read_captions(Path(path), clips)
    except InputError as error:
        bad.append(str(error))
    return bad


def _square(picture: np.ndarray, size: int) -> np.ndarray:
    """(h, w, 3) -> its centre square, resized with anti-aliasing to (size, size, 3)."""
    h, w, _ = picture.shape
    side, top, left = min(h, w), max(h - w, 0) // 2, max(w - h, 0) // 2
    square = Image.fromarray(picture[top : top + side, left : left + side])
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _read_captions(folder: Path, clips: list[Path]) -> list[str]:
    """The caption of every clip, runs of white space made one blank."""
    captions = {}
    for clip in clips:
        beside = folder / f"{clip.name if clip.is_dir() else clip.stem}.txt"
        captions[clip.name] = beside.read_text("utf-8-sig", errors="replace") if beside.is_file() else ""
    for table in (folder / "metadata.jsonl", folder / "metadata.csv"):
        for line, row in _rows(table) if table.is_file() else ():
            name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
            if not isinstance(name, str) or not isinstance(text, str) or None in row:
                raise InputError(f"{table}: line {line} must have file_name and text (in quotes where it has commas)")
            if os.path.normpath(name) not in captions:
                raise InputError(f"{table}: line {line}: {name!r} is no clip in this folder; add it or remove the line")
            captions[os.path.normpath(name)] = text
    return [" ".join(text.split()) for text in captions.values()]


def _rows(table: Path):
    """The pairs (line, row) of a .jsonl or .csv file."""
    text, line = table.read_text("utf-8-sig", errors="replace"), 1
    try:
        if table.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)
            return
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield line, json.loads(content)
    except (json.JSONDecodeError, csv.Error) as error:
        raise InputError(f"{table}: line {line} cannot be read ({error}); correct it") from error
