"""Makes a clip folder of 2,109 animated emoji: `python -m lab.animations SRC OUT` (MIT licence).

SRC holds the unpacked npm packages @lobehub/fluent-emoji-anim-1 to -4; captions are the English
names of the package emoji: gender, occupation and skin tone combine. See docs/own_clips.md.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from PIL import Image

from runs import InputError, run_command

GENDERS = ("man", "woman", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


def split_caption(caption: str) -> tuple[str, str, str] | None:
    """Split "woman health worker dark skin tone" -> (what, gender, tone), or None for another."""
    name, _, tone = caption.removesuffix(" skin tone").rpartition(" ")
    gender, _, what = name.partition(" ")
    if name.endswith((" medium", " light")):
        return None  # two people of two tones
    return (what, gender, tone) if what and gender in GENDERS and tone in TONES else None


def held_out_captions(captions: list[str]) -> list[str]:
    """Choose a tenth of the combinations; every word of them stays in the others."""
    combinations = {caption: split_caption(caption) for caption in captions}
    kinds = sorted({parts[0] for parts in combinations.values() if parts})
    return [caption for caption, parts in combinations.items() if parts and (
        3 * kinds.index(parts[0]) + 5 * GENDERS.index(parts[1]) + TONES.index(parts[2])) % 10 == 0]


def main(arguments: list[str] | None = None) -> None:
    """Copy what moves, and write metadata.jsonl and held_out.txt; needs the package emoji."""
    import emoji

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the unpacked packages")
    parser.add_argument("out", type=Path, help="a new folder")
    flags = parser.parse_args(arguments)
    if os.path.lexists(flags.out):
        raise InputError(f"{flags.out}: is there already; remove it, or name a new folder")
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(letter):04x}" for letter in text)
        names[code] = entry["en"].strip(":").replace("_", " ")
    clips = {}
    for path in sorted(flags.source.rglob("*.webp")):
        with Image.open(path) as image:
            if image.n_frames > 1 and path.stem in names:
                clips[path] = names[path.stem]
    if not clips:
        raise InputError(f"{flags.source}: no animations of the four packages in it; unpack them "
                         f"there")
    flags.out.mkdir(parents=True)
    held_out = held_out_captions([*clips.values()])
    rows = []
    for path, caption in clips.items():
        shutil.copy(path, flags.out)
        rows.append(json.dumps({"file_name": path.name, "text": caption}) + "\n")
    (flags.out / "metadata.jsonl").write_text("".join(rows))
    files = [path.name + "\n" for path, caption in clips.items() if caption in held_out]
    (flags.out / "held_out.txt").write_text("".join(files))
    print(f"{len(clips)} clips in {flags.out}, {len(files)} of them in held_out.txt")


if __name__ == "__main__":
    run_command("lab.animations", main)
