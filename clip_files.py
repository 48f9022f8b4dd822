"""Files of clips: reading any kind of them, writing and showing clips (all ours). `data.py` makes data sets of them."""

import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor


class InputError(ValueError):
    """A mistake of the user's: one line that names the file or flag and the remedy (ours)."""


# ---------------------------------------------------------------------------------------------------------------------
# Reading

ANIMATIONS = (".gif", ".webp", ".png")  # by Pillow
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")  # by av
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the frames of a clip that is a folder
FOLDER_RATE = 8  # frames a second of such a clip, which says none: the default of sampling
MOST_PIXELS = 2**25  # of a picture, one of 8K video; a file of a few bytes can claim any number
MOST_FRAMES = 2**20  # of a clip


def read_clip(path: str | Path) -> tuple[np.ndarray, float]:
    """All frames of a clip, uint8 (n, h, w, 3), and how many make a second; raises InputError (ours).

    GIF, WebP and APNG show each picture for its own time, and writers merge equal neighbours: a picture becomes as many
    frames as its delay holds the shortest one, rounded. A delay of 0 is 100 ms, as in browsers. Alpha lies on black.
    """
    path, pictures, seconds = Path(path), [], []
    for frame, shown in decode(path):
        pictures.append(_rgb(frame))
        seconds.append(shown)
    source, rate = expand(seconds, path)
    return np.stack([pictures[k] for k in source]), rate


def read_pictures(path: Path, wanted: list[int], times: Sequence[int]) -> list[np.ndarray]:
    """The stored pictures of a clip with these rising numbers, uint8 (h, w, 3) each; `times` are from `scan`.

    A video is entered at the last key frame before the first of them. Raises InputError where one cannot be read.
    """
    if path.is_dir():
        return [_rgb(frame) for frame, _ in decode(path, wanted)]
    pictures, start = {}, times[wanted[0]] if len(times) else None
    for k, (frame, _) in enumerate(decode(path, start=start)):
        if start is not None:
            k = int(np.searchsorted(times, frame.pts))
        if k in wanted:
            pictures[k] = _rgb(frame)
        if k >= wanted[-1]:
            break
    if len(pictures) < len(set(wanted)):
        raise InputError(f"{path}: cannot be read (frames are missing); replace or remove it")
    return [pictures[k] for k in wanted]


def scan(path: Path, whole: bool) -> tuple[list[Fraction], Sequence[int], set[tuple[int, int]]]:
    """How long each stored picture of a clip is shown, the times of a video's pictures, and the sizes that occur.

    `whole` decodes it to its end; without, of a video or a folder of images only headers are read.
    """
    if whole or not (path.is_dir() or path.suffix.lower() in VIDEOS):
        seconds, times, sizes = [], [], set()
        for frame, shown in decode(path):
            seconds.append(shown)
            times.append(getattr(frame, "pts", None))
            sizes.add((frame.width, frame.height))
        return seconds, _compact(times), sizes
    with _named(path):
        if path.is_dir():
            with Image.open(_images(path)[0]) as frame:
                return [Fraction(1, FOLDER_RATE)] * len(_images(path)), [], {frame.size}
        with _video(path) as (container, stream):
            times = [packet.pts for packet in _packets(container, stream) if packet.size and not packet.is_discard]
            if None in times or len(set(times)) < len(times):
                return scan(path, whole=True)  # only the decoder knows which pictures there are
            if not times or len(times) < stream.frames:
                raise EOFError("cut off")
            return [_shown(stream)] * len(times), _compact(sorted(times)), {(stream.width, stream.height)}


def decode(path: Path, wanted: list[int] | None = None, start: int | None = None) -> Iterator:
    """Decodes a clip to its end -> pairs (Pillow image or av frame, Fraction of seconds it is shown), at least one.

    Of a folder of images only those `wanted`; of a video what follows the last key frame at or before the time `start`.
    What cannot be read, whatever the decoder says about it, is an InputError.
    """
    with _named(path):
        if path.is_dir():
            images = _images(path)
            for file in images if wanted is None else [images[k] for k in wanted]:
                with _named(file), Image.open(file) as frame:
                    _bounded(frame.width, frame.height)
                    frame.load()
                    yield frame, Fraction(1, FOLDER_RATE)
        elif path.suffix.lower() in VIDEOS:
            with _video(path) as (container, stream):
                if start is not None:
                    container.seek(start, stream=stream)
                for packet in _packets(container, stream):
                    for frame in packet.decode():
                        _bounded(frame.width, frame.height)
                        yield frame, _shown(stream)
        else:
            with Image.open(path) as frame:
                _bounded(frame.width, frame.height)
                for k in range(getattr(frame, "n_frames", 1)):
                    frame.seek(k)
                    frame.load()
                    yield frame, Fraction(frame.info.get("duration") or 100) / 1000
                # To Pillow a GIF that ends between two pictures is a short one: only its last byte tells.
                if frame.format == "GIF" and not path.read_bytes().rstrip(b"\0").endswith(b";"):
                    raise EOFError("cut off")


@contextmanager
def _named(path: Path):
    """Whatever goes wrong within is an InputError that names the file."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:
        remedy = "pip install av" if isinstance(error, ImportError) else "replace or remove it"
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())}); {remedy}") from error


def _bounded(width: int, height: int) -> None:
    if not 0 < width * height <= MOST_PIXELS:
        raise ValueError(f"{width} x {height} pixels: must be 1 to {MOST_PIXELS:,}")


def _images(folder: Path) -> list[Path]:
    images = sorted((e for e in folder.iterdir() if e.suffix.lower() in IMAGES), key=natural)
    if not images:
        raise EOFError("no frames in it")
    return images


@contextmanager
def _video(path: Path):
    """A video file, open, and its first stream of pictures."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        _bounded(stream.width, stream.height)
        yield container, stream


def _packets(container, stream) -> Iterator:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise EOFError("cut off")
        yield packet


def _shown(stream) -> Fraction:
    """Seconds a picture."""
    return 1 / (stream.average_rate or stream.guessed_rate)


def _compact(times: list) -> Sequence[int]:
    """Rising times, even ones as a range; none at all where a picture has none."""
    if len(times) < 2 or None in times:
        return []
    even = range(times[0], times[-1] + 1, max(1, times[1] - times[0]))
    times = np.array(times)
    return even if np.array_equal(times, even) else times if (np.diff(times) > 0).all() else []


def _rgb(frame) -> np.ndarray:
    """A Pillow image or an av frame -> uint8 (h, w, 3), alpha on black."""
    if not isinstance(frame, Image.Image):
        return frame.to_ndarray(format="rgb24")
    black = Image.new("RGBA", frame.size, (0, 0, 0, 255))
    return np.asarray(Image.alpha_composite(black, frame.convert("RGBA")).convert("RGB"))


def expand(seconds: list[Fraction], path: Path) -> tuple[Sequence[int], float]:
    """How long each stored picture is shown -> (the picture that each frame shows, frames a second)."""
    if not seconds:
        raise InputError(f"{path}: cannot be read (no frames in it); replace or remove it")
    shortest = min(seconds)
    single = [s for s in seconds if s < shortest * 3 / 2]  # 120 and 130 ms in a GIF are one frame each, 8 a second
    source = range(len(seconds))
    if len(single) < len(seconds):
        counts = [round(s * len(single) / sum(single)) for s in seconds]
        if sum(counts) > MOST_FRAMES:
            raise InputError(f"{path}: cannot be read (delays from {float(shortest):g} to {float(max(seconds)):g} "
                             f"seconds make {sum(counts):,} frames); replace or remove it")
        source = np.repeat(source, counts)
    return source, float(len(source) / sum(seconds))


def natural(path: Path) -> list:
    """Sorts names with their numbers as numbers: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]


# ---------------------------------------------------------------------------------------------------------------------
# Writing and showing clips


def to_uint8(video: Tensor) -> np.ndarray:
    """Pixels in [-1, 1] (..., 3, h, w) -> uint8 (..., h, w, 3); what lies outside is clipped."""
    video = ((video.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte()
    return video.movedim(-3, -1).contiguous().numpy()


def check_clip_path(path: str | Path):
    """Raises InputError if `write_clip` knows no such kind of clip, or lacks av for it: ask before the work."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".gif", ".webp", ".png", ".mp4"):
        raise InputError(f"{path}: unknown kind of clip; end its name in .gif, .webp, .png or .mp4")
    try:
        if suffix == ".mp4":
            import av  # noqa: F401
    except ImportError as error:
        raise InputError(f"{path}: cannot be written ({error}); pip install av, or choose .gif") from error


def write_clip(path: str | Path, video: Tensor, fps: float):
    """Writes a video (f, 3, h, w) in [-1, 1] as .gif, .webp (lossless), .png (animated) or .mp4 (ours).

    Delays are whole milliseconds, in a GIF hundredths of a second; a frame starts within half of one of its time. A GIF
    has one palette of 256 colors for all frames, without dithering. An MP4 is H.264 (MPEG-4 where av lacks libx264);
    odd sizes grow by a pixel. The file appears when it is whole. Raises InputError.
    """
    check_clip_path(path)
    path, pictures = Path(path), to_uint8(video)                                               # (f, h, w, 3)
    f, h, w, _ = pictures.shape
    suffix = path.suffix.lower()
    tick = 10 if suffix == ".gif" else 1
    if not 0 < fps <= 1000 / tick:
        raise InputError(f"--fps {fps}: choose more than 0 and at most {1000 // tick} for {path}")
    if suffix == ".mp4":
        return _write_mp4(path, pictures, Fraction(fps).limit_denominator(1001))
    if suffix == ".gif":
        tall = Image.fromarray(pictures.reshape(f * h, w, 3)).quantize(256, dither=Image.Dither.NONE)
        images, options = [tall.crop((0, k * h, w, (k + 1) * h)) for k in range(f)], {"optimize": False}
    else:
        images = [Image.fromarray(picture) for picture in pictures]
        options = {"lossless": True} if suffix == ".webp" else {"blend": 0, "disposal": 1}  # keeps equal neighbours
    delays = tick * np.diff(np.round(np.arange(f + 1) * 1000 / (tick * fps))).astype(int)
    with _replacing(path) as unfinished:
        first, *rest = images
        first.save(unfinished, save_all=True, append_images=rest, duration=delays.tolist(), loop=0, **options)


def _write_mp4(path: Path, pictures: np.ndarray, rate: Fraction):
    import av

    _, h, w, _ = pictures.shape
    pictures = np.pad(pictures, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    with _replacing(path) as unfinished, av.open(str(unfinished), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264" if "libx264" in av.codecs_available else "mpeg4", rate=rate)
        stream.height, stream.width = pictures.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "18"}
        for k, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_image(path: str | Path, picture: Tensor):
    """Writes a picture (3, h, w) in [-1, 1] as `write_clip` does a clip of one frame, best as .png."""
    write_clip(path, picture.unsqueeze(0), fps=1)


@contextmanager
def _replacing(path: Path):
    """A name beside `path`, of the same suffix, for a file that takes its place once it is whole."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if unfinished.exists():
            unfinished.unlink()


def grid(videos: Tensor) -> Tensor:
    """Clips (n, f, 3, h, w) -> one clip (f, 3, H, W): all of them in a near-square grid, white gaps between."""
    return _tile(videos, columns=math.ceil(math.sqrt(len(videos))))


def strip(videos: Tensor) -> Tensor:
    """Clips (n, f, 3, h, w) -> one picture (3, H, W): a row for each clip, its frames side by side."""
    return _tile(videos.flatten(0, 1).unsqueeze(1), columns=videos.shape[1])[0]


def _tile(videos: Tensor, columns: int, gap: int = 2) -> Tensor:
    n, f, c, h, w = videos.shape
    rows = math.ceil(n / columns)
    tiles = videos.new_ones(rows * columns, f, c, h + gap, w + gap)  # white where no clip lies
    tiles[:n, :, :, :h, :w] = videos
    tiles = tiles.unflatten(0, (rows, columns)).permute(2, 3, 0, 4, 1, 5)           # (f, c, rows, h, columns, w)
    return tiles.reshape(f, c, rows * (h + gap), columns * (w + gap))[..., :-gap, :-gap]
