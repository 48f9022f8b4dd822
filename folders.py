"""Finds the clips of a folder and their captions, and decodes them once (ours).

`clip_files.py` reads a single clip.
"""

import csv
import hashlib
import io
import json
import os
import secrets
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from clip_files import (ANIMATIONS, STILLS, VIDEOS, check_package, natural_key, numbered_images,
                        read_clip)
from runs import InputError, is_run, usable_cores

TABLES = (".jsonl", ".csv", ".tsv", ".json")  # named metadata, captions or prompts
NAME_COLUMNS = ("file_name", "filename", "file", "name", "video", "clip", "path")
TEXT_COLUMNS = ("text", "caption", "prompt", "description")
STORE_FORMAT = 1  # of the stored frames; a new one is another store
SAVE_SECONDS = 10  # of decoding, at most, are lost when a process is killed


# --------------------------------------------------------------------------------------------------
# Which files are clips


def find_clips(folder: Path, stills: bool = False) -> tuple[list[Path], list[Path], list[Path]]:
    """List the clips of a folder at any depth, its other files, and what is passed over.

    The first two are in natural order. Hidden files, folders of macOS, folders of runs, and folders
    that are linked twice are passed over. A subfolder that may not be read counts as a clip: its
    reading says why. With `stills` every picture counts, and nothing else. Raises InputError where
    there is none.
    """
    flag, kind = ("--images", "pictures") if stills else ("--data", "clips")
    if not os.path.isdir(folder):
        raise InputError(f"{flag} {folder}: no such folder; name one that holds {kind}")
    clips = []
    others = []
    passed_over = []
    folders = [folder]
    seen = set()  # links can go round
    for parent in folders:  # grows on the way
        if parent.resolve() in seen:
            passed_over.append(parent)
            continue
        seen.add(parent.resolve())
        try:
            entries = [*parent.iterdir()]
        except OSError:
            clips.append(parent)
            continue
        for entry in entries:
            is_folder = os.path.isdir(entry)
            is_hidden = entry.name.startswith(".") or entry.name == "__MACOSX"
            if is_hidden or is_folder and is_run(entry):
                passed_over.append(entry)
            elif is_folder and (stills or not is_numbered(entry)):
                folders.append(entry)
            elif is_folder or (is_still(entry) if stills else is_moving(entry)):
                clips.append(entry)
            else:
                others.append(entry)
    if not clips:
        wanted = ", ".join(STILLS if stills else ANIMATIONS + VIDEOS)
        wanted += "" if stills else " or folders of numbered pictures"
        raise InputError(f"{flag} {folder}: no {kind} in it; put {wanted} there")
    return sorted(clips, key=natural_key), sorted(others, key=natural_key), passed_over


def is_moving(file: Path, if_damaged: bool = True) -> bool:
    """Return whether a file is a clip; a single still beside the clips is a cover.

    For a PNG or WebP that cannot be opened, returns `if_damaged`.
    """
    suffix = file.suffix.lower()
    if os.path.exists(file) and not os.path.isfile(file):  # to read a pipe would wait for ever
        return False
    if suffix not in (".png", ".webp"):
        return suffix in ANIMATIONS + VIDEOS
    try:
        with Image.open(file) as image:
            return getattr(image, "is_animated", False)
    except Exception:  # its decoder will say what is wrong
        return if_damaged


def is_still(file: Path) -> bool:
    """Tell a picture from another file; of one that moves the first frame is read."""
    is_file = os.path.isfile(file) or not os.path.exists(file)  # reading a broken link says so
    return is_file and file.suffix.lower() in STILLS


def is_numbered(folder: Path) -> bool:
    """Tell a clip of numbered pictures from a folder that holds clips, or that may not be read."""
    try:
        images = numbered_images(folder)
        others = {file for file in folder.iterdir() if file.name[0] != "."} - {*images}
    except OSError:
        return False
    return len(images) > 1 and not any(is_moving(file, if_damaged=False)
                                       for file in [*others, *images[:3], images[-1]])


# --------------------------------------------------------------------------------------------------
# Captions


def read_captions(folder: Path, clips: list[Path],
                  others: list[Path]) -> tuple[list[str], list[Path], list[str]]:
    """Read the caption of every clip, white space made single blanks; "" where there is none.

    A caption comes from a table named metadata, captions or prompts, with a file name and a text in
    each row; else from NAME.txt or NAME.caption beside the clip or in a folder captions. A clip of
    several captions has its first. Returns the captions, the files that were not read, and notes.
    Raises InputError for a row that cannot be right, or that names a file outside the folder.
    """
    tables = [file for file in others if file.suffix.lower() in TABLES
              and file.stem.lower() in ("metadata", "captions", "prompts")]
    captions, notes = read_tables(tables, folder, clips)
    read = {*tables}
    texts = {loose_name(file): file for file in others}
    for clip in clips:
        stem = without_suffix(clip)
        places = [f"{stem}.txt", f"{stem}.caption", f"{stem.parent}/captions/{stem.name}.txt",
                  f"{stem.parent.parent}/captions/{stem.name}.txt"]
        found = [texts[name] for name in map(loose_name, places) if name in texts]
        read |= {*found}
        if found and not captions[clip]:
            captions[clip] = read_text(found[0])
    texts = [text.encode("utf-8", "replace").decode() for text in captions.values()]
    return [" ".join(text.split()) for text in texts], [f for f in others if f not in read], notes


def read_tables(tables: list[Path], folder: Path,
                clips: list[Path]) -> tuple[dict[Path, str], list[str]]:
    """Read the captions of clips from tables, "" where there is none, and notes."""
    by_name = {}
    for clip in clips:
        for name in {loose_name(clip), loose_name(without_suffix(clip))}:
            by_name.setdefault(name, []).append(clip)
    captions = dict.fromkeys(clips, "")
    more = 0
    not_clips = []
    for table in tables:
        for line, name, texts in read_table(table):
            place = f"{table}: line {line}: {name!r:.100}"
            clip = find_clip(name, table.parent, folder, by_name, place)
            if clip is None:
                not_clips.append(place)
                continue
            for text in filter(None, texts):
                captions[clip] = captions[clip] or text
                more += text != captions[clip]
    notes = []
    if more:
        notes.append(f"{more} captions are not used: of several the first is the clip's")
    if not_clips:
        notes.append(f"{not_clips[0]} is no clip; {len(not_clips)} such lines passed over")
    return captions, notes


def find_clip(name: str, parent: Path, folder: Path, by_name: dict[str, list[Path]],
              place: str) -> Path | None:
    """Find the clip that a row of a table in `parent` names; None for another file of the folder.

    Raises InputError, which begins with `place`, for several clips and for no file of the folder.
    """
    path = Path(os.path.abspath(parent / name))
    if not os.path.exists(path):  # as Windows or a spreadsheet writes it
        path = Path(os.path.abspath(parent / name.strip().replace("\\", "/")))
    found = by_name.get(loose_name(path), [])
    found = [clip for clip in found if os.path.abspath(clip) == str(path)] or found
    if len(found) > 1:
        raise InputError(f"{place} may be {' or '.join(clip.name for clip in found)}; write the "
                         f"whole name")
    if not found and not os.path.exists(path):
        raise InputError(f"{place} is no clip in this folder; add it or remove the line")
    if not found and not path.is_relative_to(os.path.abspath(folder)):
        raise InputError(f"{place} lies outside {folder}; move it there or remove the line")
    return found[0] if found else None


def without_suffix(clip: Path) -> Path:
    """Return the path of a clip without the suffix of a file; a folder has none."""
    return clip if os.path.isdir(clip) else clip.with_suffix("")


def loose_name(path: str | Path) -> str:
    """Make names equal that differ in case, in the form of their accents, or in slashes."""
    path = os.path.abspath(str(path).replace("\\", "/"))
    return unicodedata.normalize("NFC", path).casefold()


def read_text(file: Path) -> str:
    """Read a text file in UTF-8, or in UTF-16 where it says so; InputError for another."""
    try:
        raw = file.read_bytes()
        return raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); correct it") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: its encoding is not UTF-8 (byte {error.start} is "
                         f"{raw[error.start]:#x}); save it as UTF-8") from error


def read_lines(file: Path) -> list[str]:
    """Read the lines of a text file that are not blank, without white space around them."""
    return [line.strip() for line in read_text(file).split("\n") if line.strip()]


EXTRA = "\0"  # the key of what a row of a .csv has beyond its columns


def read_table(table: Path) -> Iterator[tuple[int, str, list[str]]]:
    """Read the rows of a .csv, .tsv, .jsonl or .json file: line number, file name, captions.

    A row may have one caption, a list of them, or null for none. Raises InputError for another.
    """
    text = read_text(table)
    line = 1
    rows = []
    try:
        if table.suffix.lower() in (".csv", ".tsv"):
            delimiter = max(",;\t", key=text.partition("\n")[0].count)
            reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter,
                                    restkey=EXTRA, restval=0)
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
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        raise InputError(f"{table}: line {line} cannot be read ({error.msg}); correct "
                         f"it") from error
    except (ValueError, TypeError, RecursionError, csv.Error) as error:
        raise InputError(f"{table}: line {line} cannot be read ({error}); correct it") from error
    for line, row in rows:
        row = row if isinstance(row, dict) else {}
        row = {key.strip().lower(): value for key, value in row.items()}
        name = next((row[column] for column in NAME_COLUMNS if column in row), None)
        texts = next((row[column] for column in TEXT_COLUMNS if column in row), 0)
        if texts is None or texts != texts:  # null, or NaN as pandas writes it
            texts = []
        texts = texts if isinstance(texts, list) else [texts]
        is_text = all(isinstance(text, str) for text in [name, *texts])
        if not name or not is_text or EXTRA in row:
            found = ", ".join(f"{' '.join(key.split()):.40}: {value!r:.40}"
                              for key, value in row.items())
            raise InputError(f"{table}: line {line} must have file_name and text (in quotes where "
                             f"it has commas); it has {found or 'neither':.200}")
        yield line, name, texts


# --------------------------------------------------------------------------------------------------
# The store of decoded frames


class Decoded(NamedTuple):
    """Where the frames of a clip lie among all decoded ones, or why it could not be read."""

    start: int
    total: int
    rate: float  # frames a second
    problem: str = ""


def decode_once(folder: Path, clips: list[Path], size: int, store: str | Path | None,
                max_frames: int) -> tuple[np.ndarray, list[Decoded], Path]:
    """Decode all clips into one memory-mapped array, or reuse the stored one.

    Returns the pixels, uint8 (n, size, size, 3), where each clip lies in them, and their file.
    `store` is a folder, None for a temporary one. One process decodes, the others wait. Where there
    are no locks (Windows, some networks) every process decodes to a temporary store of its own.
    """
    check_package("pillow", folder)
    if any(clip.suffix.lower() in VIDEOS for clip in clips):
        check_package("av", folder)
    try:
        if store is not None:
            name = hash_of(STORE_FORMAT, os.path.realpath(folder), size, max_frames)
            Path(store).mkdir(parents=True, exist_ok=True)
            with open(Path(store) / f"{name}.lock", "a") as lock:
                if lock_file(lock, f"{folder}: waiting for another process that decodes it"):
                    return fill_store(Path(store) / name, folder, clips, size, max_frames)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            # the mapping outlives the name of its file
            return fill_store(Path(temporary) / "frames", folder, clips, size, max_frames)
    except OSError as error:
        place = store or tempfile.gettempdir()
        raise InputError(f"--frame-store {place}: the frames of {folder} cannot be written "
                         f"({error.strerror or error}); make room or choose another") from error


def lock_file(file, waiting: str) -> bool:
    """Wait, and say so, until no other process holds the file; False where there are no locks."""
    try:
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(waiting, flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except (ImportError, OSError):
        return False


def fill_store(place: Path, folder: Path, clips: list[Path], size: int,
               max_frames: int) -> tuple[np.ndarray, list[Decoded], Path]:
    """Decode the clips that a store lacks, those too that could not be read the last time."""
    keys = [clip_key(clip, folder) for clip in clips]
    store = FrameStore(place, size, keys)
    missing = [(key, clip) for key, clip in zip(keys, clips) if key not in store.clips]
    problems = {}
    cores = usable_cores()
    at_once = max(1, min(4 * cores, 2**31 // (store.frame_bytes * max_frames)))  # in 2 GB
    decode = partial(decode_clip, size=size, max_frames=max_frames)
    done = 0
    saved = time.monotonic()
    bar = tqdm(missing, f"decoding {folder}", unit="clip", disable=None if missing else True)
    try:
        with ThreadPool(min(at_once, cores)) as pool, bar:
            for first in range(0, len(missing), at_once):
                part = missing[first : first + at_once]
                decoded = pool.imap(decode, [clip for _, clip in part])
                for (key, _), (frames, rate, problem) in zip(part, decoded):
                    if frames is None:
                        problems[key] = Decoded(0, 0, 0.0, problem)
                    else:
                        store.add(key, frames, rate)
                    done += 1
                    bar.update()
                    if time.monotonic() > saved + SAVE_SECONDS:
                        store.save()
                        saved = time.monotonic()
                        if bar.disable:  # not on a console
                            print(f"{folder}: {done} of {len(missing)} clips decoded", flush=True)
    finally:
        if missing:
            store.save()
    return store.frames(), [problems.get(key) or store.clips[key] for key in keys], store.pixels


class FrameStore:
    """A file of pixels, to which clips are only added: other trainings may have mapped it.

    Its index is replaced whole. What lies behind the clips of the index was left by a process that
    was killed, and is overwritten. If over three quarters of the frames are of clips that are gone,
    a new file is begun. Files of this store that its index does not name are removed.
    """

    def __init__(self, place: Path, size: int, keys: list[str]):
        self.index = place.with_suffix(".index")
        self.pixels = place.with_suffix(f".{secrets.token_hex(4)}.u8")
        self.size = size
        self.frame_bytes = size * size * 3
        self.clips = {}
        self.end = 0  # of the last clip, in frames
        # there is no index, or it is damaged
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            index = json.loads(self.index.read_text())
            clips = {key: Decoded(*values) for key, values in index["clips"].items()}
            pixels = place.with_name(index["pixels"])
            end = sum(clip.total for clip in clips.values())
            used = sum(clips[key].total for key in keys if key in clips)
            if pixels.stat().st_size >= end * self.frame_bytes and end <= 4 * used:
                self.pixels, self.clips, self.end = pixels, clips, end
        for file in place.parent.glob(f"{place.name}.*"):
            if file.suffix in (".u8", ".part") and file != self.pixels:
                with suppress(OSError):  # another user's
                    file.unlink()

    def add(self, key: str, frames: np.ndarray, rate: float) -> None:
        """Write the frames (n, size, size, 3) of a clip behind the others."""
        with open(self.pixels, "r+b" if self.clips else "wb") as file:
            file.seek(self.end * self.frame_bytes)
            file.write(frames)
        self.clips[key] = Decoded(self.end, len(frames), rate)
        self.end += len(frames)

    def save(self) -> None:
        """Replace the index; the frames that it names are on the disk before."""
        with open(self.pixels, "ab") as file:
            file.truncate(self.end * self.frame_bytes)  # half a clip, where the disk was full
            os.fsync(file.fileno())
        part = self.index.with_suffix(f".{secrets.token_hex(4)}.part")
        part.write_text(json.dumps({"pixels": self.pixels.name, "clips": self.clips}))
        os.replace(part, self.index)

    def frames(self) -> np.ndarray:
        """Map the frames (n, size, size, 3) of all clips."""
        shape = (self.end, self.size, self.size, 3)
        return np.memmap(self.pixels, np.uint8, "r", shape=shape) if self.end else np.zeros(shape)


def clip_key(clip: Path, folder: Path) -> str:
    """Name a clip by the names, sizes, times of change and first 4 KiB of its files."""
    states = []
    with suppress(OSError):  # reading the clip will say what is wrong
        for file in numbered_images(clip) if os.path.isdir(clip) else [clip]:
            with open(file, "rb") as opened:
                state = os.stat(opened.fileno())
                head = hashlib.sha256(opened.read(4096)).hexdigest()
            states.append((file.name, state.st_size, state.st_mtime_ns, head))
    return hash_of(clip.relative_to(folder).as_posix(), states)


def hash_of(*values) -> str:
    """Hash values to 16 hexadecimal digits."""
    return hashlib.sha256(ascii(values).encode()).hexdigest()[:16]


def decode_clip(clip: Path, size: int, max_frames: int) -> tuple[np.ndarray | None, float, str]:
    """Read a clip -> its frames, their rate, and ""; or None, 0 and why it cannot be read."""
    try:
        return *read_clip(clip, size, max_frames), ""
    except InputError as error:
        reason = str(error).removeprefix(f"{clip}: ")
        return None, 0.0, reason.removesuffix("; replace or remove it")
