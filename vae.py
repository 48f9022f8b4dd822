"""VideoVAE (paper §3, VideoVAE): Stable Diffusion's autoencoder with a decoder that sees the clip.

The encoder is the image encoder and reads each frame by itself. The decoder has two
`DirectedTemporalAttention` layers against flicker, the paper's "pixel dithering". They are causal,
although the decoder has all latents at hand, because the paper calls them directed. Each starts
without effect, so that an image VAE stays itself. Read `clip_text.py` next.
"""

from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from unet3d import DirectedTemporalAttention, Upsample


@dataclass
class VAEConfig:
    """Sizes of the VideoVAE; the defaults are Stable Diffusion 1.x."""

    channels: tuple[int, ...] = (128, 256, 512, 512)  # of each level; the next has half the side
    latent_channels: int = 4
    layers: int = 2  # resnets of a level in the encoder, one more in the decoder
    groups: int = 32  # of every GroupNorm
    scaling_factor: float = 0.18215  # 1 / standard deviation of the means, all channels together


class VideoVAE(nn.Module):
    """Encode frames, decode latents: (b, f, 3, h, w) <-> (b, f, 4, h/8, w/8) (paper §3, VideoVAE).

    `encode` returns the posterior, `sample_latents` draws from it and multiplies by
    `scaling_factor`, and `decode` takes such latents (matches SD). The factor makes the standard
    deviation of the means about 1 over all channels together; a single channel can be far from it.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1)
        self.post_quant_conv = nn.Conv2d(c, c, 1)
        self.decoder = Decoder(config)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode each frame by itself -> mean and logvar of the posterior, unscaled (paper §3).

        video (b, f, 3, h, w) in [-1, 1] -> each (b, f, 4, h/8, w/8). Raises ValueError for sizes
        that are no multiple of 8.
        """
        factor = 2 ** (len(self.config.channels) - 1)
        if video.shape[-2] % factor or video.shape[-1] % factor:
            raise ValueError(f"{video.shape[-2]} x {video.shape[-1]}: give multiples of {factor}")
        moments = self.quant_conv(self.encoder(video.flatten(0, 1)))  # (b*f, 8, h/8, w/8)
        mean, logvar = moments.unflatten(0, video.shape[:2]).chunk(2, dim=2)
        return mean, logvar.clamp(-30, 20)

    def sample_latents(self, mean: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
        """Draw z = (mean + sigma * eps) * scaling_factor, all of one shape (matches SD)."""
        return (mean + (0.5 * logvar).exp() * eps) * self.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents (b, f, 4, h, w) -> video (b, f, 3, 8h, 8w), about in [-1, 1].

        Nothing is clamped. With f = 1 the temporal layers are skipped: the decoder matches SD.
        """
        b, f = latents.shape[:2]
        x = self.post_quant_conv((latents / self.config.scaling_factor).flatten(0, 1))
        return self.decoder(x, f).unflatten(0, (b, f))


class Encoder(nn.Module):
    """Encode images (n, 3, h, w) -> (n, 8, h/8, w/8), the input of `quant_conv` (matches SD)."""

    # Sizes of Stable Diffusion for the paper's clips, 16 frames of 256 x 256, each by itself.
    # Channels: what each resnet reads -> what all write. Side: of the resnets -> after the
    # downsampler.
    #
    #   layers           channels          side         frames
    #   conv_in          3 -> 128          256          16
    #   down_blocks[0]   128, 128 -> 128   256 -> 128   16
    #   down_blocks[1]   128, 256 -> 256   128 -> 64    16
    #   down_blocks[2]   256, 512 -> 512   64 -> 32     16
    #   down_blocks[3]   512, 512 -> 512   32           16
    #   mid_block        512, 512 -> 512   32           16
    #   conv_out         512 -> 8          32           16

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = config.channels
        self.conv_in = nn.Conv2d(3, c[0], 3, padding=1)
        inputs = [c[0], *c[:-1]]  # each level reads what the one before it wrote
        self.down_blocks = nn.ModuleList(
            Level(inputs[i], c[i], config.layers, config, downsample=i < len(c) - 1)
            for i in range(len(c)))
        self.mid_block = MidBlock(c[-1], config)
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down_blocks:
            x = level(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    """Decode latents (b*f, 4, h, w) of clips of f frames -> (b*f, 3, 8h, 8w) (paper §3, VideoVAE).

    This is SD's decoder and two temporal layers, each a residual with one head. Their places are
    ours: after the middle block and after the first up block, where the feature maps are small.
    """

    # Sizes of Stable Diffusion for the paper's clips, all 16 frames at once. The columns are the
    # same as in `Encoder`, with upsamplers for downsamplers.
    #
    #   layers                   channels               side         frames
    #   conv_in                  4 -> 512               32           16
    #   mid_block                512, 512 -> 512        32           16
    #   temporal_attentions[0]   512 -> 512             32           16
    #   up_blocks[0]             512, 512, 512 -> 512   32 -> 64     16
    #   temporal_attentions[1]   512 -> 512             64           16
    #   up_blocks[1]             512, 512, 512 -> 512   64 -> 128    16
    #   up_blocks[2]             512, 256, 256 -> 256   128 -> 256   16
    #   up_blocks[3]             256, 128, 128 -> 128   256          16
    #   conv_out                 128 -> 3               256          16

    def __init__(self, config: VAEConfig):
        super().__init__()
        c = config.channels[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, c[0], 3, padding=1)
        self.mid_block = MidBlock(c[0], config)
        inputs = [c[0], *c[:-1]]  # each level reads what the one before it wrote
        self.up_blocks = nn.ModuleList(
            Level(inputs[i], c[i], config.layers + 1, config, upsample=i < len(c) - 1)
            for i in range(len(c)))
        self.conv_norm_out = nn.GroupNorm(config.groups, c[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(c[-1], 3, 3, padding=1)
        # the video parts; both places have width c[0]
        self.temporal_attentions = nn.ModuleList(
            DirectedTemporalAttention(c[0], heads=1) for _ in range(2))

    def forward(self, x: Tensor, frames: int) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        x = self.temporal(0, x, frames)
        for i, level in enumerate(self.up_blocks):
            x = level(x)
            if i == 0:
                x = self.temporal(1, x, frames)
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def temporal(self, place: int, x: Tensor, frames: int) -> Tensor:
        """Add T-Attn(LN(x)) over the frames of each clip, x (b*f, c, h, w) -> the same shape."""
        if frames == 1:
            return x
        z = x.unflatten(0, (-1, frames))  # (b, f, c, h, w)
        return (z + self.temporal_attentions[place](z)).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# Stable Diffusion's parts, with diffusers' names: there is no time embedding, and every GroupNorm
# has eps 1e-6


class ResnetBlock(nn.Module):
    """Apply two 3x3 convolutions and a residual to x (n, c_in, h, w) (matches SD)."""

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
    """Let the pixels of x (n, c, h, w) attend to each other, and add x: one head (matches SD)."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.group_norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # SD's name is to_out.0

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (n, h*w, c)
        q = self.to_q(tokens)[:, None]  # (n, 1, h*w, c): one head
        k = self.to_k(tokens)[:, None]
        v = self.to_v(tokens)[:, None]
        out = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])  # (n, h*w, c)
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])


class MidBlock(nn.Module):
    """Apply a resnet, attention and a resnet at the smallest size (matches SD)."""

    def __init__(self, channels: int, config: VAEConfig):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, config) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(channels, config)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    """Halve h and w of x (n, c, h, w): pad right and bottom, stride 2 (matches SD's VAE)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """Apply the resnets of one resolution, then downsample, upsample or neither (matches SD)."""

    def __init__(self, c_in: int, c_out: int, layers: int, config: VAEConfig,
                 downsample: bool = False, upsample: bool = False):
        super().__init__()
        inputs = [c_in] + [c_out] * (layers - 1)
        self.resnets = nn.ModuleList(ResnetBlock(c, c_out, config) for c in inputs)
        self.downsamplers = nn.ModuleList([Downsample(c_out)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(c_out)] if upsample else [])

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.resnets, *self.downsamplers, *self.upsamplers]:
            x = layer(x)
        return x
