"""What each stage of training minimises, on the items of one step (its stages: `train.py`; read `data.py` next)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from batches import rng, stacked
from cascade import BETWEEN, FACTOR, GAIN, NOISE_LEVELS, around, beside, enlarge, noised, shrink
from diffusion import normal
from magicvideo import MagicVideo
from progress import by_band
from settings import EVERY, Settings


def vae_loss(model: MagicVideo, items: list[tuple[int, dict]], step: int, s: Settings) -> Tensor:
    """Reconstruction + KL on a batch of clips (paper §3, VideoVAE; squared error: ours, SD's perceptual terms need
    weights).

    Of each clip a single frame at first, without the temporal layers; see `vae_frames`.
    """
    f, videos, generators = vae_frames(model, step, s), [], []
    for place, clip in items:
        generator = rng(s.seed, 0, 1, step, place)
        first = int(torch.randint(len(clip["video"]) - f + 1, (), generator=generator))
        videos.append(clip["video"][first : first + f])
        generators.append(generator)
    video = torch.stack(videos).to(model.unet.conv_in.weight)  # (b, f, 3, h, w)
    mean, logvar = model.vae.encode(video)
    z = model.vae.sample_latents(mean, logvar, normal(mean.shape, generators).to(mean))
    # KL(q(z | frame) || N(0, 1)) = (mean^2 + sigma^2 - 1 - log sigma^2) / 2, per latent number
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    # loss = |decoded - video|^2 + kl_weight KL (+ thumbnail term, single frames only)
    loss = F.mse_loss(model.vae.decode(z, temporal=f > 1), video) + s.kl_weight * kl
    # frames of one clip are too much alike to say how latents vary
    return loss + (s.thumbnail * thumbnail_term(mean, video) if s.thumbnail and f == 1 and mean.requires_grad else 0)


def vae_frames(model: MagicVideo, step: int, s: Settings) -> int:
    """How many frames of a clip stage vae sees: one, since frames of one clip teach little more than one of them does.

    The temporal layers see whole clips, in the last fifth of the steps, and in all where the encoder stays as it is
    (ours).
    """
    learns = any(p.requires_grad for p in model.vae.encoder.parameters())
    return 1 if learns and step < 0.8 * s.vae_steps else model.config.unet.frames


def thumbnail_term(mean: Tensor, video: Tensor) -> Tensor:
    """Pulls latents (b, f, 4, h/8, w/8) of video (b, f, 3, h, w) to a form that diffusion learns fast -> scalar.

    Three of them to a small copy of the frame, the others to size one and no correlation with these. Left alone, a VAE
    this small lays its colors on one line, yellow next to orange (ours; see docs/measurements.md).
    """
    small = F.adaptive_avg_pool2d(video.flatten(0, 1), mean.shape[-2:]).unflatten(0, video.shape[:2])
    small = 3 * (small - small.mean((0, 1, 3, 4), keepdim=True))  # about as large as the prior, N(0, 1)
    covariance = mean.transpose(0, 2).flatten(1).cov()  # (4, 4)
    free = covariance[3:] - torch.eye(len(covariance)).to(covariance)[3:]
    return F.mse_loss(mean[:, :, :3], small) + free.square().mean()


def heard(caption: str, s: Settings, generator: torch.Generator) -> str:
    """What a step reads of a caption: nothing, for the unconditional branch of guidance, or it without some words.

    Words that come and go teach what each means by itself (ours).
    """
    if torch.rand((), generator=generator) < s.text_dropout:
        return ""
    if not s.word_dropout:
        return caption
    words = caption.split()
    kept = torch.rand(len(words), generator=generator) >= s.word_dropout
    return " ".join(word for word, keep in zip(words, kept) if keep)


def unet_loss(model: MagicVideo, items: list[tuple[int, dict]], step: int, s: Settings,
              stage: str) -> tuple[Tensor, list]:
    """The diffusion loss of a batch, or a part of one, and the same by bands of t for the log (paper §3, §3.2).

    On latents of clips (b, f, ...), in stage image of frames (b, 1, ...); in stage upscale on pixels of frames.
    """
    generators = [rng(s.seed, EVERY.index(stage), 1, step, place) for place, _ in items]
    diffusion, network, fps = model.diffusion, model.unet, None
    if stage == "upscale":
        diffusion = model.later_diffusion
        network, z0 = upscaling(model, items, generators)  # (b, 1, 3, h, w)
    else:
        mean, logvar = (stacked(items, name, model.unet.conv_in.weight) for name in ("mean", "logvar"))
        noise = s.latent_noise * normal(mean.shape, generators).to(mean)
        z0 = model.vae.sample_latents(mean, logvar, noise)  # (b, f, 4, h/8, w/8)
    if stage in ("video", "interpolate"):
        fps = torch.tensor([item["fps"] for _, item in items], device=model.device)
    if stage == "interpolate":  # of five frames the first and the last are keys
        diffusion, fps = model.later_diffusion, fps / (BETWEEN + 1)
        network, z0 = beside(model.interpolator, around(z0[:, [0, -1]])), z0[:, 1:-1]
    context = model.encode_text([heard(item["caption"], s, generator)
                                 for generator, (_, item) in zip(generators, items)])
    errors, t = diffusion.errors(network, z0, context, fps, generators)  # (b, f) each
    # divided by how many frames count on average, so that a batch's loss is the mean of its parts'
    loss = errors[t >= 0].sum() / (errors.numel() * diffusion.counted(z0.shape[1], fps))
    return loss, by_band(errors.detach(), t, diffusion.config.steps)


def upscaling(model: MagicVideo, items: list[tuple[int, dict]], generators: list) -> tuple[Callable, Tensor]:
    """Frames (1, 3, 4h, 4w) of items -> super-resolution as a network of z alone, and its z_0 (b, 1, 3, h, w).

    The small frame is noised to a random level, then enlarged: z_0 is what a crop has that this lacks, and the network
    reads this beside z, and the level (paper §3; ours).
    """
    large = stacked(items, "video", model.upscaler.conv_in.weight)  # (b, 1, 3, 4h, 4w)
    level = torch.cat([torch.randint(NOISE_LEVELS, (1,), generator=g) for g in generators])  # (b,)
    seen = enlarge(noised(shrink(large), level, model.later_diffusion, generators))
    side = large.shape[-1] // FACTOR
    corners = [torch.randint(large.shape[-1] - side + 1, (2,), generator=g).tolist() for g in generators]
    large, seen = (torch.stack([x[..., top : top + side, left : left + side] for x, (top, left) in zip(xs, corners)])
                   for xs in (large, seen))
    # z_0 = GAIN * (frame - enlarge(noised small frame))
    return beside(model.upscaler, seen, level.to(large.device)), GAIN * (large - seen)
