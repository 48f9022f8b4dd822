"""The two data sets: embedded shapes, drawn when asked for, and folders of clips, decoded once.

One function, `sample_frames`, cuts both (paper §3.2, FPS): a random part of a video, frames
uniformly in it, and how many of them make a second. Videos are (f, 3, h, w), pixels in [-1, 1].
Read next: `train.py`, which trains on them.
"""

import copy
import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm


class InputError(ValueError):
    """A mistake of the user's: one line that names the file or flag and the remedy (ours)."""


# --------------------------------------------------------------------------------------------------
# Frames and FPS (paper §3.2)


def sample_frames(total: int, rate: float, frames: int, rng: np.random.Generator,
                  fps: float | None = None) -> tuple[np.ndarray, float]:
    """Cut a video at random -> the indices (frames,) of its frames, v = their frames per second.

    Of a video of `total` frames at `rate` a second every stride-th is taken, so v = rate / stride.
    The stride is uniform among those of 1 .. 6 that fit, or, given `fps`, the one nearest to rate /
    fps that fits; then the start is uniform. Raises InputError if total < frames. Source: paper
    §3.2, FPS (a random part, uniform frames, v); that the stride is whole, and at most 6 unless
    asked, is ours.
    """
    if total < frames:
        raise InputError(f"{total} frames of {frames}: use a longer video or fewer --frames")
    longest = (total - 1) // (frames - 1) if frames > 1 else 6
    if fps is None:
        stride = int(rng.integers(min(longest, 6))) + 1
    else:
        stride = min(max(round(rate / fps), 1), longest)
    start = rng.integers(total - (frames - 1) * stride)
    return start + stride * np.arange(frames), float(rate / stride)


class ClipDataset(torch.utils.data.Dataset):
    """What both data sets share: [i] -> {"video", "caption", "fps"}, random by (seed, i, epoch)."""

    def __init__(self, frames: int, size: int, seed: int, fps: float | None):
        self.frames = frames
        self.size = size
        self.seed = seed
        self.fps = fps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Draw every item anew, as torch's DistributedSampler has it."""
        self.epoch = epoch

    def rng(self, *item: int) -> np.random.Generator:
        """Make the generator of an item."""
        return np.random.default_rng([self.seed % 2**32, self.epoch, *item])


# --------------------------------------------------------------------------------------------------
# The embedded data set: one object on a dark plain background

COLORS = {
    "red": (1, 0, 0), "orange": (1, 0.5, 0), "yellow": (1, 1, 0), "green": (0, 1, 0),
    "cyan": (0, 1, 1), "blue": (0, 0, 1), "magenta": (1, 0, 1), "white": (1, 1, 1),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("moving left", "moving right", "moving up", "moving down", "growing", "shrinking")
BACKGROUND = 0.06  # gray, in [0, 1] as COLORS are


def shape_captions(split: str) -> list[str]:
    """List the captions "a {color} {shape} {motion}": 120 of split "train", 24 of "test" (ours).

    Those of "test" are never trained on and spread over every word: each (color, shape) pair once,
    each motion 4 times. Raises ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split "{split}": use "train" or "test"')
    captions = []
    for c, color in enumerate(COLORS):
        for s, shape in enumerate(SHAPES):
            for m, motion in enumerate(MOTIONS):
                held_out = m == (c + 2 * s) % 6
                if held_out == (split == "test"):
                    captions.append(f"a {color} {shape} {motion}")
    return captions


class ShapesDataset(ClipDataset):
    """Clips of one object that moves, grows or shrinks, drawn when asked for (ours).

    [i] -> {"video": (f, 3, h, w) in [-1, 1], "caption": str, "fps": float}; item i has caption i
    modulo their number. The source video has 24 frames a second and lasts while the object is
    inside. At 8 a second 8 frames show it travel at least 0.3 of the frame, or double or halve its
    area; for more `frames` it is slower. `rate_multiplier` 4 is the same clips at 96 frames a
    second.
    """

    def __init__(self, split: str = "train", frames: int = 8, size: int = 64, seed: int = 0,
                 fps: float | None = None, length: int = 4800, rate_multiplier: int = 1):
        super().__init__(frames, size, seed, fps)
        self.captions = shape_captions(split)
        self.split = split
        self.length = length
        self.rate = 24 * rate_multiplier

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        i = range(self.length)[i]
        caption = self.captions[i % len(self.captions)]
        _, color, shape, motion = caption.split(" ", 3)
        rng = self.rng(i, self.split == "test")

        # The distance is as long as the frame allows: in frame widths, or, of a resizing object, in
        # powers of e of its side. The speed, in the same units a second, is constant: fast enough
        # to be seen, slow enough for all frames to fit.
        margin = 0.025
        side = rng.uniform(0.20, 0.36)
        small = rng.uniform(0.15, 0.20)
        large = rng.uniform(0.42, 0.55)
        resizing = motion in ("growing", "shrinking")
        distance, slowest = 1 - 2 * margin - side, 0.36
        if resizing:
            distance, slowest = math.log(large / small), 0.42
        fastest = distance / (max((self.frames - 1) * 24 / self.rate, 7) / 8)
        speed = rng.uniform(min(slowest, fastest), fastest)
        total = int(distance / speed * self.rate + 1e-6) + 1
        indices, fps = sample_frames(total, self.rate, self.frames, rng, self.fps)

        # left, up and shrinking are right, down and growing played backwards
        if motion in ("moving left", "moving up", "shrinking"):
            indices = total - 1 - indices
        done = indices * speed / self.rate  # (f,), of the distance
        margin = margin + (large if resizing else side) / 2
        x, y = rng.uniform(margin, 1 - margin, size=2)
        x = margin + done if motion in ("moving left", "moving right") else x + 0 * done
        y = margin + done if motion in ("moving up", "moving down") else y + 0 * done
        sides = small * np.exp(done) if resizing else side + 0 * done
        x, y, sides = (np.float32(value * self.size) for value in (x, y, sides))  # in pixels
        coverage = draw_shape(shape, self.size, x, y, sides)
        contrast = np.float32(COLORS[color])[:, None, None] - np.float32(BACKGROUND)  # (3, 1, 1)
        video = (2 * BACKGROUND - 1) + 2 * contrast * coverage[:, None]  # (f, 3, h, w)
        return {"video": torch.from_numpy(video), "caption": caption, "fps": fps}


def draw_shape(shape: str, size: int, x: np.ndarray, y: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Return how much of each pixel an object covers, (f, h, w); x, y, side (f,) in pixels."""
    pixels = np.arange(size, dtype=np.float32) + 0.5
    x = pixels - x[:, None, None]  # (f, 1, w)
    y = pixels[:, None] - y[:, None, None]  # (f, h, 1)
    half = side[:, None, None] / 2

    def inside(distance: np.ndarray) -> np.ndarray:
        """Anti-alias over one pixel: the distance to an edge, negative inside."""
        return np.clip(0.5 - distance, 0, 1)

    if shape == "circle":
        return inside(np.sqrt(x * x + y * y) - half)
    if shape == "square":
        return inside(np.abs(x) - half) * inside(np.abs(y) - half)
    left, right = (inside((slope * x - y - half) / math.sqrt(5)) for slope in (-2, 2))
    return left * right * inside(y - half)


# --------------------------------------------------------------------------------------------------
# Folders of clips

ANIMATIONS = (".gif", ".webp", ".png")  # read by Pillow
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")  # read by av
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the frames of a clip that is a folder
FOLDER_FPS = 8  # of such a clip, which says none: the default of sampling
MAX_PIXELS = 2**25  # of a frame, one of 8K video; a file of a few bytes can claim any number
MAX_FRAMES = 1000  # of a clip: what comes later in a longer one is not used


class ClipFolder(ClipDataset):
    """Clips of a folder (ours): [i] -> {"video": (f, 3, size, size), "caption": str, "fps": float}.

    A clip is an animation, a video, or a folder of images in natural order (2 before 10) at 8 a
    second; its centre square is resized. Captions come from metadata.jsonl or metadata.csv with
    file_name and text; else from NAME.txt; else they are "", which trains the unconditional branch.

    Every clip is decoded once, to `store`, a folder that later runs on the same files reuse, or to
    a temporary file. Raises InputError that names every clip that is unreadable, cut off or shorter
    than `frames`, a caption of a missing clip, and a folder without clips.
    """

    def __init__(self, path: str | Path, frames: int, size: int, seed: int = 0,
                 fps: float | None = None, store: str | Path | None = None):
        super().__init__(frames, size, seed, fps)
        self.path = Path(path)
        clips = find_clips(self.path)
        self.captions = read_captions(self.path, clips)
        self.pixels, self.clips = decode_once(self.path, clips, size, store)
        short = [f"{clip.name} has {n}" for clip, (_, n, _) in zip(clips, self.clips) if n < frames]
        if short:
            raise InputError(f"{path}: clips with less than {frames} frames: {', '.join(short)}; "
                             f"remove them or lower --frames")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        start, total, rate = self.clips[i]
        indices, fps = sample_frames(total, rate, self.frames, self.rng(i), self.fps)
        video = torch.from_numpy(self.pixels[start + indices])  # (f, h, w, 3)
        video = video.permute(0, 3, 1, 2) / 127.5 - 1  # (f, 3, h, w)
        return {"video": video.contiguous(), "caption": self.captions[i], "fps": fps}

    def subset(self, items: list[int]) -> "ClipFolder":
        """Make the data set of some of the clips."""
        chosen = copy.copy(self)
        chosen.clips = [self.clips[i] for i in items]
        chosen.captions = [self.captions[i] for i in items]
        return chosen


def open_data(name: str, frames: int, size: int, seed: int = 0, rate_multiplier: int = 1,
              store: str | Path | None = None) -> tuple[ClipDataset, ClipDataset]:
    """Open "shapes" or a folder of clips -> clips to train on, and clips held out.

    Of shapes those of split "test" are held out; of a folder every tenth clip, or at least one.
    """
    if name == "shapes":
        return (ShapesDataset("train", frames, size, seed, rate_multiplier=rate_multiplier),
                ShapesDataset("test", frames, size, seed, rate_multiplier=rate_multiplier))
    clips = ClipFolder(name, frames, size, seed, store=store)
    held_out = range(len(clips))[9::10] or range(len(clips))[-1:]
    trained = [i for i in range(len(clips)) if i not in held_out]
    return clips.subset(trained or held_out), clips.subset(held_out)


def find_clips(path: Path) -> list[Path]:
    """List the clips of a folder in natural order; raises InputError where there is none."""
    if not path.is_dir():
        raise InputError(f"--data {path}: no such folder; name one of clips")
    entries = sorted((e for e in path.iterdir() if not e.name.startswith(".")), key=natural_key)
    clips = [e for e in entries if e.is_dir() or e.suffix.lower() in ANIMATIONS + VIDEOS]
    if not clips:
        kinds = ", ".join(ANIMATIONS + VIDEOS)
        raise InputError(f"--data {path}: no clips in it; put {kinds} or folders of images there")
    return clips


def natural_key(path: Path) -> list:
    """Sort names with their numbers as numbers: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


def read_captions(folder: Path, clips: list[Path]) -> list[str]:
    """Read the caption of every clip, white space made single blanks; "" where there is none."""
    captions = {}
    for clip in clips:
        text = folder / f"{clip.name if clip.is_dir() else clip.stem}.txt"
        captions[clip.name] = text.read_text("utf-8-sig", "replace") if text.is_file() else ""
    for table in (folder / "metadata.jsonl", folder / "metadata.csv"):
        for line, row in read_table(table) if table.is_file() else ():
            row = row if isinstance(row, dict) else {}
            name = row.get("file_name")
            text = row.get("text")
            if not isinstance(name, str) or not isinstance(text, str) or None in row:
                raise InputError(f"{table}: line {line} must have file_name and text (in quotes "
                                 f"where it has commas)")
            name = os.path.normpath(name)
            if name not in captions:
                raise InputError(f"{table}: line {line}: {name!r} is no clip in this folder; add "
                                 f"it or remove the line")
            captions[name] = text
    return [" ".join(text.split()) for text in captions.values()]


def read_table(table: Path) -> Iterator[tuple[int, dict]]:
    """Read the rows of a .jsonl or .csv file with their line numbers."""
    text = table.read_text("utf-8-sig", "replace")
    line = 1
    try:
        if table.suffix == ".csv":
            yield from enumerate(csv.DictReader(io.StringIO(text, newline="")), 2)
            return
        for line, content in enumerate(text.split("\n"), 1):
            if content.strip():
                yield line, json.loads(content)
    except (ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{table}: line {line} cannot be read ({error}); correct it") from error


def decode_once(folder: Path, clips: list[Path], size: int,
                store: str | Path | None) -> tuple[np.ndarray, list[tuple[int, int, float]]]:
    """Decode all clips to memory-mapped pixels, uint8 (n, size, size, 3), or find them in `store`.

    Returns them with (first frame, number of frames, frames a second) of each clip. A store is
    keyed by name, size and time of change of every file, and is written whole or not at all.
    """
    if store is None:  # the mapping outlives the name of its file
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            return decode_once(folder, clips, size, temporary)
    files = []
    for clip in clips:
        files += sorted(clip.iterdir()) if clip.is_dir() else [clip]
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(repr((states, size, MAX_FRAMES)).encode()).hexdigest()[:16]
    store = Path(store)
    pixels = store / f"{key}.u8"
    index = store / f"{key}.json"
    if not (index.is_file() and pixels.is_file()):
        store.mkdir(parents=True, exist_ok=True)
        part = store / f"{key}.{os.getpid()}.part"
        try:
            with open(part, "wb") as file:
                spans = decode_all(folder, clips, size, file)
            os.replace(part, pixels)
            part.write_text(json.dumps(spans))
            os.replace(part, index)
        finally:
            part.unlink(missing_ok=True)
    spans = [tuple(span) for span in json.loads(index.read_text())]
    return np.memmap(pixels, np.uint8, "r").reshape(-1, size, size, 3), spans


def decode_all(folder: Path, clips: list[Path], size: int, file) -> list[tuple[int, int, float]]:
    """Write the frames of all clips to a file; returns (first frame, number, rate) of each."""
    spans = []
    bad = []
    start = 0
    for clip in tqdm(clips, f"decoding {folder}", unit="clip", disable=None):
        try:
            frames, rate = read_clip(clip, size)
        except InputError as error:
            bad.append(str(error))
            continue
        file.write(frames.tobytes())
        spans.append((start, len(frames), rate))
        start += len(frames)
    if bad:
        raise InputError(f"{folder}: {len(bad)} of {len(clips)} clips cannot be used: "
                         f"{'; '.join(bad)}; replace or remove them")
    return spans


def read_clip(path: str | Path, size: int | None = None) -> tuple[np.ndarray, float]:
    """Read the frames of a clip, uint8 (n, h, w, 3), centre squares resized where size is given.

    Returns them with their frames a second. Writers merge equal frames: each picture becomes as
    many frames as its time holds the shortest one. A delay of 0 is 100 ms, as in browsers; alpha
    lies on black. Raises InputError for what cannot be read.
    """
    path = Path(path)
    decode = decode_images if path.is_dir() else decode_animation
    if path.suffix.lower() in VIDEOS:
        decode = decode_video
    pictures = []
    seconds = []
    try:
        for picture, shown in itertools.islice(decode(path), MAX_FRAMES):
            if size:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(picture))
            seconds.append(shown)
        if not pictures:
            raise EOFError("no frames in it")
        # 120 and 130 ms in a GIF are one frame each, 8 a second
        single = [shown for shown in seconds if shown < min(seconds) * 3 / 2]
        counts = [max(1, round(shown * len(single) / sum(single))) for shown in seconds]
        if sum(counts) > 2 * MAX_FRAMES:
            raise ValueError(f"{sum(counts):,} frames, by its shortest and longest delays")
        return np.repeat(np.stack(pictures), counts, axis=0), float(sum(counts) / sum(seconds))
    except Exception as error:  # decoders have many for a damaged file
        remedy = "pip install av" if isinstance(error, ImportError) else "replace or remove it"
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error


def decode_images(folder: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a folder of numbered images."""
    images = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES]
    for file in sorted(images, key=natural_key):
        with Image.open(file) as image:
            yield to_rgb(image), Fraction(1, FOLDER_FPS)


def decode_animation(path: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a GIF, WebP or PNG with the seconds that each picture is shown."""
    with Image.open(path) as image:
        for k in range(getattr(image, "n_frames", 1)):
            image.seek(k)
            image.load()  # Pillow knows the duration of a WebP's picture once it is decoded
            yield to_rgb(image), Fraction(image.info.get("duration") or 100) / 1000
        # Pillow takes a GIF that is cut off between two pictures for a short one
        if image.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
            raise EOFError("cut off")


def decode_video(path: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a video with the seconds that each picture is shown."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        usual = 1 / (stream.average_rate or stream.guessed_rate)
        last = None
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise EOFError("cut off")
            for frame in packet.decode():
                if last is not None:
                    timed = None not in (frame.pts, last.pts) and frame.pts > last.pts
                    shown = (frame.pts - last.pts) * frame.time_base if timed else usual
                    yield to_rgb(last.to_image()), shown
                last = frame
        if last is not None:
            yield to_rgb(last.to_image()), usual


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any kind of picture into RGB, alpha on black."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels")
    if image.mode == "RGB":
        return image
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
