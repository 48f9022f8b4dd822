"""Reads and writes pictures, animations and videos (ours).

A clip is an animation, a video, or a folder of numbered pictures. Frames that are read are uint8
(n, h, w, 3), frames that are written float (f, 3, h, w) in [-1, 1].
"""

import importlib
import itertools
import math
import os
import re
import secrets
import stat
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from runs import InputError

ANIMATIONS = (".gif", ".webp", ".png", ".apng")  # read by Pillow
VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv",
          ".3gp")  # read by av
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # the frames of a clip that is a folder
STILLS = (*IMAGES, ".gif", ".apng")  # pictures by themselves; of those that move the first frame
FOLDER_FPS = 8  # of a folder of pictures, which names no rate: the default of sampling
MAX_RATE = 120  # frames that lie closer together are a glitch
MAX_PIXELS = 2**25  # of a frame, as of 8K video: a file of a few bytes can claim any number
MAX_FRAMES = 1000  # of a clip; the rest of a longer one is not used


def check_package(package: str, wanted_by: str | Path) -> None:
    """Raise InputError where pillow, or av for videos, is missing or too old."""
    name, least = {"pillow": ("PIL", (9, 1)), "av": ("av", (14, 1))}[package]
    remedy = f"pip install '{package}>={least[0]}.{least[1]}'"
    try:
        version = importlib.import_module(name).__version__
    except ImportError as error:
        raise InputError(f"{wanted_by}: needs a package; {remedy} ({error})") from error
    if tuple(int(number) for number in version.split(".")[:2]) < least:
        raise InputError(f"{wanted_by}: {package} {version} is too old; {remedy}")


# --------------------------------------------------------------------------------------------------
# Reading


def read_clip(path: str | Path, size: int | None = None,
              max_frames: int = MAX_FRAMES) -> tuple[np.ndarray, float]:
    """Read the frames of a clip, uint8 (n, h, w, 3), centre squares resized where size is given.

    Returns them with their frames a second. They are as players show them: upright, every picture
    for its time, which makes it one frame or several, a delay of up to 10 ms as 100 ms, alpha on
    black. Raises InputError for what cannot be read.
    """
    path = Path(path)
    check_package("pillow", path)
    decode = decode_images if os.path.isdir(path) else decode_animation
    if path.suffix.lower() in VIDEOS and not os.path.isdir(path):
        check_package("av", path)
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
        ends, rate = frame_ends(seconds)
        counts = np.diff([min(end, max_frames) for end in ends], prepend=0)
        return np.repeat(np.stack(pictures), counts, axis=0), rate
    except Exception as error:  # decoders have many for a damaged file
        if is_mistake(error):
            raise
        raise InputError(f"{path}: cannot be read ({reason_of(error)}); replace or remove "
                         f"it") from error


def frame_ends(seconds: list[Fraction]) -> tuple[list[int], float]:
    """Find the frame at which every picture ends that is shown so many seconds, and the frame rate.

    A frame lasts as long as the shortest pictures. Of a GIF with delays of 120, 130 and 250 ms the
    first two pictures are one frame each, at 8 a second, and the third is two.
    """
    shortest = sorted(seconds)[len(seconds) // 20]  # one picture in twenty may be a glitch
    shortest = max(shortest, Fraction(1, MAX_RATE))
    short = [shown for shown in seconds if shortest <= shown < shortest * 3 / 2] or [shortest]
    rate = len(short) / sum(short)
    ends = [round(end * rate) for end in itertools.accumulate(seconds)]
    return ends, float(ends[-1] / sum(seconds))


def is_mistake(error: Exception) -> bool:
    """Tell a mistake of a program from what Pillow, of any version, says to a damaged file."""
    place = traceback.extract_tb(error.__traceback__)[-1].filename
    is_of_pillow = Path(PIL.__file__).parent in Path(place).parents
    return isinstance(error, (AttributeError, NameError, TypeError)) and not is_of_pillow


def reason_of(error: Exception) -> str:
    """Say in one line what a decoder says."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no picture of its kind"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


def check_size(width: int, height: int) -> None:
    """Raise ValueError, before a picture is decoded, if it has more than MAX_PIXELS."""
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, where 1 to {MAX_PIXELS} can be read")


def numbered_images(folder: Path) -> list[Path]:
    """List the pictures whose names hold a number, in natural order."""
    return sorted((file for file in folder.iterdir() if file.suffix.lower() in IMAGES
                   and re.search(r"\d", file.stem) and file.name[0] != "."), key=natural_key)


def natural_key(path: Path) -> tuple[list, str]:
    """Sort names with their numbers as numbers: 2 before 10."""
    parts = re.split(r"(\d+)", str(path))
    return [int(part) if part.isdecimal() else part for part in parts], str(path)


def decode_images(folder: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a folder of numbered pictures."""
    for file in numbered_images(folder):
        try:
            with Image.open(file) as image:
                check_size(*image.size)
                picture = to_rgb(ImageOps.exif_transpose(image))
        except Exception as error:
            if is_mistake(error):
                raise
            raise ValueError(f"{file.name}: {reason_of(error)}") from error
        yield picture, Fraction(1, FOLDER_FPS)


def decode_animation(path: Path) -> Iterator[tuple[Image.Image, Fraction]]:
    """Decode a GIF, WebP, PNG or still with the seconds that each picture is shown."""
    with path.open("rb") as file, Image.open(file) as image:
        check_size(*image.size)
        cover = int(getattr(image, "default_image", False))  # of an APNG, not part of the clip
        for k in itertools.count(cover):
            try:
                image.seek(k)
            except EOFError:
                break
            check_size(*image.size)  # a GIF's can grow
            image.load()  # Pillow knows the duration of a WebP's picture once it is decoded
            delay = image.info.get("duration") or 0
            shown = Fraction(delay if delay > 10 else 100) / 1000  # as browsers
            yield to_rgb(ImageOps.exif_transpose(image)), shown
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
        decoder = stream.codec_context
        if decoder is None:
            raise ValueError("av cannot decode its pictures")
        check_size(decoder.width, decoder.height)
        library = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(decoder.name)
        if library and stream.metadata.get("alpha_mode") == "1":  # only the libraries read alpha
            decoder = av.CodecContext.create(library, "r")
        decoder.options = {"max_pixels": str(MAX_PIXELS)}  # the size can change on the way
        decoder.thread_type = "AUTO"
        # where time stamps are missing
        shown = 1 / (stream.average_rate or stream.guessed_rate or Fraction(FOLDER_FPS))
        aspect = float(stream.sample_aspect_ratio or 1)
        last = None
        end = 0
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream.index != stream.index:
                continue
            if packet.is_corrupt:
                raise EOFError("cut off")
            for frame in decoder.decode(packet):
                if last is not None:
                    if None not in (frame.pts, last.pts) and frame.pts > last.pts:
                        shown = (frame.pts - last.pts) * frame.time_base
                    yield to_upright(last, aspect), shown
                last = frame
        if last is not None:
            yield to_upright(last, aspect), shown
        # pictures or sound must go on until the end that these formats state; other lengths are
        # guesses of av, and some files state none
        kind = container.format.name.split(",")[0]
        length = Fraction(container.duration or 0, av.time_base)
        if kind == "avi" and stream.average_rate:  # for which av takes the size of the file
            length = stream.frames / stream.average_rate
        missing = Fraction(container.start_time or 0, av.time_base) + length - end
        is_short = missing > max(2 * shown, length / 30)
        if kind in ("matroska", "mov", "flv", "avi") and is_short or kind == "asf" and not length:
            raise EOFError("cut off")


def to_upright(frame, aspect: float) -> Image.Image:
    """Turn a frame of a video into RGB as players show it; `aspect` is a pixel's width / height."""
    check_size(round(frame.width * aspect), frame.height)
    if any(component.is_alpha for component in frame.format.components):
        image = Image.fromarray(frame.to_ndarray(format="rgba"))
    else:
        image = frame.to_image()
    image = to_rgb(image).resize((round(frame.width * aspect), frame.height))
    return image.rotate(frame.rotation, expand=True)  # by multiples of 90 degrees, exact


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any kind of picture into RGB, alpha on black."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's convert() makes white
        image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
    if image.mode == "RGB":
        return image
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image.convert("RGBA")).convert("RGB")


# --------------------------------------------------------------------------------------------------
# Writing


def check_writable(path: str | Path) -> None:
    """Raise InputError, before any work, if a clip cannot be written there."""
    check_package("pillow", f"--out {path}")
    if Path(path).suffix.lower() == ".mp4":
        check_package("av", f"--out {path}")
    target = Path(os.path.realpath(path))
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(target).st_mode):
                raise IsADirectoryError("it is a directory, or no file")
            open(target, "ab").close()
        folder = next(folder for folder in target.parents if folder.exists())  # others will be made
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror or error}); choose "
                         f"another") from error


def write_clip(path: str | Path, video: Tensor, fps: float) -> None:
    """Write a video (f, 3, h, w) in [-1, 1] as .gif, .webp, .png or .mp4, whole or not at all.

    Delays are whole milliseconds, in a GIF hundredths of a second; a GIF has one palette of 256
    colors for all frames. Raises InputError where it cannot be written.
    """
    target = Path(os.path.realpath(path))  # a link stays, and what it names is written
    suffix = target.suffix.lower()
    f, _, h, w = video.shape
    pixels = ((video.cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (f, h, w, 3)
    part = target.with_name(f".{secrets.token_hex(8)}{suffix}")  # its own in every thread
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".mp4":
            write_mp4(part, pixels, Fraction(fps).limit_denominator(1001))
        else:
            images = [Image.fromarray(frame) for frame in pixels]
            options = {}
            if suffix == ".gif":
                tall = Image.fromarray(pixels.reshape(f * h, w, 3))
                tall = tall.quantize(256, dither=Image.Dither.NONE)
                images = [tall.crop((0, k * h, w, (k + 1) * h)) for k in range(f)]
                options = {"optimize": False}
            if suffix == ".webp":
                options = {"lossless": True}
            tick = 10 if suffix == ".gif" else 1  # milliseconds
            times = np.round(np.arange(f + 1) * 1000 / (tick * fps))
            delays = (tick * np.diff(times)).astype(int).tolist()
            images[0].save(part, save_all=True, append_images=images[1:], duration=delays, loop=0,
                           **options)
        os.replace(part, target)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {path}: cannot be written ({reason}); choose another") from error
    finally:
        with suppress(OSError):
            part.unlink()


def write_mp4(path: Path, pixels: np.ndarray, rate: Fraction) -> None:
    """Write frames (f, h, w, 3) as H.264, or MPEG-4 if av lacks it; odd sizes grow by a pixel."""
    import av

    _, h, w, _ = pixels.shape
    pixels = np.pad(pixels, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
    with av.open(f"file:{path}", "w", options={"movflags": "faststart"}) as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = pixels.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "18"}
        for k, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = k
            frame.time_base = 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_film_strip(path: str | Path, videos: Tensor) -> None:
    """Write clips (n, f, 3, h, w) as one picture, a row of frames for each."""
    write_clip(path, film_strip(videos)[None], fps=1)


def film_strip(videos: Tensor) -> Tensor:
    """Lay clips (n, f, 3, h, w) out as one picture (3, H, W), a row for each clip."""
    return grid(videos.flatten(0, 1)[:, None], videos.shape[1])[0]


def grid(videos: Tensor, columns: int | None = None, gap: int = 2) -> Tensor:
    """Lay clips (n, f, 3, h, w) out as one (f, 3, H, W), near-square, white gaps between."""
    n, f, c, h, w = videos.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = math.ceil(n / columns)
    tiles = videos.new_ones(rows * columns, f, c, h + gap, w + gap)  # white where no clip lies
    tiles[:n, :, :, :h, :w] = videos
    tiles = tiles.unflatten(0, (rows, columns)).permute(2, 3, 0, 4, 1, 5)
    return tiles.reshape(f, c, rows * (h + gap), columns * (w + gap))[..., :-gap, :-gap]
