"""The data sets: built-in shapes, drawn when asked for, and folders, decoded once; clips or stills.

One function, `sample_frames`, cuts both (paper §3.2, FPS): it chooses a random part of a video,
takes frames at equal distances, and tells how many of them make a second. Videos are (f, 3, h, w),
pixels in [-1, 1]. Read `folders.py` next to see how clips and captions are found, and
`clip_files.py` to see how files become frames.
"""

import copy
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from clip_files import MAX_FRAMES
from folders import TABLES, decode_once, find_clips, loose_name, read_captions, read_lines
from runs import InputError


# --------------------------------------------------------------------------------------------------
# Frames and FPS (paper §3.2)


def sample_frames(total: int, rate: float, frames: int, rng: np.random.Generator,
                  fps: float | None = None) -> tuple[np.ndarray, float]:
    """Cut a video at random -> the indices (frames,) of its frames, v = their frames per second.

    Of a video of `total` frames at `rate` a second every stride-th is taken, so v = rate / stride.
    The stride is uniform among those of 1 .. 6 that fit, or, given `fps`, the one nearest to rate /
    fps that fits; then the start is uniform. Every stride fits a single frame. Raises InputError if
    total < frames. Source: paper §3.2, FPS (a random part, uniform frames, v); that the stride is
    whole, and at most 6 where no `fps` is given, is ours.
    """
    if total < frames:
        raise InputError(f"{total} frames of {frames}: use a longer video or fewer --frames")
    longest = (total - 1) // (frames - 1) if frames > 1 else math.inf
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
        """Choose the epoch; every epoch cuts each clip differently."""
        self.epoch = epoch

    def rng(self, *item: int) -> np.random.Generator:
        """Make the random generator of an item in this epoch."""
        return np.random.default_rng([self.seed % 2**32, self.epoch, *item])


# --------------------------------------------------------------------------------------------------
# The built-in data set: one object on a dark plain background

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

    [i] -> {"video": (f, 3, h, w) in [-1, 1], "caption": str, "fps": float}; item i has caption
    i % len(captions), those of `split` unless some are given. The source video has 24 frames a
    second and ends where the object reaches the edge or its final size. At 8 a second 8 frames show
    it travel at least 0.3 of the frame, or double or halve its area; for more `frames` it is
    slower. `rate_multiplier` 4 is the same clips at 96 frames a second.
    """

    def __init__(self, split: str = "train", frames: int = 8, size: int = 64, seed: int = 0,
                 fps: float | None = None, length: int = 4800, rate_multiplier: int = 1,
                 captions: list[str] | None = None):
        super().__init__(frames, size, seed, fps)
        self.captions = captions or shape_captions(split)
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
        return {"video": self.draw(color, shape, x, y, sides), "caption": caption, "fps": fps}

    def draw(self, color: str, shape: str, x, y, sides) -> torch.Tensor:
        """Draw an object, (f, 3, h, w): its places x and y and its sides (f,) in frame widths."""
        x, y, sides = (np.float32(value * self.size) for value in (x, y, sides))  # in pixels
        coverage = draw_shape(shape, self.size, x, y, sides)
        contrast = np.float32(COLORS[color])[:, None, None] - np.float32(BACKGROUND)  # (3, 1, 1)
        video = (2 * BACKGROUND - 1) + 2 * contrast * coverage[:, None]  # (f, 3, h, w)
        return torch.from_numpy(video)


class ShapePictures(ShapesDataset):
    """Stills of the shapes, an object of any size anywhere: clips of one frame (ours).

    Their 24 captions, "a {color} {shape}", say nothing of motion.
    """

    def __init__(self, split: str = "train", size: int = 64, seed: int = 0, length: int = 4800):
        captions = [f"a {color} {shape}" for color in COLORS for shape in SHAPES]
        super().__init__(split, 1, size, seed, length=length, captions=captions)

    def __getitem__(self, i: int) -> dict:
        i = range(self.length)[i]
        caption = self.captions[i % len(self.captions)]
        rng = self.rng(i, self.split == "test", 1)  # 1: not those of the clips
        side = rng.uniform(0.15, 0.55, size=1)
        x, y = (rng.uniform(0.025 + side / 2, 0.975 - side / 2) for _ in range(2))
        _, color, shape = caption.split(" ")
        return {"video": self.draw(color, shape, x, y, side), "caption": caption, "fps": self.rate}


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


class ClipFolder(ClipDataset):
    """Clips of a folder (ours): [i] -> {"video": (f, 3, size, size), "caption": str, "fps": float}.

    A clip is an animation, a video, or a folder of numbered pictures at 8 a second, at any depth;
    its centre square is resized. Captions are those of `read_captions`; "" trains the unconditional
    branch.

    Every clip is decoded once, to `store`, a folder that later runs reuse, or to a temporary file.
    `notes` says what was read. Raises InputError that names every clip that cannot be read or is
    shorter than `frames`, unless `skip_unusable` leaves them out.
    """

    kind = "clips"

    def __init__(self, path: str | Path, frames: int, size: int, seed: int = 0,
                 fps: float | None = None, store: str | Path | None = None,
                 max_frames: int = MAX_FRAMES, skip_unusable: bool = False):
        super().__init__(frames, size, seed, fps)
        stills = self.kind == "pictures"
        if max_frames < frames:
            raise InputError(f"--max-frames {max_frames}: a clip has {frames}; give more")
        path = Path(path)
        found, others, passed_over = find_clips(path, stills)
        captions, others, notes = read_captions(path, found, others)
        self.all_names = [clip.relative_to(path).as_posix() for clip in found]
        self.pixels, decoded, place = decode_once(path, found, size, store, max_frames)

        good = [i for i, clip in enumerate(decoded) if clip.total >= frames]
        bad = [f"{name}: {clip.problem or f'{clip.total} of {frames} frames'}"
               for name, clip in zip(self.all_names, decoded) if clip.total < frames]
        if bad and not (skip_unusable and good):
            shorter = "" if stills else ", lower --frames"
            raise InputError(f"{path}: {len(bad)} of {len(found)} {self.kind} cannot be used: "
                             f"{'; '.join(bad)}; replace or remove them{shorter}, or add "
                             f"--skip-unusable")
        self.names = [self.all_names[i] for i in good]
        self.captions = [captions[i] for i in good]
        self.clips = [decoded[i] for i in good]

        folders = sum(os.path.isdir(found[i]) for i in good)
        of_those = "" if stills else f" ({folders} folders of pictures)"
        self.notes = [f"{path}: {len(good)} {self.kind}{of_those}, decoded once to {place} "
                      f"({self.pixels.nbytes / 1e9:.2f} GB); {len(others)} other files passed over"]
        if passed_over:
            self.notes[0] += f", and {len(passed_over)} hidden files or folders of runs"
        if bad:
            self.notes[0] += f"; {len(bad)} {self.kind} left out"
        self.notes += [f"left out: {reason}" for reason in bad] + notes
        long = sum(clip.total == max_frames for clip in self.clips)
        if long and not stills:
            self.notes.append(f"of {long} clips the first {max_frames} frames are used; "
                              f"--max-frames changes that")
        unread = [file for file in others if file.suffix.lower() in (".txt", ".parquet", *TABLES)]
        if unread and "" in self.captions:
            self.notes.append(f"{unread[0]}: not used for captions; they come from metadata.csv, "
                              f"columns file_name and text, or from NAME.txt")

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        clip = self.clips[i]
        indices, fps = sample_frames(clip.total, clip.rate, self.frames, self.rng(i), self.fps)
        video = torch.from_numpy(self.pixels[clip.start + indices])  # (f, h, w, 3)
        video = video.permute(0, 3, 1, 2) / 127.5 - 1  # (f, 3, h, w)
        return {"video": video.contiguous(), "caption": self.captions[i], "fps": fps}

    def subset(self, items: list[int]) -> "ClipFolder":
        """Make the data set of some of the clips."""
        chosen = copy.copy(self)
        for column in ("clips", "captions", "names"):
            setattr(chosen, column, [getattr(self, column)[i] for i in items])
        return chosen

    def split(self, held_out_file: str = "") -> tuple["ClipFolder", "ClipFolder"]:
        """Part the clips to train on from those held out: every tenth, or those named in a file.

        It is every tenth of all clips, so that the same are held out where fewer can be used. Of
        three to nine clips the last one is held out. One or two are all trained on, and stand in
        for the clips held out, which a note says.
        """
        every = range(len(self))
        places = {name: place for place, name in enumerate(self.all_names, 1)}
        held_out = {i for i in every if places[self.names[i]] % 10 == 0}
        if not held_out and len(self) > 2:
            held_out = {len(self) - 1}
        if held_out_file:
            known = {loose_name(name): name for name in self.all_names}
            known |= {name: name for name in self.all_names}
            names = set()
            for line in read_lines(Path(held_out_file)):
                name = known.get(line) or known.get(loose_name(line))
                if not name:
                    raise InputError(f"--held-out {held_out_file}: {line!r:.100} is no "
                                     f"{self.kind[:-1]} of this folder; correct it")
                names.add(name)
            held_out = {i for i in every if self.names[i] in names}
            if not 0 < len(held_out) < len(self):
                raise InputError(f"--held-out {held_out_file}: names {len(held_out)} of "
                                 f"{len(self)} {self.kind}; name some of them, one a line")
        trained = self.subset([i for i in every if i not in held_out])
        if not held_out:
            trained.notes = [*self.notes, f"{len(self)} {self.kind} are too few to hold one out: "
                             f"the held-out loss and samples are of those that are trained on"]
        return trained, self.subset(sorted(held_out) or [*every])


class PictureFolder(ClipFolder):
    """Captioned stills of a folder, at any depth: clips of one frame (paper §3, image start).

    Of an animation the first frame is read. All else is as for clips.
    """

    kind = "pictures"

    def __init__(self, path: str | Path, size: int, seed: int = 0,
                 store: str | Path | None = None, skip_unusable: bool = False):
        super().__init__(path, 1, size, seed, store=store, max_frames=1,
                         skip_unusable=skip_unusable)


class Data(NamedTuple):
    """What a run reads: clips, and pictures where there are; some of each are held out."""

    clips: ClipDataset
    held_out: ClipDataset
    pictures: ClipDataset | None = None
    held_out_pictures: ClipDataset | None = None

    def trained(self) -> list[ClipDataset]:
        """Return clips, and pictures where there are."""
        return [source for source in (self.clips, self.pictures) if source]

    def names(self) -> list[str]:
        """List the files that are trained on; of the shapes there are none."""
        return [name for source in self.trained() for name in getattr(source, "names", [])]


def open_data(name: str, frames: int, size: int, seed: int = 0, rate_multiplier: int = 1,
              held_out: str = "", **of_folder) -> tuple[ClipDataset, ClipDataset]:
    """Open "shapes" or a folder of clips -> clips to train on, and clips held out.

    Of shapes those of split "test" are held out, or the captions that the file `held_out` names; of
    a folder see `ClipFolder` and its `split`. With a `rate_multiplier` every frame of its clips is
    taken, so that key frames among them are as far apart as a stride of `sample_frames`.
    """
    if name != "shapes":
        fps = math.inf if rate_multiplier > 1 else None
        return ClipFolder(name, frames, size, seed, fps, **of_folder).split(held_out)
    if os.path.isdir(name) and os.environ.get("RANK", "0") == "0":
        print("--data shapes: the built-in shapes; for the folder of that name give ./shapes")
    captions = {split: shape_captions(split) for split in ("train", "test")}
    if held_out:
        every = captions["train"] + captions["test"]
        named = {*read_lines(Path(held_out))}
        captions = {"train": [caption for caption in every if caption not in named],
                    "test": [caption for caption in every if caption in named]}
        if unknown := sorted(named - {*every}):
            raise InputError(f"--held-out {held_out}: {unknown[0]!r:.100} is no caption of the "
                             f"shapes; correct it")
        if not 0 < len(named) < len(every):
            raise InputError(f"--held-out {held_out}: names {len(named)} of {len(every)} captions; "
                             f"name some of them, one a line")
    return tuple(ShapesDataset(split, frames, size, seed, rate_multiplier=rate_multiplier,
                               captions=captions[split]) for split in ("train", "test"))


def open_pictures(name: str, size: int, seed: int = 0, held_out: str = "",
                  **of_folder) -> tuple[ClipDataset, ClipDataset]:
    """Open "shapes" or a folder of stills -> pictures to train on, and pictures held out."""
    if name == "shapes":
        return ShapePictures("train", size, seed), ShapePictures("test", size, seed)
    return PictureFolder(name, size, seed, **of_folder).split(held_out)
