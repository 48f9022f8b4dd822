"""The 3D U-Net of MagicVideo (paper §3.2): Stable Diffusion's image U-Net, taught to see a clip.

Three small parts are added to the image model: a `FrameAdaptor` after every 3x3 convolution and
self-attention, a `DirectedTemporalAttention` beside every spatial transformer, and an
`FPSEmbedding` added to the time embedding. Each starts without effect, so that training begins
from the image model exactly. Image parts keep diffusers' names; the video parts stand in lists
parallel to theirs, so that no image weight changes its name. Read `diffusion.py` next: it trains
this network and samples with it.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

MASKS = ("strict", "literal", "bidirectional")


@dataclass
class UNetConfig:
    """Sizes of the U-Net; the defaults are Stable Diffusion 1.x with the paper's 16 frames."""

    in_channels: int = 4
    out_channels: int = 4
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # of each level; the next has half the side
    attention: tuple[bool, ...] = (True, True, True, False)  # which levels have ST blocks
    layers: int = 2  # resnets of a level in the encoder half, one more in the decoder half
    heads: int = 8  # of every attention
    groups: int = 32  # of every GroupNorm
    context_width: int = 768  # of the text tokens
    frames: int = 16  # the adaptors hold one scale and one shift per frame; 0 = an image model
    mask: str = "strict"  # of temporal attention, see `directed_attention`


# --------------------------------------------------------------------------------------------------
# What MagicVideo adds


class FrameAdaptor(nn.Module):
    """Per-frame affine after a shared convolution: z_i = S_i * Conv2d(z_i) + B_i (paper §3.2.1).

    One scale and one shift per frame and channel, (f, c). They start at 1 and 0, so that an image
    model stays itself (shape and start are ours: the paper is silent).
    """

    def __init__(self, frames: int, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(frames, channels))
        self.shift = nn.Parameter(torch.zeros(frames, channels))

    def forward(self, z: Tensor) -> Tensor:
        """Adapt z (b, f, c, h, w) or tokens (b, f, n, c). Raises ValueError for another f."""
        frames = len(self.scale)
        if z.shape[1] != frames:
            raise ValueError(f"{z.shape[1]} frames given, but this model's adaptors hold one scale "
                             f"and shift for each of {frames} frames (paper §3.2.1): give {frames}")
        shape = (frames, -1, 1, 1) if z.ndim == 5 else (frames, 1, -1)
        scale = self.scale.view(shape).to(z.dtype)  # z is bfloat16 under autocast, and stays so
        shift = self.shift.view(shape).to(z.dtype)
        # z_i = S_i * Conv2d(z_i) + B_i
        return scale * z + shift


def directed_attention(q: Tensor, k: Tensor, v: Tensor, mask: str) -> Tensor:
    """Attention over frames in which frame i reads frames 1..i only (paper §3.2.2).

    q, k, v (n, heads, f, d) -> same. The paper writes A = softmax(Q K^T / sqrt(d)) * M, M lower
    triangular with rows = queries. To the letter, the product after the softmax ("literal") leaves
    later frames in the denominator: rows no longer sum to one, and frame 1 still feels frame 16.
    "strict" (ours, default) masks before the softmax: the same weights, each row divided by its
    sum, and truly "independent of future frames" as the text promises. "bidirectional" has no mask
    (ours, for interpolation).
    """
    # scores = Q K^T / sqrt(d), M = 1 on and below the diagonal and 0 above it
    if mask == "strict":
        # A = softmax(scores.masked_fill(M == 0, -inf)), out = A V: the same, in one fused call
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask == "literal":
        # A = softmax(scores) * M, out = A V
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return (scores.softmax(-1) * torch.ones_like(scores).tril()) @ v
    # bidirectional, A = softmax(scores), out = A V: the same, in one fused call
    return F.scaled_dot_product_attention(q, k, v)


class DirectedTemporalAttention(nn.Module):
    """Attend over the frames of each spatial location by itself: T-Attn(LN(z)) (paper §3.2.2).

    Frames mix at equal (h, w) only. There is no frame position: order comes from the mask and the
    adaptors, as in the paper. The output projection starts at zero, weight and bias (ours: the
    paper is silent). Raises ValueError for an unknown mask.
    """

    def __init__(self, channels: int, heads: int, mask: str = "strict"):
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f'mask "{mask}" is unknown: use {", ".join(MASKS)}')
        self.heads = heads
        self.mask = mask
        self.norm = nn.LayerNorm(channels, eps=1e-5)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, z: Tensor) -> Tensor:
        """Return what to add to z: z (b, f, c, h, w) -> the same shape."""
        b, f, c, h, w = z.shape
        # each spatial location (h, w) is one short sequence, of its f frames
        tokens = self.norm(z.permute(0, 3, 4, 1, 2)).reshape(b * h * w, f, c)
        q = split_heads(self.to_q(tokens), self.heads)  # (b*h*w, heads, f, c/heads)
        k = split_heads(self.to_k(tokens), self.heads)
        v = split_heads(self.to_v(tokens), self.heads)
        out = self.to_out(merge_heads(directed_attention(q, k, v, self.mask)))  # (b*h*w, f, c)
        return out.reshape(b, h, w, f, c).permute(0, 3, 4, 1, 2)


def is_video_parameter(name: str) -> bool:
    """Tell whether a parameter is MagicVideo's own, one that Stable Diffusion does not have."""
    return any(part in name for part in ("adaptor", "temporal", "fps_embedding"))


# --------------------------------------------------------------------------------------------------
# Stable Diffusion's parts, with diffusers' names. FPSEmbedding is MagicVideo's; it stands here
# because it has the layers of TimestepEmbedding


def sinusoid(x: Tensor, width: int) -> Tensor:
    """Map x (b,) to float32 waves [cos, sin] (b, width), periods 2 pi .. 20000 pi (matches SD)."""
    exponents = torch.arange(width // 2, dtype=torch.float32, device=x.device) / (width // 2)
    frequencies = torch.exp(-math.log(10000) * exponents)
    angles = x.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Split the width of tokens into heads: x (n, l, c) -> (n, heads, l, c/heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Undo `split_heads`: x (n, heads, l, d) -> (n, l, heads*d)."""
    return x.transpose(1, 2).flatten(2)


def per_frame(layer: nn.Module, z: Tensor) -> Tensor:
    """Apply an image layer to every frame: z (b, f, c, h, w) -> (b, f, c', h', w')."""
    return layer(z.flatten(0, 1)).unflatten(0, z.shape[:2])


def convolve(conv: nn.Module, z: Tensor, adaptor: FrameAdaptor | None) -> Tensor:
    """Convolve every frame of z (b, f, c, h, w), then apply the adaptor unless it is None."""
    z = per_frame(conv, z)
    return adaptor(z) if adaptor else z


class TimestepEmbedding(nn.Module):
    """Embed the step: emb = Linear(SiLU(Linear(Sin(t)))), t (b,) -> (b, 4c) (matches SD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, 4 * channels)
        self.linear_2 = nn.Linear(4 * channels, 4 * channels)

    def forward(self, t: Tensor) -> Tensor:
        wave = sinusoid(t, self.linear_1.in_features).to(self.linear_1.weight.dtype)
        # emb = Linear(SiLU(Linear(Sin(t)))); for FPSEmbedding v stands for t
        return self.linear_2(F.silu(self.linear_1(wave)))


class FPSEmbedding(TimestepEmbedding):
    """Embed the frames per second v: emb_v = Linear(SiLU(Linear(Sin(v)))) (paper §3.2).

    fps (b,) -> (b, 4c). It is added to the time embedding, and its last layer starts at zero (both
    ours: the paper is silent).
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        nn.init.zeros_(self.linear_2.weight)
        nn.init.zeros_(self.linear_2.bias)


class ResnetBlock(nn.Module):
    """Apply two 3x3 convolutions with a residual, adding the time embedding between (matches SD).

    In a video model each convolution is followed by its own `FrameAdaptor` (paper §3.2.1).
    """

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.GroupNorm(config.groups, c_in, eps=1e-5)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(4 * config.channels[0], c_out)
        self.norm2 = nn.GroupNorm(config.groups, c_out, eps=1e-5)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, z: Tensor, emb: Tensor, adaptors: nn.ModuleList | None) -> Tensor:
        """Map z (b, f, c_in, h, w), emb (b, 1 or f, 4 * channels[0]) to z_out (b, f, c_out, h, w).

        The adaptors are two, or None in the image model.
        """
        first, second = adaptors or (None, None)
        x = convolve(self.conv1, F.silu(per_frame(self.norm1, z)), first)  # (b, f, c_out, h, w)
        x = x + self.time_emb_proj(F.silu(emb))[..., None, None]
        x = convolve(self.conv2, F.silu(per_frame(self.norm2, x)), second)
        return x + (per_frame(self.conv_shortcut, z) if self.conv_shortcut else z)


class Attention(nn.Module):
    """Let x (n, l, c) attend to context (n, m, d) with several heads -> (n, l, c) (matches SD)."""

    def __init__(self, channels: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_width, channels, bias=False)
        self.to_v = nn.Linear(context_width, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])  # SD's name is to_out.0

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = split_heads(self.to_q(x), self.heads)
        k = split_heads(self.to_k(context), self.heads)
        v = split_heads(self.to_v(context), self.heads)
        return self.to_out[0](merge_heads(F.scaled_dot_product_attention(q, k, v)))


class GEGLU(nn.Module):
    """Project x (..., c) to a value and a gate -> value * GELU(gate) (..., 4c) (matches SD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 8 * channels)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Apply GEGLU, then project 4c back to c; at index 1 SD has a dropout, without weights."""

    def __init__(self, channels: int):
        super().__init__()
        out = nn.Linear(4 * channels, channels)
        self.net = nn.Sequential(GEGLU(channels), nn.Identity(), out)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Compute S-Attn(z) = Cross-Attn(LN(MHSA(LN(z)))), with SD's residuals (paper §3.2.2).

    SD's feed-forward follows. In a video model, each frame's self-attention is followed by an
    adaptor, the second one in the paper's figure (§3.2.1).
    """

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(channels, eps=1e-5)
        self.attn1 = Attention(channels, channels, config.heads)
        self.norm2 = nn.LayerNorm(channels, eps=1e-5)
        self.attn2 = Attention(channels, config.context_width, config.heads)
        self.norm3 = nn.LayerNorm(channels, eps=1e-5)
        self.ff = FeedForward(channels)

    def forward(self, tokens: Tensor, context: Tensor, adaptor: FrameAdaptor | None) -> Tensor:
        """Map tokens (b, f, h*w, c) and context (b, l, d) to the same shape as tokens."""
        b, f, n, c = tokens.shape
        x = self.norm1(tokens).flatten(0, 1)  # (b*f, h*w, c): frames do not see each other
        x = self.attn1(x, x).unflatten(0, (b, f))  # (b, f, h*w, c)
        tokens = tokens + (adaptor(x) if adaptor else x)
        # cross-attention: all f*h*w queries of a clip share one set of keys, those of its text
        x = self.attn2(self.norm2(tokens).flatten(1, 2), context)
        tokens = tokens + x.unflatten(1, (f, n))
        return tokens + self.ff(self.norm3(tokens))


class SpatialTransformer(nn.Module):
    """Apply S-Attn between a norm, two projections and a residual (paper §3.2.2; matches SD)."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = nn.GroupNorm(config.groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, config)])
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, z: Tensor, context: Tensor, adaptor: FrameAdaptor | None) -> Tensor:
        """Map z (b, f, c, h, w) and context (b, l, d) to the same shape as z."""
        b, f, c, h, w = z.shape
        tokens = per_frame(self.proj_in, per_frame(self.norm, z))
        tokens = tokens.flatten(3).transpose(2, 3)  # (b, f, h*w, c)
        tokens = self.transformer_blocks[0](tokens, context, adaptor)
        tokens = tokens.transpose(2, 3).unflatten(3, (h, w))  # (b, f, c, h, w)
        return z + per_frame(self.proj_out, tokens)


class Downsample(nn.Module):
    """Halve h and w of x (n, c, h, w) by a convolution of stride 2 (matches SD's U-Net)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double h and w of x (n, c, h, w) by repeating pixels, then convolve (matches SD)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


# --------------------------------------------------------------------------------------------------
# The levels and the network


class Level(nn.Module):
    """Hold the layers of one resolution: image parts and, in parallel lists, the video parts.

    Resnet i reads `inputs[i]` channels and writes c. `attentions` is the number of ST blocks.
    """

    def __init__(self, inputs: list[int], c: int, attentions: int, config: UNetConfig,
                 downsample: bool = False, upsample: bool = False):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in, c, config) for c_in in inputs)
        self.attentions = nn.ModuleList(SpatialTransformer(c, config) for _ in range(attentions))
        self.downsamplers = nn.ModuleList([Downsample(c)] if downsample else [])
        self.upsamplers = nn.ModuleList([Upsample(c)] if upsample else [])
        if config.frames:
            def adaptors(count: int) -> nn.ModuleList:
                return nn.ModuleList(FrameAdaptor(config.frames, c) for _ in range(count))
            self.resnet_adaptors = nn.ModuleList(adaptors(2) for _ in inputs)
            self.attention_adaptors = adaptors(attentions)
            self.temporal_attentions = nn.ModuleList(
                DirectedTemporalAttention(c, config.heads, config.mask) for _ in range(attentions))
            self.downsampler_adaptors = adaptors(len(self.downsamplers))
            self.upsampler_adaptors = adaptors(len(self.upsamplers))

    def layer(self, i: int, z: Tensor, emb: Tensor, context: Tensor, video: bool) -> Tensor:
        """Run resnet i and, where there is one, ST block i (paper §3.2.2 and figure).

        z (b, f, c_in, h, w), emb (b, 1 or f, 4 * channels[0]), context (b, l, d) -> z_out.
        """
        z = self.resnets[i](z, emb, self.resnet_adaptors[i] if video else None)  # (b, f, c, h, w)
        if i >= len(self.attentions):
            return z
        if not video:
            return self.attentions[i](z, context, None)
        # z_out = S-Attn(z) + T-Attn(z): two parallel branches that read the same tensor (§3.2.2)
        s_attn = self.attentions[i](z, context, self.attention_adaptors[i])
        return s_attn + self.temporal_attentions[i](z)

    def downsample(self, z: Tensor, video: bool) -> Tensor:
        """Halve h and w for the next level: z (b, f, c, h, w) -> (b, f, c, h/2, w/2)."""
        return convolve(self.downsamplers[0], z, self.downsampler_adaptors[0] if video else None)

    def upsample(self, z: Tensor, video: bool) -> Tensor:
        """Double h and w for the next level: z (b, f, c, h, w) -> (b, f, c, 2h, 2w)."""
        return convolve(self.upsamplers[0], z, self.upsampler_adaptors[0] if video else None)


class UNet3D(nn.Module):
    """Predict the noise in the latents of a clip (paper §3.2).

    z (b, f, c, h, w), t (b,), context (b, l, d), fps (b,) -> eps_hat like z; t can be (b, f), a
    timestep for each frame. fps is also the switch: with it this is the video model, without it the
    image model, for which each frame is an image by itself, and there can be any number of them.
    GroupNorm sees one frame at a time, so with strict masks the network is causal in the frames.
    """

    # Sizes of Stable Diffusion for the paper's clips, 16 frames of 256 x 256: latents of 32 x 32.
    # Channels: what each resnet reads (up_blocks: z and a skip) -> what all write. Side: of the
    # resnets -> after the downsampler or upsampler. Every ST block has a temporal attention.
    #
    #   layers           channels                   side       frames   ST blocks
    #   conv_in          4 -> 320                   32         16       0
    #   down_blocks[0]   320, 320 -> 320            32 -> 16   16       2
    #   down_blocks[1]   320, 640 -> 640            16 -> 8    16       2
    #   down_blocks[2]   640, 1280 -> 1280          8 -> 4     16       2
    #   down_blocks[3]   1280, 1280 -> 1280         4          16       0
    #   mid_block        1280, 1280 -> 1280         4          16       1
    #   up_blocks[0]     2560, 2560, 2560 -> 1280   4 -> 8     16       0
    #   up_blocks[1]     2560, 2560, 1920 -> 1280   8 -> 16    16       3
    #   up_blocks[2]     1920, 1280, 960 -> 640     16 -> 32   16       3
    #   up_blocks[3]     960, 640, 640 -> 320       32         16       3
    #   conv_out         320 -> 4                   32         16       0

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        c = config.channels
        self.conv_in = nn.Conv2d(config.in_channels, c[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(c[0])
        z_width = c[0]  # the width of z before a level
        skips = [c[0]]  # the widths of the outputs that the decoder half reads again
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(c):
            is_last = i == len(c) - 1
            inputs = [z_width] + [width] * (config.layers - 1)
            blocks = config.layers if config.attention[i] else 0
            self.down_blocks.append(Level(inputs, width, blocks, config, downsample=not is_last))
            skips += [width] * config.layers
            if not is_last:
                skips.append(width)  # of the downsampler's output
            z_width = width
        self.mid_block = Level([z_width, z_width], z_width, 1, config)
        self.up_blocks = nn.ModuleList()
        for i in reversed(range(len(c))):
            inputs = [z_width + skips.pop()]
            inputs += [c[i] + skips.pop() for _ in range(config.layers)]
            blocks = config.layers + 1 if config.attention[i] else 0
            self.up_blocks.append(Level(inputs, c[i], blocks, config, upsample=i > 0))
            z_width = c[i]
        self.conv_norm_out = nn.GroupNorm(config.groups, c[0], eps=1e-5)
        self.conv_out = nn.Conv2d(c[0], config.out_channels, 3, padding=1)
        if config.frames:  # the video parts outside the levels
            self.conv_in_adaptor = FrameAdaptor(config.frames, c[0])
            self.conv_out_adaptor = FrameAdaptor(config.frames, config.out_channels)
            self.fps_embedding = FPSEmbedding(c[0])

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor | None = None) -> Tensor:
        """Predict eps. Raises ValueError for another number of frames than the adaptors'."""
        emb = self.time_embedding(t.flatten()).unflatten(0, (len(t), -1))  # (b, 1 or f, 4c)
        if fps is None:  # the image model: no video part runs
            return self.run_levels(z, emb, context, video=False)
        emb = emb + self.fps_embedding(fps)[:, None]
        return self.run_levels(z, emb, context, video=True)

    def run_levels(self, z: Tensor, emb: Tensor, context: Tensor, video: bool) -> Tensor:
        """Run all layers on z (b, f, c, h, w), emb (b, 1 or f, 4c), the video parts if `video`."""
        z = convolve(self.conv_in, z, self.conv_in_adaptor if video else None)  # (b, f, c, h, w)
        skips = [z]
        for level in self.down_blocks:
            for i in range(len(level.resnets)):
                z = level.layer(i, z, emb, context, video)     # (b, f, c, h, w)
                skips.append(z)
            if level.downsamplers:
                z = level.downsample(z, video)                 # (b, f, c, h/2, w/2)
                skips.append(z)
        for i in range(len(self.mid_block.resnets)):
            z = self.mid_block.layer(i, z, emb, context, video)
        for level in self.up_blocks:
            for i in range(len(level.resnets)):
                z = torch.cat([z, skips.pop()], dim=2)         # (b, f, c + c_skip, h, w)
                z = level.layer(i, z, emb, context, video)     # (b, f, c, h, w)
            if level.upsamplers:
                z = level.upsample(z, video)                   # (b, f, c, 2h, 2w)
        z = F.silu(per_frame(self.conv_norm_out, z))
        return convolve(self.conv_out, z, self.conv_out_adaptor if video else None)
