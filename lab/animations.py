"""Makes a clip folder of 2,107 animated emoji: `python -m lab.animations SRC OUT` (MIT licence).

SRC holds the unpacked npm packages @lobehub/fluent-emoji-anim-1 to -4; captions are the English
names of the package emoji: gender, occupation and skin tone combine. See docs/own_clips.md.
"""

import json
import shutil
import sys
from pathlib import Path

from PIL import Image

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


def main(source: str, out: str) -> None:
    """Copy what moves, and write metadata.jsonl and held_out.txt; needs the package emoji."""
    import emoji

    names = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = "-".join(f"{ord(letter):04x}" for letter in text)
        names[code] = entry["en"].strip(":").replace("_", " ")
    clips = {}
    for path in sorted(Path(source).rglob("*.webp")):
        with Image.open(path) as image:
            if image.n_frames > 1 and path.stem in names:
                clips[path] = names[path.stem]
    folder = Path(out)
    folder.mkdir(parents=True)
    held_out = held_out_captions([*clips.values()])
    rows = []
    for path, caption in clips.items():
        shutil.copy(path, folder)
        rows.append(json.dumps({"file_name": path.name, "text": caption}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows), "utf-8")
    files = [path.name + "\n" for path, caption in clips.items() if caption in held_out]
    (folder / "held_out.txt").write_text("".join(files), "utf-8")
    print(f"{len(clips)} clips in {folder}, {len(files)} of them in held_out.txt")


if __name__ == "__main__":
    main(*sys.argv[1:])
