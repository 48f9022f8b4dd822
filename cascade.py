"""What follows the key frames (paper §3): interpolation, 16 -> 61 frames, and super-resolution, 256 -> 1024 pixels.

Both are the U-Net of `unet3d.py` under the diffusion of `diffusion.py` again, with other inputs:

    interpolation       three noisy latents, and on the channels beside each the latents of the key frames around them
    super-resolution    in pixels: the noisy difference of a frame and its enlarged small copy; beside it that copy

The paper says that they exist, and little more; what is "ours" here is said so. Read `train.py` next: how all learn.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion import Diffusion, DiffusionConfig, normal
from unet3d import FrameAdaptor, UNet3D, UNetConfig

BETWEEN = 3  # new frames between two key frames: 16 -> 61 (ours: as many as the authors' long demo shows)
FACTOR = 4  # by which super-resolution enlarges height and width (paper: 256 -> 1024)


def beside(unet: UNet3D, seen: Tensor, level: Tensor | None = None) -> Callable:
    """`unet` as a network of z alone, that reads `seen` (b, f, c', h, w) on the channels beside z (b, f, c, h, w)."""
    def network(z: Tensor, t: Tensor, context: Tensor, fps: Tensor | None) -> Tensor:
        return unet(torch.cat([z, seen.to(z)], dim=2), t, context, fps, level)
    return network


def later_diffusion(config: DiffusionConfig) -> Diffusion:
    """The key frames' diffusion for what follows them: all frames equally noisy."""
    return Diffusion(replace(config, frame_lag=0))


# ----------------------------------------------------------------------------------------------------------------------
# Interpolation: F key frames -> 4 F - 3


def interpolation_config(unet: UNetConfig) -> UNetConfig:
    """Sizes of the interpolation network from those of the key frames': three frames, three times the channels in.

    Its mask is "bidirectional": frames in between have a frame after them (ours).
    """
    return replace(unet, in_channels=3 * unet.in_channels, frames=BETWEEN, mask="bidirectional")


@torch.no_grad()
def start_interpolation(unet: UNet3D) -> UNet3D:
    """The interpolation network, started from the key frames': the same weights, new inputs zero (paper §3; ours).

    An adaptor's three scales and shifts are each the mean of those of all key frames.
    """
    network = UNet3D(interpolation_config(unet.config)).to(unet.conv_in.weight)
    weights = unet.state_dict()
    for name, module in network.named_modules():
        if isinstance(module, FrameAdaptor):
            for kind in ("scale", "shift"):
                of_keys = weights[f"{name}.{kind}"]  # (f, c)
                weights[f"{name}.{kind}"] = of_keys.mean(0, keepdim=True).repeat(BETWEEN, 1)
    known = weights["conv_in.weight"]  # (c, 4, 3, 3)
    weights["conv_in.weight"] = torch.cat([known, torch.zeros_like(known).repeat(1, 2, 1, 1)], dim=1)
    network.load_state_dict(weights)
    return network


def around(keys: Tensor) -> Tensor:
    """Key latents (b, f, c, h, w) -> what each frame in between reads, the keys before and after it: one row a gap.

    (b (f-1), 3, 2c, h, w), gaps of one clip behind each other.
    """
    pairs = torch.cat([keys[:, :-1], keys[:, 1:]], dim=2).flatten(0, 1)  # (b (f-1), 2c, h, w)
    return pairs[:, None].expand(-1, BETWEEN, -1, -1, -1)


@torch.no_grad()
def interpolate(unet: UNet3D, diffusion: Diffusion, keys: Tensor, context: Tensor, fps: Tensor, steps: int = 20,
                generators: list[torch.Generator] | None = None,
                progress: Callable = lambda steps: steps) -> Tensor:
    """Key latents (b, f, c, h, w) at `fps` (b,) a second -> (b, 4f-3, c, h, w) at four times the rate (paper §3).

    All gaps of all clips are one batch; key frames stay what they are, bit for bit, at 0, 4, 8 ... Text (context
    (b, l, d)) and FPS are the key frames'; there is no guidance, since two frames say more than a caption (ours).
    Raises ValueError for a single key frame.
    """
    b, f, c, h, w = keys.shape
    if f < 2:
        raise ValueError("one key frame: there is nothing to interpolate between, give two or more")
    gaps = f - 1
    of_gaps = [x.repeat_interleave(gaps, 0) for x in (context, fps)]
    repeated = [g for g in generators for _ in range(gaps)] if generators else None
    between = diffusion.sample(beside(unet, around(keys)), (b * gaps, BETWEEN, c, h, w), of_gaps[0], of_gaps[0],
                               of_gaps[1], "ddim", steps, 1.0, generator=repeated, progress=progress)
    rows = torch.cat([keys[:, :-1, None], between.unflatten(0, (b, gaps))], dim=2)  # (b, f-1, 4, c, h, w)
    return torch.cat([rows.flatten(1, 2), keys[:, -1:]], dim=1)  # (b, 4f-3, c, h, w)


# ----------------------------------------------------------------------------------------------------------------------
# Super-resolution: (h, w) -> (4h, 4w), frame by frame

NOISE_LEVELS = 20  # steps of the schedule to which small frames are noised in training, at most (ours)
NOISE_LEVEL = 1  # the same in sampling: about what a decoded frame differs from a true one (ours)
GAIN = 8  # z_0 = GAIN * (frame - enlarge(noised small frame)): what is missing, made about as large as noise (ours)


def shrink(frames: Tensor) -> Tensor:
    """Frames (b, f, 3, 4h, 4w) -> (b, f, 3, h, w): what a true frame looks like when it is small."""
    return F.avg_pool2d(frames.flatten(0, 1), FACTOR).unflatten(0, frames.shape[:2])


def enlarge(frames: Tensor) -> Tensor:
    """Frames (b, f, 3, h, w) -> (b, f, 3, 4h, 4w), bicubic: what super-resolution starts from and is measured by."""
    large = F.interpolate(frames.flatten(0, 1), scale_factor=float(FACTOR), mode="bicubic")
    return large.unflatten(0, frames.shape[:2])


def noised(small: Tensor, level: Tensor, diffusion: Diffusion, generators: list[torch.Generator]) -> Tensor:
    """Noise augmentation: small frames (b, f, 3, h, w), to step `level` (b,) of the schedule.

    So the network does not trust every speck of the small frame, which is a decoder's and no camera's (Ho et al. 2021).
    """
    return diffusion.add_noise(small, normal(small.shape, generators).to(small), level)


@torch.no_grad()
def upscale(unet: UNet3D, diffusion: Diffusion, video: Tensor, context: Tensor, steps: int = 4, seed: int = 0,
            same_noise: bool = False, tile: int = 0, progress: Callable = lambda steps: steps) -> Tensor:
    """A clip (f, 3, h, w) in [-1, 1] -> (f, 3, 4h, 4w), every frame by itself (paper §3).

    `context` (1, l, d) is the text; there is no guidance. With `same_noise` all frames start from the same noise, so
    that what is made up does not flicker; with `tile` the network sees squares of so many large pixels at a time.
    """
    f, _, h, w = video.shape
    generators = [torch.Generator().manual_seed(seed if same_noise else seed * 1_000_003 + i) for i in range(f)]
    level = torch.tensor([NOISE_LEVEL])
    small = noised(video[:, None], level.expand(f), diffusion, generators)  # (f, 1, 3, h, w)
    seen, level = enlarge(small), level.to(video.device)

    def network(z: Tensor, t: Tensor, context: Tensor, _: None) -> Tensor:
        frames = []
        for i in range(f):  # one after the other: each is as large as many crops
            both = torch.cat([z[i : i + 1], seen[i : i + 1]], dim=2)  # (1, 1, 6, 4h, 4w)
            frames.append(tiled(lambda part: unet(part, t[i : i + 1], context[i : i + 1], None, level), both, tile))
        return torch.cat(frames)

    text = context.expand(f, -1, -1)
    clip = diffusion.sample(network, seen.shape, text, text, None, "ddim", steps, 1.0, generator=generators,
                            progress=progress)
    # frame = enlarge(noised small frame) + z_0 / GAIN
    return (seen + clip / GAIN)[:, 0].clamp(-1, 1)  # (f, 3, 4h, 4w)


def tiled(run: Callable, x: Tensor, tile: int) -> Tensor:
    """run(x) for x (b, f, c, h, w), in squares of `tile` that overlap by half, faded into each other; 0 = at once."""
    h, w = x.shape[-2:]
    if not tile or tile >= max(h, w):
        return run(x)
    total, weights = 0, torch.zeros(h, w).to(x)
    for top in starts(h, tile):
        for left in starts(w, tile):
            place = (..., slice(top, top + tile), slice(left, left + tile))
            part = run(x[place])
            fade = [1 - (2 * torch.arange(n) + 1 - n).abs() / (n + 1) for n in part.shape[-2:]]  # 0 .. 1 .. 0
            fade = torch.outer(*fade).to(x)
            total = total + F.pad(fade * part, (left, w - left - part.shape[-1], top, h - top - part.shape[-2]))
            weights[place] += fade
    return total / weights


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length and overlap by half."""
    return sorted({*range(0, max(length - tile, 0), tile // 2), max(length - tile, 0)})
