"""Reads and writes pictures, animations and videos; captions; the store of decoded frames (ours).

A clip is an animation, a video, or a folder of numbered pictures. Frames are uint8 (n, h, w, 3) when
they are read, and float (f, 3, h, w) in [-1, 1] when they are written.
"""

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
from torch import Tensor
from tqdm import tqdm

from runs import InputError

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


# --------------------------------------------------------------------------------------------------
# Which files are clips, and their captions


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


# --------------------------------------------------------------------------------------------------
# The store of decoded frames


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


# --------------------------------------------------------------------------------------------------
# Reading


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


# --------------------------------------------------------------------------------------------------
# Writing


def check_writable(path: Path) -> None:
    """Raise InputError, before any work, if a file cannot be written."""
    try:
        is_new = not path.exists()
        open(path, "ab").close()
        if is_new:
            path.unlink()
    except FileNotFoundError:
        pass  # its folder will be made
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror}); choose "
                         f"another") from error


def write_clip(path: str | Path, video: Tensor, fps: float) -> None:
    """Write a video (f, 3, h, w) in [-1, 1] as .gif, .webp, .png or .mp4, whole or not at all.

    Delays are whole milliseconds, in a GIF hundredths of a second; a GIF has one palette of 256
    colors for all frames. Raises InputError where it cannot be written.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    f, _, h, w = video.shape
    pixels = ((video.cpu().clamp(-1, 1) + 1) * 127.5).round().byte()
    pixels = pixels.permute(0, 2, 3, 1).contiguous().numpy()  # (f, h, w, 3)
    part = path.with_name(f".{os.getpid()}{suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".mp4":
            write_mp4(part, pixels, Fraction(fps).limit_denominator(1001))
        else:
            images = [Image.fromarray(frame) for frame in pixels]
            options = {"blend": 0, "disposal": 1}  # of PNG: keeps equal neighbours
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
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"--out {path}: cannot be written ({reason}); choose another") from error
    finally:
        if part.exists():
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
