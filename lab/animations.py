"""Makes folders of animated emoji: `python -m lab.animations SRC CLIPS PICTURES` (MIT licence).

SRC holds the unpacked npm packages @lobehub/fluent-emoji-anim-1 to -4, 3,391 files of which 2,109
move; captions are the English names of the package emoji: gender, occupation and skin tone combine.
See docs/own_clips.md.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

from PIL import Image

from folders import find_clips
from runs import InputError, run_command

GENDERS = ("man", "woman", "person")
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
PEOPLE = {*GENDERS, "men", "women", "people", "family", "tone"}  # words of captions of people


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


def standing_captions(captions: list[str]) -> list[str]:
    """Choose every third of the things: of what is not of people, in any skin tone."""
    people = {caption.removesuffix(f" {tone} skin tone") for caption in captions for tone in TONES
              if caption.endswith(f" {tone} skin tone")}
    return sorted(caption for caption in captions
                  if caption not in people and not PEOPLE.intersection(caption.split()))[::3]


def copy_files(captions: dict[Path, str], folder: Path) -> None:
    """Copy files to a new folder, with their captions in metadata.jsonl."""
    folder.mkdir(parents=True)
    rows = []
    for path, caption in captions.items():
        shutil.copy(path, folder)
        rows.append(json.dumps({"file_name": path.name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))


def main(arguments: list[str] | None = None) -> None:
    """Copy what moves, and stills of everything; needs the package emoji.

    held_out.txt names the clips that stage video shall not see: those of combinations.txt, of which
    there is no picture either, and those of standing_still.txt, whose picture is trained on.
    """
    import emoji

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, help="folder of the unpacked packages")
    parser.add_argument("out", type=Path, help="a new folder, of clips")
    parser.add_argument("pictures", type=Path, nargs="?", help="a new folder, of stills; without "
                        "it nothing is kept standing still")
    flags = parser.parse_args(arguments)
    for folder in filter(None, (flags.out, flags.pictures)):
        if os.path.lexists(folder):
            raise InputError(f"{folder}: is there already; remove it, or name a new folder")
    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(letter):04x}" for letter in text)
        names[code] = entry["en"].strip(":").replace("_", " ")
    captions = {path: names[path.stem] for path in sorted(flags.source.rglob("*.webp"))
                if path.stem in names}
    clips = {}
    for path, caption in captions.items():
        with Image.open(path) as image:
            if image.n_frames > 1:
                clips[path] = caption
    if not clips:
        raise InputError(f"{flags.source}: no animations of the four packages in it; unpack them "
                         f"there")
    lists = {"combinations": {*held_out_captions([*clips.values()])}}
    if flags.pictures:
        copy_files({path: caption for path, caption in captions.items()
                    if caption not in lists["combinations"]}, flags.pictures)
        tenth = {path.name for path in find_clips(flags.pictures, stills=True)[0][9::10]}
        chosen = standing_captions([*clips.values()])
        lists["standing_still"] = {caption for path, caption in clips.items()
                                   if caption in chosen and path.name not in tenth}
    copy_files(clips, flags.out)
    lists = {"held_out": set.union(*lists.values()), **(lists if flags.pictures else {})}
    for name, chosen in lists.items():
        files = [path.name + "\n" for path, caption in clips.items() if caption in chosen]
        (flags.out / f"{name}.txt").write_text("".join(files))
    print(f"{len(clips)} clips in {flags.out}, {len(lists['held_out'])} of them in held_out.txt")
    if flags.pictures:
        print(f"{len([*flags.pictures.glob('*.webp')])} pictures in {flags.pictures}; "
              f"{len(lists['standing_still'])} things that move stand still in them alone")


if __name__ == "__main__":
    run_command("lab.animations", main)
