"""Draws the pipeline with real frames, for the README: `python figure.py clip.webp docs/pipeline.png` (ours).

It reads what `python sample.py "..." --interpolate --upscale --save-stages --out clip.webp` wrote.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data import InputError, read_clip


def pipeline(clip: Path) -> Image.Image:
    """Key frames, below them all frames after interpolation, below these some of them after super-resolution."""
    stages = [read_clip(clip.with_stem(clip.stem + end))[0] for end in ("-keys", "-interpolated", "")]  # (f, h, w, 3)
    keys, between, large = stages
    (f, side), (n, big) = keys.shape[:2], large.shape[:2]
    width, line = n * (side + 2), 44
    sheet = Image.new("RGB", (width, 3 * line + 2 * side + big), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(24), 0
    shown = np.linspace(0, n - 1, width // (big + 2)).astype(int)
    rows = ((f"{f} key frames: latent diffusion, 3D U-Net, VideoVAE", keys, range(0, n, (n - 1) // (f - 1))),
            (f"{n} frames: interpolation, a latent U-Net between every two", between, range(n)),
            (f"{big} x {big} pixels: super-resolution, a U-Net in pixels, frame by frame ({len(shown)} of {n} shown)",
             large[shown], None))
    for text, frames, columns in rows:
        draw.text((4, top + 8), text, "black", font)
        for i, frame in enumerate(frames):
            left = columns[i] * (side + 2) if columns else round(i * (width - big) / (len(frames) - 1))
            sheet.paste(Image.fromarray(frame), (left, top + line))
        top += line + frames.shape[1]
    return sheet


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print("figure.py: give a clip of sample.py --save-stages, and the picture to write", file=sys.stderr)
        sys.exit(2)
    try:
        pipeline(Path(sys.argv[1])).save(sys.argv[2])
    except (InputError, OSError) as error:
        print(f"figure.py: {error}", file=sys.stderr)
        sys.exit(2)
