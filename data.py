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
from contextlib import suppress
from fractions import Fraction
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
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

ANIMATIONS = (".gif", ".webp", ".png", ".apng")  # read by Pillow
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv",
          ".3gp")  # read by av
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the frames of a clip that is a folder
TABLES = (".jsonl", ".csv", ".tsv", ".json")  # named metadata, captions or prompts
NAME_COLUMNS = ("file_name", "filename", "file", "name", "video", "clip", "path")
TEXT_COLUMNS = ("text", "caption", "prompt", "description")
FOLDER_FPS = 8  # of such a clip, which says none: the default of sampling
MAX_RATE = 120  # what lies closer together is no rate but a glitch
MAX_PIXELS = 2**25  # of a frame, one of 8K video; a file of a few bytes can claim any number
MAX_FRAMES = 1000  # of a clip: what comes later in a longer one is not used


class ClipFolder(ClipDataset):
    """Clips of a folder (ours): [i] -> {"video": (f, 3, size, size), "caption": str, "fps": float}.

    A clip is an animation, a video, or a folder of numbered images at 8 a second, at any depth; its
    centre square is resized. Captions are those of `read_captions`; "" trains the unconditional
    branch.

    Every clip is decoded once, to `store`, a folder that later runs on the same files reuse, or to
    a temporary file. `notes` says what was read. Raises InputError that names every clip that is
    unreadable or shorter than `frames`, unless `skip_unusable`.
    """

    def __init__(self, path: str | Path, frames: int, size: int, seed: int = 0,
                 fps: float | None = None, store: str | Path | None = None,
                 max_frames: int = MAX_FRAMES, skip_unusable: bool = False):
        super().__init__(frames, size, seed, fps)
        if max_frames < frames:
            raise InputError(f"--max-frames {max_frames}: a clip has {frames}; give more")
        clips, others = find_clips(Path(path))
        self.names = [clip.relative_to(path).as_posix() for clip in clips]
        self.all_names = self.names
        self.captions, others = read_captions(clips, others)
        self.pixels, self.clips, place = decode_once(path, clips, size, store, max_frames)
        good = [i for i, (_, total, _) in enumerate(self.clips) if total >= frames]
        bad = [f"{name}: {f'{total} of {frames} frames' if total else reason}"
               for name, (_, total, reason) in zip(self.names, self.clips) if total < frames]
        if bad and not (skip_unusable and good):
            raise InputError(f"{path}: {len(bad)} of {len(clips)} clips cannot be used: "
                             f"{'; '.join(bad)}; replace or remove them, lower --frames, or add "
                             f"--skip-unusable")
        vars(self).update(vars(self.subset(good)))
        folders = sum(clip.is_dir() for clip in clips)
        self.notes = [f"{path}: {len(good)} clips ({folders} folders of pictures), decoded once to "
                      f"{place} ({self.pixels.nbytes / 1e9:.2f} GB); {len(others)} other files "
                      f"passed over"]
        self.notes += [f"left out: {reason}" for reason in bad]
        if long := sum(clip[1] == max_frames for clip in self.clips):
            self.notes.append(f"of {long} clips the first {max_frames} frames are used; "
                              f"--max-frames changes that")
        unread = [file for file in others if file.suffix.lower() in (".txt", ".parquet", *TABLES)
                  and not file.with_suffix(".u8").exists()]  # a store's own
        if unread and "" in self.captions:
            self.notes.append(f"{unread[0]}: read for no caption; they come from metadata.csv, "
                              f"columns file_name and text, or from NAME.txt")

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
        for column in ("clips", "captions", "names"):
            setattr(chosen, column, [getattr(self, column)[i] for i in items])
        return chosen

    def split(self, held_out_file: str = "") -> tuple["ClipFolder", "ClipFolder"]:
        """Part clips to train on from those held out: every tenth, or those named in a file."""
        held_out = {*(range(len(self))[9::10] or range(len(self))[-1:])}
        if held_out_file:
            lines = read_text(Path(held_out_file)).split("\n")
            names = {line.strip() for line in lines} - {""}
            held_out = {i for i, name in enumerate(self.names) if name in names}
            if unknown := names - {*self.all_names}:
                raise InputError(f"--held-out {held_out_file}: {min(unknown)!r} is no clip of this "
                                 f"folder; correct it")
            if not 0 < len(held_out) < len(self):
                raise InputError(f"--held-out {held_out_file}: names {len(held_out)} of "
                                 f"{len(self)} clips; name some of them, one a line")
        trained = {*range(len(self))} - held_out or held_out
        return self.subset(sorted(trained)), self.subset(sorted(held_out))


def open_data(name: str, frames: int, size: int, seed: int = 0, rate_multiplier: int = 1,
              held_out: str = "", **of_folder) -> tuple[ClipDataset, ClipDataset]:
    """Open "shapes" or a folder of clips -> clips to train on, and clips held out.

    Of shapes those of split "test" are held out; of a folder see `ClipFolder` and its `split`.
    """
    if name == "shapes":
        return (ShapesDataset("train", frames, size, seed, rate_multiplier=rate_multiplier),
                ShapesDataset("test", frames, size, seed, rate_multiplier=rate_multiplier))
    return ClipFolder(name, frames, size, seed, **of_folder).split(held_out)


def find_clips(folder: Path) -> tuple[list[Path], list[Path]]:
    """List the clips of a folder, in natural order, and the files that are none, at any depth.

    Hidden files, folders of macOS and those of runs are passed over. Raises InputError where there
    is no clip.
    """
    if not folder.is_dir():
        raise InputError(f"--data {folder}: no such folder; name one of clips")
    clips = []
    others = []
    folders = [folder]
    seen = set()  # links can go round
    for parent in folders:  # grows on the way
        if parent.resolve() in seen or (parent / "log.csv").exists() and parent != folder:
            continue
        seen.add(parent.resolve())
        for entry in parent.iterdir():
            if entry.name.startswith(".") or entry.name == "__MACOSX":
                continue
            if entry.is_dir() and not is_numbered(entry):
                folders.append(entry)
            elif entry.is_dir() or is_moving(entry):
                clips.append(entry)
            else:
                others.append(entry)
    if not clips:
        kinds = ", ".join(ANIMATIONS + VIDEOS)
        raise InputError(f"--data {folder}: no clips in it; put {kinds} or folders of numbered "
                         f"images there")
    return sorted(clips, key=natural_key), sorted(others, key=natural_key)


def is_moving(file: Path) -> bool:
    """Tell a clip from another file; one picture alone beside the clips is a cover."""
    suffix = file.suffix.lower()
    if suffix not in (".png", ".webp") or not file.exists():
        return suffix in ANIMATIONS + VIDEOS and file.exists()
    try:
        with Image.open(file) as image:
            return getattr(image, "is_animated", False)
    except Exception:  # it is damaged, which its decoder will say
        return True


def is_numbered(folder: Path) -> bool:
    """Tell a clip of numbered images from a folder that holds clips."""
    images = numbered_images(folder)
    others = [file for file in folder.iterdir() if file not in images]
    return len(images) > 1 and not any(map(is_moving, [*others, *images[:3], images[-1]]))


def numbered_images(folder: Path) -> list[Path]:
    """List the images whose names hold a number, in natural order."""
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGES
                   and re.search(r"\d", file.stem) and not file.name.startswith(".")),
                  key=natural_key)


def natural_key(path: Path) -> list:
    """Sort names with their numbers as numbers: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_captions(clips: list[Path], others: list[Path]) -> tuple[list[str], list[Path]]:
    """Read the caption of every clip, white space made single blanks; "" where there is none.

    They come from a table named metadata, captions or prompts, with a file name and a text in each
    row; else from NAME.txt or NAME.caption beside the clip or in a folder captions. Returns them
    with the files that were not read.
    """
    texts = {str(file).lower(): file for file in others}
    captions = {}
    read = set()
    for clip in clips:
        stem = clip if clip.is_dir() else clip.with_suffix("")
        places = [f"{stem}.txt", f"{stem}.caption", f"{stem.parent}/captions/{stem.name}.txt",
                  f"{stem.parent.parent}/captions/{stem.name}.txt"]
        found = [texts[place.lower()] for place in places if place.lower() in texts]
        captions[clip] = read_text(found[0]) if found else ""
        read |= {*found}
    by_name = {os.path.abspath(clip.with_suffix("")): clip for clip in clips}
    by_name |= {os.path.abspath(clip): clip for clip in clips}
    for table in others:
        is_table = table.stem.lower() in ("metadata", "captions", "prompts")
        if not is_table or table.suffix.lower() not in TABLES:
            continue
        read.add(table)
        for line, row in read_table(table):
            name = next((row[column] for column in NAME_COLUMNS if column in row), None)
            text = next((row[column] for column in TEXT_COLUMNS if column in row), None)
            if not isinstance(name, str) or not isinstance(text, str) or None in row:
                columns = ", ".join(str(column) for column in row if column) or "none"
                raise InputError(f"{table}: line {line} must have file_name and text (in quotes "
                                 f"where it has commas); the columns found are {columns}")
            path = os.path.abspath(table.parent / name)
            if path in by_name:
                captions[by_name[path]] = text
            elif not os.path.exists(path):
                raise InputError(f"{table}: line {line}: {name!r} is no clip in this folder; add "
                                 f"it or remove the line")
    texts = [text.encode("utf-8", "replace").decode() for text in captions.values()]
    return [" ".join(text.split()) for text in texts], [f for f in others if f not in read]


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 where it says so; InputError for another."""
    raw = file.read_bytes()
    try:
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: its encoding is not UTF-8 (byte {error.start} is "
                         f"{raw[error.start]:#x}); save it as UTF-8") from error


def read_table(table: Path) -> Iterator[tuple[int, dict]]:
    """Read the rows of a .csv, .tsv, .jsonl or .json file with their line numbers."""
    text = read_text(table)
    line = 1
    rows = []
    try:
        if table.suffix.lower() in (".csv", ".tsv"):
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
            rows = [(reader.line_num, row) for row in reader]
        elif table.suffix.lower() == ".json":
            rows = json.loads(text)
            if isinstance(rows, dict):  # name -> caption
                rows = [{"file_name": name, "text": caption} for name, caption in rows.items()]
            rows = [*enumerate(rows, 1)]
        else:
            for line, content in enumerate(text.split("\n"), 1):
                if content.strip():
                    rows.append((line, json.loads(content)))
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise InputError(f"{table}: line {line} cannot be read ({error}); correct it") from error
    for line, row in rows:
        row = row if isinstance(row, dict) else {}
        yield line, {key and key.strip().lower(): value for key, value in row.items()}


def decode_once(folder: str | Path, clips: list[Path], size: int, store: str | Path | None,
                max_frames: int) -> tuple[np.ndarray, list[tuple], Path]:
    """Decode all clips to memory-mapped pixels, uint8 (n, size, size, 3), or find them in `store`.

    Returns them with (first frame, number of frames, frames a second) of each clip, (0, 0, reason)
    of one that cannot be read, and the file. A store is keyed by name, size and time of change of
    every file, and is written whole or not at all; of several processes one decodes.
    """
    if store is None:  # the mapping outlives the name of its file
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            return decode_once(folder, clips, size, temporary, max_frames)
    if any(clip.suffix.lower() in VIDEOS and clip.is_file() for clip in clips):
        try:
            import av  # noqa: F401
        except ImportError as error:
            raise InputError(f"{folder}: reading its videos needs a package: pip install "
                             f"av") from error
    files = []
    for clip in clips:
        files += sorted(clip.iterdir()) if clip.is_dir() else [clip]
    states = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
              for file in files]
    key = hashlib.sha256(ascii((states, size, max_frames)).encode()).hexdigest()[:16]
    pixels = Path(store) / f"{key}.u8"
    index = Path(store) / f"{key}.json"
    part = Path(store) / f"{key}.{os.getpid()}.part"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with open(index, "a+") as lock:
            lock_file(lock)
            spans = read_index(index, pixels, size)
            retried = [clip for clip, span in zip(clips, spans) if not span[1]]
            if not spans or any(decode_clip(clip, size, max_frames)[0] is not None
                                for clip in retried):
                with open(part, "wb") as file:
                    spans = decode_all(folder, clips, size, max_frames, file)
                os.replace(part, pixels)
                index.write_text(json.dumps(spans))
    except OSError as error:
        raise InputError(f"--frame-store {store}: the frames of {folder} cannot be written "
                         f"({error.strerror or error}); make room or choose another") from error
    finally:
        with suppress(OSError):
            part.unlink()
    count = sum(span[1] for span in spans)
    frames = np.memmap(pixels, np.uint8, "r") if count else np.zeros(0, np.uint8)
    return frames.reshape(count, size, size, 3), [tuple(span) for span in spans], pixels


def read_index(index: Path, pixels: Path, size: int) -> list[list]:
    """Read the spans of a store, none where it is not whole."""
    try:
        spans = json.loads(index.read_text())
        length = sum(span[1] for span in spans) * size * size * 3
        return spans if pixels.stat().st_size == length else []
    except (OSError, ValueError):
        return []


def lock_file(file) -> None:
    """Wait until no other process holds the file; Windows and some networks have no locks."""
    with suppress(ImportError, OSError):
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX)


def decode_clip(clip: Path, size: int, max_frames: int) -> tuple[np.ndarray | None, float | str]:
    """Read a clip -> its frames and their rate, or None and why it cannot be read."""
    try:
        return read_clip(clip, size, max_frames)
    except InputError as error:
        reason = str(error).removeprefix(f"{clip}: ")
        return None, reason.removesuffix("; replace or remove it")


def decode_all(folder: str | Path, clips: list[Path], size: int, max_frames: int,
               file) -> list[tuple]:
    """Write the frames of all clips to a file; returns (first frame, number, rate) of each."""
    spans = []
    start = 0
    at_once = max(1, min(4 * os.cpu_count(), 2**31 // (size**2 * 3 * max_frames)))  # in 2 GB
    bar = tqdm(total=len(clips), desc=f"decoding {folder}", unit="clip", disable=None)
    with ThreadPool(min(at_once, os.cpu_count())) as pool, bar:
        for i in range(0, len(clips), at_once):
            chunk = [(clip, size, max_frames) for clip in clips[i : i + at_once]]
            for frames, rate in pool.starmap(decode_clip, chunk):
                total = 0 if frames is None else len(frames)
                if total:
                    file.write(frames.tobytes())
                spans.append((start if total else 0, total, rate))
                start += total
                bar.update()
    return spans


def read_clip(path: str | Path, size: int | None = None,
              max_frames: int = MAX_FRAMES) -> tuple[np.ndarray, float]:
    """Read the frames of a clip, uint8 (n, h, w, 3), centre squares resized where size is given.

    Returns them with their frames a second. As players show it: upright, every picture for its
    time, which makes it one frame or several, a delay of up to 10 ms as 100 ms; alpha lies on
    black. Raises InputError for what cannot be read.
    """
    path = Path(path)
    decode = decode_images if path.is_dir() else decode_animation
    if path.suffix.lower() in VIDEOS and not path.is_dir():
        decode = decode_video
    pictures = []
    seconds = []
    try:
        for picture, shown in itertools.islice(decode(path), max_frames):
            if size:
                picture = ImageOps.fit(picture, (size, size), Image.Resampling.BICUBIC)
            pictures.append(np.asarray(picture))
            seconds.append(shown)
        if not pictures:
            raise EOFError("no frames in it")
        # a frame lasts as long as the shortest pictures do: 120 and 130 ms in a GIF are one frame
        # each, 8 a second, a merged pair two; one picture in twenty may be a glitch
        shortest = max(sorted(seconds)[len(seconds) // 20], Fraction(1, MAX_RATE))
        single = [shown for shown in seconds if shortest <= shown < shortest * 3 / 2] or [shortest]
        rate = len(single) / sum(single)
        ends = [round(end * rate) for end in itertools.accumulate(seconds)]
        counts = np.diff([min(end, max_frames) for end in ends], prepend=0)
        return np.repeat(np.stack(pictures), counts, axis=0), float(ends[-1] / sum(seconds))
    except Exception as error:  # decoders have many for a damaged file
        remedy = "pip install av" if isinstance(error, ImportError) else "replace or remove it"
        reason = " ".join(str(error).split())
        if isinstance(error, UnidentifiedImageError):
            reason = "it is no picture of its kind"
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error


def decode_images(folder: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a folder of numbered images."""
    for file in numbered_images(folder):
        with Image.open(file) as image:
            yield to_rgb(ImageOps.exif_transpose(image)), Fraction(1, FOLDER_FPS)


def decode_animation(path: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a GIF, WebP or PNG with the seconds that each picture is shown."""
    with path.open("rb") as file, Image.open(file) as image:
        cover = int(getattr(image, "default_image", False))  # of an APNG, not part of the clip
        for k in itertools.count(cover):
            try:
                image.seek(k)
            except EOFError:
                break
            image.load()  # Pillow knows the duration of a WebP's picture once it is decoded
            delay = image.info.get("duration") or 0
            yield to_rgb(image), Fraction(delay if delay > 10 else 100) / 1000  # as browsers
        file.seek(-1, os.SEEK_CUR)
        # Pillow takes a GIF that is cut off between two pictures for a short one
        if image.format == "GIF" and file.read(1) != b";":
            raise EOFError("cut off")


def decode_video(path: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a video with the seconds that each picture is shown."""
    import av

    with av.open(f"file:{path}") as container:  # 10:30.mp4 alone would be a protocol
        if not container.streams.video:
            raise EOFError("no pictures in it")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        shown = 1 / (stream.average_rate or stream.guessed_rate)  # where time stamps are missing
        aspect = float(stream.sample_aspect_ratio or 1)
        last = None
        for packet in container.demux(stream):
            if packet.is_corrupt:
                raise EOFError("cut off")
            for frame in packet.decode():
                if last is not None:
                    if None not in (frame.pts, last.pts) and frame.pts > last.pts:
                        shown = (frame.pts - last.pts) * frame.time_base
                    yield to_upright(last, aspect), shown
                last = frame
        if last is not None:
            yield to_upright(last, aspect), shown


def to_upright(frame, aspect: float) -> Image.Image:
    """Turn a frame of a video into RGB as players show it; `aspect` is a pixel's width / height."""
    image = to_rgb(frame.to_image())
    width = round(image.width * aspect)
    if frame.interlaced_frame:  # every second line is of another moment
        image = Image.fromarray(np.asarray(image)[::2])
    if image.size != (width, frame.height):
        image = image.resize((width, frame.height))
    return image.rotate(frame.rotation, expand=True)  # by multiples of 90 degrees, exact


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any kind of picture into RGB, alpha on black."""
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels")
    if image.mode.startswith("I"):  # 16 bits, which Pillow's convert() makes white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "RGB":
        return image
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")
