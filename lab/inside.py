"""Draw what happens inside the shipped model: the pictures of docs/inside.md (ours).

`python -m lab.figures` calls `draw_all`. Each picture is 800 pixels wide.
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from data import ShapesDataset
from diffusion import Diffusion
from magicvideo import MagicVideo
from unet3d import DirectedTemporalAttention, FrameAdaptor, directed_attention, split_heads

PROMPT = "a blue square moving right"
INK, PAPER = "#1f2d3a", "#f7f9fb"


def new_figure(height: float):
    """Make a figure 800 pixels wide and `height` inches of 100 pixels high."""
    from matplotlib.figure import Figure
    return Figure(figsize=(8, height), dpi=100, facecolor=PAPER)


def save(figure, path: Path) -> None:
    """Write a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    FigureCanvasAgg(figure).print_png(path)


def draw_strips(path: Path, rows: list[tuple[str, Tensor]]) -> None:
    """Draw clips (f, 3, h, w) in [-1, 1] as rows of frames, each with its label on the left."""
    figure = new_figure(0.84 * len(rows) + 0.06)
    for n, (label, frames) in enumerate(rows):
        top = 1 - (n + 1) * 0.84 / (0.84 * len(rows) + 0.06)
        height = 0.8 / (0.84 * len(rows) + 0.06)
        figure.text(0.01, top + height / 2, label, size=11, color=INK, va="center")
        for i, frame in enumerate(frames):
            axes = figure.add_axes((0.19 + 0.101 * i, top, 0.1, height))
            axes.imshow(((frame.clamp(-1, 1) + 1) / 2).movedim(0, -1).numpy())
            axes.axis("off")
    save(figure, path)


def draw_maps(path: Path, maps: list[tuple[str, Tensor]], color: str, labels: tuple[str, str],
              lowest: float, highest: float) -> None:
    """Draw matrices side by side, with a scale of their values at the right."""
    figure = new_figure(3.9)
    width = 0.8 / len(maps)
    for n, (title, values) in enumerate(maps):
        axes = figure.add_axes((0.07 + n * (width + 0.02), 0.13, width - 0.04, 0.75))
        drawn = axes.imshow(values.numpy(), cmap=color, vmin=lowest, vmax=highest, aspect="auto",
                            interpolation="nearest")
        axes.set_title(title, size=11, color=INK)
        axes.set_xlabel(labels[0], size=10, color=INK)
        axes.set_ylabel(labels[1] if n == 0 else "", size=10, color=INK)
        axes.set_xticks(range(values.shape[1]), range(1, values.shape[1] + 1))
        axes.tick_params(labelsize=9, colors=INK)
        if values.shape[0] == values.shape[1]:
            axes.set_yticks(range(values.shape[0]), range(1, values.shape[0] + 1))
    scale = figure.colorbar(drawn, cax=figure.add_axes((0.93, 0.13, 0.015, 0.75)))
    scale.ax.tick_params(labelsize=9, colors=INK)
    save(figure, path)


def real_latents(model: MagicVideo) -> Tensor:
    """Encode the first real clip of the prompt at 8 frames a second, (1, f, c, h, w)."""
    clips = ShapesDataset("test", fps=8)
    return model.encode(clips[clips.captions.index(PROMPT)]["video"][None])


@torch.no_grad()
def predict_clean(model: MagicVideo) -> Tensor:
    """Run the U-Net on the real clip without noise, for what hooks see on the way."""
    z0 = real_latents(model)
    t = torch.zeros(1, z0.shape[1], dtype=torch.long)
    return model.unet(z0, t, model.encode_text([PROMPT]), torch.tensor([8.0]))


def add_noise(model: MagicVideo, path: Path) -> None:
    """Show a clip in noise: every frame alike, as in the paper, and staggered."""
    z0 = real_latents(model)
    eps = torch.randn(z0.shape, generator=torch.Generator().manual_seed(0))
    rows = [("clean", model.decode(z0)[0])]
    steps = torch.tensor([300]), torch.tensor([600])
    for t in steps:
        noisy = Diffusion().add_noise(z0, eps, t)
        rows.append((f"every frame\nt = {int(t)}", model.decode(noisy)[0]))
    for t in steps:
        of_frames = model.diffusion.frame_timesteps(t, z0.shape[1])  # (1, f)
        noisy = model.diffusion.add_noise(z0, eps, of_frames.clamp(0, 999))
        rows.append((f"staggered,\nt = {int(t)}", model.decode(noisy)[0]))
    draw_strips(path, rows)


def denoise(model: MagicVideo, path: Path) -> None:
    """Show the clip that the network expects after some of the 20 steps of sampling."""
    diffusion = model.diffusion
    expected = []
    predict = diffusion.predict_z0_eps

    def keep(z: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Keep z_0_hat of a step on its way."""
        z0_hat, eps_hat = predict(z, output, t)
        expected.append(z0_hat)
        return z0_hat, eps_hat

    diffusion.predict_z0_eps = keep
    clip = model.sample(PROMPT, seed=0)[0]
    del diffusion.predict_z0_eps  # the class's own again
    draw_strips(path, [*((f"after step {n}", model.decode(expected[n - 1])[0])
                         for n in (1, 4, 7, 10, 14)), ("the sample", clip)])


def attention(model: MagicVideo, path: Path) -> None:
    """Show what the frames read of each other: one head, strict, literal and without a mask."""
    layer = [layer for layer in model.unet.modules()
             if isinstance(layer, DirectedTemporalAttention)][0]
    seen = []
    handle = layer.norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    predict_clean(model)
    handle.remove()
    with torch.no_grad():
        tokens = seen[0].flatten(0, 2)  # (b*h*w, f, c)
        q, k = (split_heads(project(tokens), layer.heads)[:, :1]
                for project in (layer.to_q, layer.to_k))
        v = torch.eye(tokens.shape[1]).expand(len(tokens), 1, -1, -1)  # A V = A
        maps = [(mask, directed_attention(q, k, v, mask).mean((0, 1)))
                for mask in ("strict", "literal", "bidirectional")]
    draw_maps(path, maps, "Purples", ("frame that is read", "frame that reads"), 0, 1)


def adaptors(model: MagicVideo, path: Path) -> None:
    """Show how far each adaptor's scales and shifts have moved from 1 and 0, by frame."""
    layers = []  # in the order in which they run
    handles = [layer.register_forward_hook(lambda layer, *_: layers.append(layer))
               for layer in model.unet.modules() if isinstance(layer, FrameAdaptor)]
    predict_clean(model)
    for handle in handles:
        handle.remove()
    scales = torch.stack([(layer.scale.detach() - 1).square().mean(1).sqrt() for layer in layers])
    shifts = torch.stack([layer.shift.detach().square().mean(1).sqrt() for layer in layers])
    maps = [("scale, distance from 1", scales), ("shift, distance from 0", shifts)]
    draw_maps(path, maps, "YlOrBr", ("frame", "adaptor, in the order in which they run"), 0,
              float(torch.stack([scales, shifts]).quantile(0.99)))


def rates(model: MagicVideo, path: Path) -> None:
    """Show the same prompt and seed at three frame rates."""
    draw_strips(path, [(f"{fps} fps", model.sample(PROMPT, fps, seed=1)[0])
                       for fps in (4, 8, 16)])


def guidance(model: MagicVideo, path: Path) -> None:
    """Show the same prompt and seed under four weights of guidance."""
    draw_strips(path, [(f"guidance {weight:g}", model.sample(PROMPT, guidance=weight, seed=1)[0])
                       for weight in (1, 2, 4, 7.5)])


def branches(model: MagicVideo, path: Path) -> None:
    """Show the clip of both branches, and of each alone: the other adds nothing."""
    rows = [("both branches", model.sample(PROMPT, seed=1)[0])]
    weights = {name: p.clone() for name, p in model.unet.state_dict().items()}
    for label, ends in (("spatial alone", ".to_out."), ("temporal alone", ".proj_out.")):
        for name, p in model.unet.named_parameters():
            if ends in name and (label == "temporal alone" or "temporal" in name):
                nn.init.zeros_(p)
        rows.append((label, model.sample(PROMPT, seed=1)[0]))
        model.unet.load_state_dict(weights)
    draw_strips(path, rows)


def latents(model: MagicVideo, path: Path) -> None:
    """Show the four channels of a clip's latents, darkest and lightest at 3 deviations."""
    z0 = real_latents(model)
    rows = [("pixels", model.decode(z0)[0])]
    for c in range(z0.shape[2]):
        channel = z0[0, :, c : c + 1].repeat(1, 3, 1, 1) / 3
        rows.append((f"channel {c + 1}", channel))
    draw_strips(path, rows)


def draw_all(model: MagicVideo, folder: Path) -> None:
    """Draw every picture of docs/inside.md, each named after its function."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (add_noise, denoise, attention, adaptors, rates, guidance, branches, latents):
        draw(model, folder / f"{draw.__name__}.png")
