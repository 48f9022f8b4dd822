"""Draw the pictures of the pages: `python -m lab.figures` writes them to docs/ (ours).

pipeline.png shows the pipeline (paper §3) with real noise, latents and frames, and the ST block
(§3.2.2); held-out.webp clips of captions that the model never saw, by seed 0; inside/ what happens
inside the model, see `inside.py`.
"""

import argparse
from pathlib import Path

from lab.results import run_command  # before torch: sets how threads wait

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import cascade
from lab import inside
from magicvideo import MagicVideo
from sample import SHIPPED

CAPTIONS = ("a yellow triangle moving left", "a blue square moving right",
            "a magenta square moving up", "a green circle moving down",
            "a cyan circle growing", "a white triangle shrinking")
INK, LINE, PAPER = "#1f2d3a", "#51606e", "#f7f9fb"
IMAGE = "#dfe5ec"  # Stable Diffusion's parts
ADAPTOR, TEMPORAL, FPS = "#ffc46b", "#c4b0ff", "#8fdcb8"  # what MagicVideo adds

# The diagram, in pixels of a picture 800 wide, y downwards.
BOXES = (  # x, y, width, height, color, text
    (4, 4, 792, 492, PAPER, ""), (24, 268, 752, 176, "white", ""),
    (24, 26, 142, 42, "white", "“a blue square\nmoving right”"),
    (196, 26, 116, 42, IMAGE, "CLIP\ntext encoder"), (324, 26, 116, 42, FPS, "FPS\nembedding"),
    (470, 26, 62, 42, "white", "8 fps"), (68, 343, 88, 46, IMAGE, "3 x 3\nconvolution"),
    (174, 343, 72, 46, ADAPTOR, "frame\nadaptor"), (290, 309, 76, 46, IMAGE, "self-\nattention"),
    (384, 309, 72, 46, ADAPTOR, "frame\nadaptor"), (474, 309, 76, 46, IMAGE, "cross-\nattention"),
    (290, 374, 260, 46, TEMPORAL, "directed temporal attention"), (582, 357, 18, 18, "white", "+"),
    (40, 461, 16, 16, IMAGE, ""), (316, 461, 16, 16, ADAPTOR, ""),
    (337, 461, 16, 16, TEMPORAL, ""), (358, 461, 16, 16, FPS, ""),
)
FUNNELS = (  # color, x and y of corners: the U-Net, the decoder and its temporal layers
    (IMAGE, (196, 300, 336, 440, 440, 336, 300, 196), (106, 130, 130, 106, 216, 192, 192, 216)),
    (IMAGE, (592, 668, 668, 592), (132, 112, 210, 190)),
    (TEMPORAL, (600, 607, 607, 600), (130, 128, 194, 192)),
)
ARROWS = (  # each through these points
    ((166, 47), (196, 47)), ((470, 47), (440, 47)), ((254, 68), (254, 118)),
    ((382, 68), (382, 118)), ((140, 161), (196, 161)), ((440, 161), (486, 161)),
    ((572, 161), (592, 161)), ((668, 161), (684, 161)),
    ((462, 161), (462, 238), (168, 238), (168, 163)), ((40, 366), (68, 366)),
    ((156, 366), (174, 366)), ((246, 366), (268, 366), (268, 332), (290, 332)),
    ((268, 366), (268, 397), (290, 397)), ((366, 332), (384, 332)), ((456, 332), (474, 332)),
    ((550, 332), (591, 332), (591, 357)), ((550, 397), (591, 397), (591, 375)),
    ((600, 366), (634, 366)), ((512, 290), (512, 309)), ((112, 411), (112, 389)),
)
TEXTS = (  # x, y, size, text
    (318, 152, 13, "3D U-Net"), (318, 174, 9, "removes some noise"), (318, 252, 9, "20 steps"),
    (86, 228, 9, "noise"), (528, 228, 9, "latents"), (733, 228, 9, "8 frames"),
    (638, 161, 8, "Video-\nVAE\ndecoder"), (135, 286, 10, "in the levels of the U-Net"),
    (158, 328, 9, r"$z_i = S_i\,\mathrm{conv}(z_i) + B_i$"), (112, 421, 9, "step, fps"),
    (512, 281, 9, "text"), (393, 297, 9, "S-Attn: within each frame"),
    (420, 431, 9, "T-Attn: across frames, at each location"),
    (702, 297, 9, "frame i reads\nframes 1 to i"), (163, 469, 9, "Stable Diffusion's image model"),
    (539, 469, 9, "added by MagicVideo; each starts without effect"),
)


def draw_pipeline(model: MagicVideo, path: Path) -> None:
    """Draw the way from caption to clip above the ST block, for a width of 800 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

    figure = Figure(figsize=(8, 5), dpi=200, facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    style = {"color": INK, "ha": "center", "va": "center"}
    for x, y, w, h, color, text in BOXES:
        corners = f"round,pad=0,rounding_size={min(6, h / 4)}"
        axes.add_patch(FancyBboxPatch((x, y), w, h, corners, fc=color, ec=LINE))
        axes.text(x + w / 2, y + h / 2, text, size=9, **style)
    for color, x, y in FUNNELS:
        axes.fill(x, y, fc=color, ec=LINE)
    for *line, end in ARROWS:
        axes.plot(*zip(*line), color=LINE, lw=1.3)
        head = {"arrowstyle": "-|>", "color": LINE, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", end, line[-1], arrowprops=head)
    for x, y, size, text in TEXTS:
        axes.text(x, y, text, size=size, **style)

    z = model.sample(CAPTIONS[1], seed=2, decode=False)  # (1, f, 4, h, w)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    video = model.decode(z)[0]
    tiles = []  # frame (3, h, w), x, y, side; of latents three channels, as colors
    for i in range(4):
        tiles.append((noise[0, i, :3] / 2, 46 + 8 * i, 120 + 8 * i, 58))
        tiles.append((z[0, 2 * i, :3] / 2, 488 + 8 * i, 120 + 8 * i, 58))
        tiles.append((video[7 * i // 3], 684 + 50 * (i % 2), 112 + 50 * (i // 2), 48))
    for zorder, (frame, x, y, side) in enumerate(tiles, 3):
        pixels = (frame.clamp(-1, 1) + 1).movedim(0, -1) / 2
        axes.imshow(pixels, extent=(x, x + side, y + side, y), zorder=zorder)
        axes.add_patch(Rectangle((x, y), side, side, fill=False, ec=PAPER, zorder=zorder))
    axes.pcolormesh(662 + 10 * np.arange(9), 320 + 10 * np.arange(9), np.tril(np.ones((8, 8))),
                    cmap=ListedColormap([IMAGE, TEMPORAL]), edgecolors="white")
    axes.axis("off")
    axes.set(xlim=(0, 800), ylim=(500, 0), aspect="auto")
    FigureCanvasAgg(figure).print_png(path)


def draw_held_out(model: MagicVideo, path: Path) -> None:
    """Sample the captions, upscale the clips, and write the captions under them."""
    with torch.no_grad():
        context = model.encode_text(list(CAPTIONS))
    clips = model.sample(list(CAPTIONS), fps=8, seed=0)
    clips = cascade.build(model, "upscale").sample(clips, context)  # (6, f, 3, h, w)
    pixels = (127.5 * (clips + 1)).round().byte().movedim(2, -1).numpy()  # (6, f, h, w, 3)
    side = clips.shape[-1]
    sheets = []
    for frames in pixels.swapaxes(0, 1):
        sheet = Image.new("RGB", (3 * side + 48, 2 * side + 96), PAPER)
        for i, (frame, caption) in enumerate(zip(frames, CAPTIONS)):
            x = 12 + i % 3 * (side + 12)
            y = 12 + i // 3 * (side + 44)
            sheet.paste(Image.fromarray(frame), (x, y))
            font = ImageFont.load_default(19)
            ImageDraw.Draw(sheet).text((x + side / 2, y + side + 18), caption, INK, font, "mm")
        sheets.append(sheet)
    sheets[0].save(path, save_all=True, append_images=sheets[1:], loop=0, quality=80,
                   duration=[125] * (len(sheets) - 1) + [800])  # milliseconds


def main(arguments: list[str] | None = None) -> None:
    """Draw all pictures with the shipped model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs", help="folder of the pictures (docs)")
    flags = parser.parse_args(arguments)
    model = MagicVideo.load(SHIPPED)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    draw_pipeline(model, Path(flags.out) / "pipeline.png")
    draw_held_out(model, Path(flags.out) / "held-out.webp")
    inside.draw_all(model, Path(flags.out) / "inside")


if __name__ == "__main__":
    run_command("lab.figures", main)
