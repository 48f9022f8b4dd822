"""Draw the README's pictures: `python -m lab.figures` writes docs/pipeline.png and held-out.webp.

The first is the pipeline (paper §3) with real noise, latents and frames, and the ST block (§3.2.2);
the second is six clips of captions that the model never saw.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import cascade
from data import InputError
from lab.results import run_command
from magicvideo import MagicVideo
from sample import SHIPPED, grid, write_clip

CAPTIONS = ("a yellow triangle moving left", "a blue square moving right",
            "a magenta square moving up", "a green circle moving down",
            "a cyan circle growing", "a white triangle shrinking")
INK, LINE, PAPER = "#1f2d3a", "#51606e", "#f7f9fb"
IMAGE = "#dfe5ec"  # Stable Diffusion's parts
ADAPTOR, TEMPORAL, FPS = "#ffc46b", "#c4b0ff", "#8fdcb8"  # what MagicVideo adds

# The diagram, in pixels of a picture 800 wide, y downwards. Boxes: x, y, width, height, color, text.
BOXES = (
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
    (318, 152, 13, "3D U-Net"), (318, 174, 9, "removes some noise"), (318, 252, 9, "50 steps"),
    (86, 228, 9, "noise"), (528, 228, 9, "latents"), (733, 228, 9, "8 frames"),
    (638, 161, 8, "Video-\nVAE\ndecoder"), (135, 286, 10, "in every level of the U-Net"),
    (158, 328, 9, r"$z_i = S_i\,\mathrm{conv}(z_i) + B_i$"), (112, 421, 9, "step, fps"),
    (512, 281, 9, "text"), (393, 297, 9, "S-Attn: within each frame"),
    (420, 431, 9, "T-Attn: across frames, at each pixel"),
    (702, 297, 9, "frame i reads\nframes 1 to i"), (163, 469, 9, "Stable Diffusion's image model"),
    (539, 469, 9, "added by MagicVideo; each starts without effect"),
)


def draw_pipeline(model: MagicVideo, path: Path) -> None:
    """Draw the way from caption to clip above the ST block, for a width of 800 pixels."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import FancyBboxPatch
    except ImportError as error:
        raise InputError(f"{path}: drawn by matplotlib; pip install matplotlib") from error
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
    video = model.decode(z)[0].cpu()
    tiles = []  # frame (3, h, w), x, y, side
    for i in range(4):
        for x, latents in ((46, noise), (488, z.cpu())):  # three of four channels, as colors
            tiles.append((latents[0, 2 * i, :3] / 2, x + 8 * i, 120 + 8 * i, 58))
        frame = video[i * (len(video) - 1) // 3]
        tiles.append((frame, 684 + 50 * (i % 2), 112 + 50 * (i // 2), 48))
    for zorder, (frame, x, y, side) in enumerate(tiles, 3):
        pixels = (frame.clamp(-1, 1) + 1).movedim(0, -1) / 2
        axes.imshow(pixels, extent=(x, x + side, y + side, y), zorder=zorder)
        axes.add_patch(FancyBboxPatch((x, y), side, side, "square,pad=0", fc="none", ec=PAPER,
                                      zorder=zorder))
    axes.pcolormesh(662 + 10 * np.arange(9), 320 + 10 * np.arange(9), np.tril(np.ones((8, 8))),
                    cmap=ListedColormap([IMAGE, TEMPORAL]), edgecolors="white")
    axes.axis("off")
    axes.set(xlim=(0, 800), ylim=(500, 0), aspect="auto")
    FigureCanvasAgg(figure).print_png(path)


def draw_held_out(model: MagicVideo, path: Path) -> None:
    """Sample the captions, interpolate and upscale the clips, and lay them out over their captions."""
    for stage in cascade.CASCADE_STAGES:
        if stage not in model.cascade:
            raise InputError(f"{path}: the model has no such network; train.py --stage {stage}")
    captions = list(CAPTIONS)
    with torch.no_grad():
        context = model.encode_text(captions)
    keys = model.sample(captions, fps=8, decode=False)
    clips = model.decode(cascade.build(model, "interpolate").sample(keys, context, fps=8))
    clips = cascade.build(model, "upscale").sample(clips, context).cpu()  # (6, f, 3, h, w)
    font = ImageFont.load_default(20)
    tiles = []
    for caption, clip in zip(captions, clips):
        label = Image.new("RGB", (clip.shape[-1], 36), "white")
        ImageDraw.Draw(label).text((label.width / 2, 16), caption, INK, font, "mm")
        pixels = torch.from_numpy(np.array(label)).movedim(-1, 0) / 127.5 - 1  # (3, 36, w)
        tiles.append(torch.cat([clip, pixels.expand(len(clip), -1, -1, -1)], dim=2))
    video = grid(torch.stack(tiles), columns=3, gap=12)
    write_clip(path, torch.cat([video, video[-1:].expand(12, -1, -1, -1)]), fps=16)


def main(arguments: list[str] | None = None) -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description="Draws the README's pictures.")
    parser.add_argument("--checkpoint", default=SHIPPED, help="model.pt (the shipped one)")
    parser.add_argument("--out", default="docs", help="folder of the pictures (docs)")
    flags = parser.parse_args(arguments)
    model = MagicVideo.load(flags.checkpoint)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    draw_pipeline(model, Path(flags.out) / "pipeline.png")
    draw_held_out(model, Path(flags.out) / "held-out.webp")


if __name__ == "__main__":
    run_command(main)
