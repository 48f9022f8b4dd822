"""VideoVAE (paper §3, VideoVAE): Stable Diffusion's autoencoder with a decoder that sees the clip.

The encoder is the image encoder, frame by frame. The decoder gets two `DirectedTemporalAttention` layers against
flicker, and by a switch two residual (3,1,1) convolutions. All of them start at zero, so an image VAE stays itself.
A secondary summary of the paper speaks of "3D convolution with skip connections". Skips from encoder to decoder cannot
exist in generation, where there is no encoder: ours are the residuals around each layer. Read `clip_text.py` next.
"""

from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unet3d import DirectedTemporalAttention


@dataclass
class VAEConfig:
    """Sizes of the VideoVAE; the defaults are Stable Diffusion 1.x."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # width of each level; all but the last halve the size
    latent_channels: int = 4
    layers: int = 2  # resnets a level in the encoder, one more in the decoder
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / standard deviation of the latents, so that diffusion sees about N(0, 1)
    temporal_attention: bool = True  # two layers in the decoder
    temporal_conv: bool = False  # a residual (3,1,1) convolution beside each of them


class VideoVAE(nn.Module):
    """Frames to latents an eighth of the size and back, shapes as in SD: (b, f, 3, h, w) <-> (b, f, 4, h/8, w/8).

    `encode` returns the raw posterior as SD's encoder does; `sample_latents` draws from it and scales by
    `scaling_factor`; `decode` takes such scaled latents. Every GroupNorm has eps 1e-6 (matches SD).
    The decoder sees the clip (paper, VideoVAE).
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)
        # log-variances start near -6: with noise of size one the decoder would first learn to ignore the latents (ours)
        nn.init.constant_(self.quant_conv.bias[config.latent_channels :], -6.0)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video (b, f, 3, h, w) in [-1, 1] -> mean, logvar of q(z | frame), each (b, f, 4, h/8, w/8), unscaled.

        Every frame by itself: no layer mixes frames (paper §3). Raises ValueError if h or w is not a multiple of 8.
        """
        factor = 2 ** (len(self.config.channels) - 1)
        if video.shape[-2] % factor or video.shape[-1] % factor:
            raise ValueError(f"frames of {video.shape[-2]} x {video.shape[-1]}: both must be multiples of {factor}")
        moments = self.quant_conv(self.encoder(video.flatten(0, 1))).unflatten(0, video.shape[:2])
        mean, logvar = moments.chunk(2, dim=2)  # (b, f, 4, h/8, w/8) each
        return mean, logvar.clamp(-30, 20)

    def sample_latents(self, mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        """z = (mean + sigma * eps) * scaling_factor, all of one shape: latents as diffusion sees them (matches SD)."""
        return (mean + (0.5 * logvar).exp() * eps) * self.config.scaling_factor

    def decode(self, latents: Tensor, temporal: bool = True) -> Tensor:
        """Scaled latents (b, f, 4, h, w) -> video (b, f, 3, 8h, 8w), about [-1, 1], not clamped.

        Without the `temporal` layers it is the image decoder, frame by frame (matches SD).
        """
        b, f = latents.shape[:2]
        x = self.post_quant_conv((latents / self.config.scaling_factor).flatten(0, 1))  # (b*f, 4, h, w)
        return self.decoder(x, f, temporal).unflatten(0, (b, f))


class Encoder(nn.Module):
    """Images (n, 3, h, w) -> (n, 8, h/8, w/8), mean and logvar before `quant_conv` (matches SD)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        c, last = config.channels, len(config.channels) - 1
        self.conv_in = nn.Conv2d(3, c[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            DownLevel(c[max(i - 1, 0)], c[i], i == last, config) for i in range(last + 1))
        self.mid_block = MidBlock(c[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Latents (b*f, 4, h, w) of clips of f frames -> frames (b*f, 3, 8h, 8w) (matches SD but for the temporal layers).

    The paper's VideoVAE puts two temporal layers into the decoder; their places are ours: after the middle block and
    after the first up block, where the maps are small.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], config)
        self.up_blocks = nn.ModuleList(
            UpLevel(c[max(i - 1, 0)], c[i], i == len(c) - 1, config) for i in range(len(c)))
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 3, 3, padding=1)
        # the video parts; both places have width c[0]
        self.temporal_attentions = nn.ModuleList(
            DirectedTemporalAttention(c[0], heads=1) for _ in range(2 * config.temporal_attention))
        self.temporal_convs = nn.ModuleList(TemporalConv(c[0]) for _ in range(2 * config.temporal_conv))

    def forward(self, x: Tensor, frames: int, temporal: bool = True) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        x = self.temporal(0, x, frames) if temporal else x
        for i, level in enumerate(self.up_blocks):
            x = level(x)  # (b*f, c, 2h, 2w)
            if i == 0 and temporal:
                x = self.temporal(1, x, frames)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def temporal(self, place: int, x: Tensor, frames: int) -> Tensor:
        """The temporal layers of one place, each a residual that starts at zero: x (b*f, c, h, w) -> the same."""
        z = x.unflatten(0, (-1, frames))  # (b, f, c, h, w)
        for layers in (self.temporal_convs, self.temporal_attentions):
            if layers:
                z = z + layers[place](z)
        return z.flatten(0, 1)


class TemporalConv(nn.Module):
    """A (3,1,1) convolution over neighbouring frames, zero at the start: z (b, f, c, h, w) -> the same (ours)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv(z.transpose(1, 2)).transpose(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's parts, in diffusers' names. Like the U-Net's, but no time embedding and another eps.


class ResnetBlock(nn.Module):
    """x (n, c_in, h, w) -> (n, c_out, h, w): two 3x3 convolutions around a residual (matches SD)."""

    def __init__(self, c_in: int, c_out: int, config: VAEConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if self.conv_shortcut else x)


class Attention(nn.Module):
    """One-head self-attention over the pixels of an image, residual included: (n, c, h, w) -> same (matches SD)."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.group_norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # a list, since SD's name is to_out.0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (n, h*w, c)
        q, k, v = (to(tokens)[:, None] for to in (self.to_q, self.to_k, self.to_v))  # (n, 1, h*w, c): one head
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (n, h*w, c)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Resnet, attention, resnet at the smallest size (matches SD)."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """(n, c, h, w) -> (n, c, h/2, w/2): pad right and bottom by one zero, stride 2 (matches SD's VAE)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(n, c, h, w) -> (n, c, 2h, 2w): nearest neighbour, then a convolution (matches SD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class DownLevel(nn.Module):
    """Resnets of one resolution, then half the size, except at the last level (matches SD)."""

    def __init__(self, c_in: int, c_out: int, last: bool, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, config) for i in range(config.layers))
        self.downsamplers = nn.ModuleList([] if last else [Downsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpLevel(nn.Module):
    """One resnet more than on the way down, then twice the size, except at the last level (matches SD)."""

    def __init__(self, c_in: int, c_out: int, last: bool, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, config) for i in range(config.layers + 1))
        self.upsamplers = nn.ModuleList([] if last else [Upsample(c_out)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x
