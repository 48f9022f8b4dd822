"""After the key frames (paper §3): interpolation, 16 -> 61 frames; super-resolution, 256 -> 1024
pixels. Both are the U-Net of `unet3d.py` under diffusion again, with a concatenated condition:

    Interpolator   a noisy residual of three latents; condition: the adjacent key frames' latents
    Upscaler       a noisy residual in pixels; condition: bicubic upsampling of the small frame

The paper says that they exist, and little more: sizes, inputs and losses are ours. Both begin
sampling at pure noise and predict v (`tiny.VDiffusion`), since they sample in a few steps. Their
losses take the random numbers of a step from `draw`, a `stages.Draw`. Read `stages.py` next.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from diffusion import seeded_randn
from magicvideo import MagicVideo
from tiny import VDiffusion
from unet3d import TimestepEmbedding, UNet3D, UNetConfig

CASCADE_STAGES = ("interpolate", "upscale")


def build(model: MagicVideo, stage: str) -> nn.Module:
    """Build the network of a cascade stage, with the weights saved in `model` if there are any."""
    network = Interpolator(model) if stage == "interpolate" else Upscaler(model)
    if stage in model.cascade:
        network.load_state_dict(model.cascade[stage])
    return network.to(model.device).eval()


def with_condition(unet: UNet3D, condition: Tensor, level: Tensor | None = None) -> Callable:
    """Make a network of z (b, f, c, h, w) that reads `condition` (b, f, c', h, w) as channels."""
    def network(z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        z = torch.cat([z, condition.to(z)], dim=2)
        return unet(z, t, context, fps if level is None else level)
    return network


# --------------------------------------------------------------------------------------------------
# Interpolation: f key frames -> 4 f - 3 frames

NEW_FRAMES = 3  # between two key frames: 16 -> 61, as many as the authors' long demo shows
LATENT_SCALE = 4  # z_0 = LATENT_SCALE * (latents - cross-fade): about as large as noise


def adjacent_key_frames(keys: Tensor) -> Tensor:
    """List the key frames around each gap: keys (b, f, c, h, w) -> (b (f-1), 3, 2c, h, w).

    The gaps of a clip are consecutive rows, and its three new frames have the same condition.
    """
    pairs = torch.cat([keys[:, :-1], keys[:, 1:]], dim=2).flatten(0, 1)  # (b (f-1), 2c, h, w)
    return pairs[:, None].expand(-1, NEW_FRAMES, -1, -1, -1)


def cross_fade(pairs: Tensor) -> Tensor:
    """Interpolate linearly, without a network: pairs (n, 3, 2c, h, w) -> (n, 3, c, h, w)."""
    before, after = pairs.chunk(2, dim=2)
    share = torch.arange(1, NEW_FRAMES + 1).to(pairs)[:, None, None, None] / (NEW_FRAMES + 1)
    return torch.lerp(before, after, share)


class Interpolator(nn.Module):
    """Latent diffusion of the frames between two key frames (paper §3, interpolation).

    The network predicts the residual of the latents and their cross-fade. Started from the key
    frames' U-Net: the same weights, new input weights zero, each adaptor the mean over the key
    frames. No mask, since the second key frame lies in the future (all ours).
    """

    def __init__(self, model: MagicVideo):
        super().__init__()
        config = model.config.unet
        self.diffusion = VDiffusion(model.config.diffusion)
        self.unet = UNet3D(replace(config, in_channels=3 * config.in_channels, frames=NEW_FRAMES,
                                   mask="bidirectional"))
        weights = {name: p.detach().cpu() for name, p in model.unet.state_dict().items()}
        for name, p in weights.items():
            if "adaptor" in name:  # scale or shift, (f, c)
                weights[name] = p.mean(0, keepdim=True).repeat(NEW_FRAMES, 1)
        conv_in = weights["conv_in.weight"]  # (c, 4, 3, 3)
        zeros = torch.zeros_like(conv_in)
        weights["conv_in.weight"] = torch.cat([conv_in, zeros, zeros], dim=1)
        self.unet.load_state_dict(weights)

    def loss(self, z0: Tensor, context: Tensor, fps: Tensor, t: Tensor, draw) -> Tensor:
        """Return the diffusion loss of the frames between two key frames, (b,) (ours).

        z0 (b, 5, 4, h, w) are five frames in a row at `fps` (b,) a second, the first and the last
        of them key frames; t (b,). The network is told the key frames' rate.
        """
        pairs = adjacent_key_frames(z0[:, [0, -1]])
        network = with_condition(self.unet, pairs)
        z0 = LATENT_SCALE * (z0[:, 1:-1] - cross_fade(pairs))
        eps = draw.normal(*z0.shape[1:]).to(z0)
        return self.diffusion.loss(network, z0, context, fps / (NEW_FRAMES + 1), t, eps)

    @torch.no_grad()
    def sample(self, keys: Tensor, context: Tensor, fps: float, steps: int = 20,
               seed: int = 0) -> Tensor:
        """Sample the frames between: keys (b, f, 4, h, w) at `fps` -> (b, 4f-3, 4, h, w) at 4 fps.

        Key frames stay what they are, bit for bit, at 0, 4, 8 ... context (b, l, d) is the text; no
        guidance, since the key frames determine the result (ours). Raises ValueError for one frame.
        """
        b, f, c, h, w = keys.shape
        if f < 2 or len(context) != b:
            raise ValueError(f"{f} key frames, {len(context)} texts for {b} clips: give two key "
                             f"frames or more, and a text for each clip")
        clips = []
        for i in range(b):  # clip by clip: each has f - 1 gaps, the batch of the network
            pairs = adjacent_key_frames(keys[i : i + 1])  # (f-1, 3, 2c, h, w)
            text = context[i : i + 1].expand(f - 1, -1, -1)
            rate = torch.full((f - 1,), float(fps), device=keys.device)
            generator = torch.Generator().manual_seed(seed + i)
            z = self.diffusion.sample(with_condition(self.unet, pairs),
                                      (f - 1, NEW_FRAMES, c, h, w), text, text, rate, steps=steps,
                                      guidance=1.0, generator=[generator] * (f - 1))
            # latents = cross-fade + z_0 / LATENT_SCALE
            new = cross_fade(pairs) + z / LATENT_SCALE
            rows = torch.cat([keys[i, :-1, None], new], dim=1)  # (f-1, 4, c, h, w)
            clips.append(torch.cat([rows.flatten(0, 1), keys[i, -1:]]))  # (4f-3, c, h, w)
        return torch.stack(clips)


# --------------------------------------------------------------------------------------------------
# Super-resolution: (h, w) -> (4h, 4w), frame by frame

SCALE = 4  # of height and width (paper: 256 -> 1024)
CHANNELS = {"tiny": (16, 32, 64), "laptop": (16, 32, 64), "small": (32, 64, 128, 256),
            "paper": (64, 128, 256, 512)}
MAX_AUG_LEVEL = 20  # of noise on the small frame in training: timesteps 0 to 19
SAMPLE_AUG_LEVEL = 1  # the same in sampling: about what a decoded frame differs from a true one
RESIDUAL_SCALE = 8  # z_0 = RESIDUAL_SCALE * (frame - bicubic): about as large as noise


def downsample(frames: Tensor) -> Tensor:
    """Average 4 x 4 pixels: frames (b, f, 3, 4h, 4w) -> (b, f, 3, h, w)."""
    return F.avg_pool2d(frames.flatten(0, 1), SCALE).unflatten(0, frames.shape[:2])


def upsample_bicubic(frames: Tensor) -> Tensor:
    """Enlarge without a network: frames (b, f, 3, h, w) -> (b, f, 3, 4h, 4w)."""
    large = F.interpolate(frames.flatten(0, 1), scale_factor=float(SCALE), mode="bicubic")
    return large.unflatten(0, frames.shape[:2])


class UpscaleUNet(UNet3D):
    """An image U-Net that is told the noise level of its small frame (Ho et al. 2021)."""

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.level_embedding = TimestepEmbedding(config.channels[0])

    def forward(self, z: Tensor, t: Tensor, context: Tensor, level: Tensor) -> Tensor:
        """z (b, f, 6, h, w), t and level (b,), context (b, l, d) -> v_hat (b, f, 3, h, w)."""
        emb = self.time_embedding(t) + self.level_embedding(level)  # (b, 4c)
        return self.run_levels(z, emb[:, None], context, video=False)


class Upscaler(nn.Module):
    """Diffusion in pixels that adds what bicubic upsampling lacks, frame by frame (paper §3).

    The network predicts the residual of the frame and its bicubic upsampling (as SRDiff, Li et al.
    2021). In training noise is added to the small frame, so that the network does not rely on every
    detail of it: in sampling it comes from our decoder, not from real data.
    """

    def __init__(self, model: MagicVideo):
        super().__init__()
        channels = CHANNELS[model.config.preset]
        self.diffusion = VDiffusion(model.config.diffusion)
        self.unet = UpscaleUNet(replace(
            model.config.unet, in_channels=6, out_channels=3, channels=channels,
            attention=(False,) * len(channels), frames=0))

    def loss(self, frames: Tensor, context: Tensor, fps: Tensor, t: Tensor, draw) -> Tensor:
        """Return the diffusion loss of random crops of frames (b, 1, 3, 4h, 4w), (b,) (ours).

        A crop has 1/4 of the side of its frame; t (b,); `fps` tells nothing of single frames.
        """
        side = frames.shape[-1] // SCALE  # of a crop, and of the small frame
        eps = draw.normal(1, 3, side, side).to(frames)
        noise = draw.normal(1, 3, side, side).to(frames)
        level = draw.integers(MAX_AUG_LEVEL)  # (b,)
        corners = draw.integers(frames.shape[-1] - side + 1, 2)  # (b, 2)
        low = upsample_bicubic(self.diffusion.add_noise(downsample(frames), noise, level))
        crops = []
        for pair, (top, left) in zip(torch.cat([frames, low], dim=2), corners.tolist()):
            crops.append(pair[..., top : top + side, left : left + side])
        frames, low = torch.stack(crops).chunk(2, dim=2)  # (b, 1, 3, h, w) each
        network = with_condition(self.unet, low, level.to(low.device))
        z0 = RESIDUAL_SCALE * (frames - low)
        return self.diffusion.loss(network, z0, context, None, t, eps)

    @torch.no_grad()
    def sample(self, videos: Tensor, context: Tensor, steps: int = 2, seed: int = 0) -> Tensor:
        """Enlarge clips (b, f, 3, h, w) in [-1, 1] -> (b, f, 3, 4h, 4w), context (b, l, d).

        Two steps suffice: more are no sharper and further from real frames (ours). Raises
        ValueError for another number of texts than clips.
        """
        if len(context) != len(videos):
            raise ValueError(f"{len(context)} texts for {len(videos)} clips: give one for each")
        level = torch.tensor([SAMPLE_AUG_LEVEL])
        frames = []
        for i, clip in enumerate(videos):
            text = context[i : i + 1]
            for j, frame in enumerate(clip):  # one by one: each is as large as many crops
                generator = torch.Generator().manual_seed((seed + i) * 1_000_003 + j)
                frame = frame[None, None]  # (1, 1, 3, h, w)
                noise = seeded_randn(frame.shape, generator).to(frame)
                low = upsample_bicubic(self.diffusion.add_noise(frame, noise, level))
                network = with_condition(self.unet, low, level.to(low.device))
                z = self.diffusion.sample(network, low.shape, text, text, None, steps=steps,
                                          guidance=1.0, generator=generator)
                # frame = bicubic(noisy small frame) + z_0 / RESIDUAL_SCALE
                frames.append((low + z / RESIDUAL_SCALE).clamp(-1, 1))
        return torch.cat(frames, dim=1).unflatten(1, videos.shape[:2])[0]
