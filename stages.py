"""What each stage of training reads, trains, minimises, draws and hands on: a class for each.

    Vae           VideoVAE: reconstruction + KL                              (paper §3, VideoVAE)
    Image         the U-Net's image part on single images, text to image     (paper §3)
    Video         the whole U-Net on clips with their FPS                    (paper §3.2)
    Interpolate   by --stage alone: the frames between two key frames        (paper §3)
    Upscale       by --stage alone: frames of four times the size            (paper §3)

Read `train.py` next: the loop that runs them.
"""

import re
from contextlib import nullcontext
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cascade
from data import ClipDataset
from magicvideo import MagicVideo
from runs import InputError, autocast, process_count, process_rank
from unet3d import Level, is_video_parameter


class Draw:
    """The random numbers of a step: drawn for its whole batch, of which one shard is kept.

    So several processes train as one does, and a resumed run goes on as if it had never stopped.
    """

    def __init__(self, generator: torch.Generator, size: int, shard: slice = slice(None)):
        self.generator = generator
        self.size = size
        self.shard = shard

    def normal(self, *shape: int) -> Tensor:
        """Draw from N(0, 1), (b, *shape)."""
        return torch.randn(self.size, *shape, generator=self.generator)[self.shard]

    def uniform(self) -> Tensor:
        """Draw from [0, 1), (b,)."""
        return torch.rand(self.size, generator=self.generator)[self.shard]

    def integers(self, high: int, *shape: int) -> Tensor:
        """Draw from 0 .. high - 1, (b, *shape)."""
        shape = (self.size, *shape)
        return torch.randint(high, shape, generator=self.generator)[self.shard]


Source = ClipDataset | list[dict]  # clips or stills, or the latents of their cuts


class Batch(NamedTuple):
    """What a step reads: clips (b, f, c, h, w), pixels or latents, their captions and fps (b,)."""

    clips: Tensor
    captions: list[str]
    fps: Tensor | None


class Stage(nn.Module):
    """What all stages share: a module, since DistributedDataParallel wraps one.

    `network` is the module that is trained, `diffusion` its noise process, `s` train.py's Settings.
    """

    name = ""
    reads_latents = True
    starts_alone = False  # --stage NAME needs no --init-from
    needs_clips = True  # cannot train on --images alone
    skipped_from = None  # starts that have been through this stage: "ours" or "Stable Diffusion"
    clip_frames = 0  # frames of a clip of the data set; 0 = the model's
    rate_multiplier = 1  # of the frame rate of clips
    scale = 1  # of the model's frame size
    defaults = {}  # of train.py's Settings, its own

    def __init__(self, model: MagicVideo, s, network: nn.Module, diffusion=None):
        super().__init__()
        self.model = model
        self.s = s
        self.network = network
        self.diffusion = diffusion
        self.steps = getattr(s, f"{self.name}_steps")
        for level in network.modules():
            if s.gradient_checkpointing and isinstance(level, Level):
                level.layer = partial(
                    checkpoint, partial(Level.layer, level), use_reentrant=False,
                    context_fn=lambda: (nullcontext(), autocast(model.device, s.precision)))

    # What a step reads

    @classmethod
    def fewest_clips(cls, s, frames: int) -> int:
        """Return how many clips of `frames` frames the smallest step reads."""
        return s.batch_size

    def plan_batch(self, step: int, frames: int) -> tuple[int, int]:
        """Return the items of a step, of all processes, and how many of their frames it reads."""
        return self.s.batch_size, frames

    def plan(self, step: int, frames: int, clips: Source,
             pictures: Source | None) -> tuple[list[Source], int, int]:
        """Return what a step reads in turn, how many items of it, and how many of their frames."""
        size, frames = self.plan_batch(step, frames)
        return mix(clips, pictures, frames), size, frames

    def read(self, sources: list[Source], step: int, size: int, frames: int,
             shard: slice) -> tuple[Batch, Draw]:
        """Read a shard of the items of a step, and make its random numbers.

        Items come from the sources in turn. Every item of one comes once an epoch, and each epoch
        is shuffled anew.
        """
        items = []
        orders = {}
        for n in range(step * size, step * size + size)[shard]:
            source = sources[n % len(sources)]
            epoch, position = divmod(n // len(sources), len(source))
            if (n % len(sources), epoch) not in orders:
                order = torch.randperm(len(source), generator=self.generator(0, epoch))
                orders[n % len(sources), epoch] = order
            if isinstance(source, ClipDataset):  # not latents
                source.set_epoch(epoch)
            items.append(source[int(orders[n % len(sources), epoch][position])])
        draw = Draw(self.generator(1, step), size, shard)
        return self.batch(items, draw, frames), draw

    def generator(self, *position: int) -> torch.Generator:
        """Make the generator of a position in the run: it depends on (seed, stage, position)."""
        number = self.s.seed
        for part in ([*STAGES].index(self.name), *position):
            number = (number * 1_000_003 + part + 1) % 2**63
        return torch.Generator().manual_seed(number)

    def batch(self, items: list[dict], draw: Draw, frames: int) -> Batch:
        """Make a batch of items: of each clip `frames` frames in a row, as latents or as pixels."""
        clips = [item["z0"] if "z0" in item else item["video"] for item in items]
        first = draw.integers(max(map(len, clips)) - frames + 1)
        weight = self.model.unet.conv_in.weight  # has the device and type of all inputs
        starts = [int(i) % (len(clip) - frames + 1) for clip, i in zip(clips, first)]  # a still's 0
        x = torch.stack([clip[i : i + frames] for clip, i in zip(clips, starts)]).to(weight)
        if self.reads_latents and "z0" not in items[0]:
            x = self.model.encode(x)
        fps = torch.tensor([item["fps"] for item in items], device=weight.device)
        return Batch(x, [item["caption"] for item in items], fps)

    def context(self, captions: list[str], draw: Draw) -> Tensor:
        """Encode captions, some of them dropped for classifier-free guidance, (b, l, d)."""
        return self.model.encode_text(["" if u < self.s.text_dropout else caption
                                       for u, caption in zip(draw.uniform(), captions)])

    # Which weights learn

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that learn, by name: all of the network's unless a stage says else."""
        return dict(self.network.named_parameters())

    def chosen(self) -> dict[str, nn.Parameter]:
        """Return those of the weights that --trainable leaves. InputError if there are none."""
        chosen = {name: p for name, p in self.weights().items()
                  if re.search(self.s.trainable, name)}
        if not chosen:
            raise InputError(f'--trainable "{self.s.trainable}": matches nothing that stage '
                             f"{self.name} trains; add --stage for the stage that you mean")
        return chosen

    def freeze_the_rest(self) -> None:
        """Let the chosen weights alone have gradients."""
        self.requires_grad_(False)
        for p in self.chosen().values():
            p.requires_grad_(True)

    def video_start(self) -> int:
        """Return the step from which on the video weights learn."""
        return 0

    def parameter_groups(self) -> list[dict]:
        """Return two groups, the image weights and the video weights, each with its first step."""
        chosen = self.chosen()
        image = [p for name, p in chosen.items() if not is_video_parameter(name)]
        video = [p for name, p in chosen.items() if is_video_parameter(name)]
        return [{"params": image, "start": 0}, {"params": video, "start": self.video_start()}]

    # What it minimises, draws and hands on

    def forward(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Compute `loss` in the precision of the run."""
        with autocast(self.model.device, self.s.precision):
            return self.loss(batch, draw)

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor | None]:
        """Return the loss of each clip (b,), and its timesteps (b,), None without diffusion."""
        raise NotImplementedError

    def picture(self, items: list[dict]) -> Tensor:
        """Draw rows of frames (n, f, 3, h, w) that show, on held-out items, how far the stage is."""
        raise NotImplementedError

    def finish(self, clips: ClipDataset) -> None:
        """Hand on what the next stage or the model needs besides the weights."""


class Vae(Stage):
    """The VideoVAE: reconstruction + KL (paper §3, VideoVAE; squared error, not LPIPS, is ours).

    For its first four fifths it sees single frames, since those of one clip are nearly alike; with
    --images every other one is a still. Then it sees clips, for the temporal layers (ours). Where
    the U-Net is from Stable Diffusion, so is the VAE, and stays as it is: the temporal layers alone
    learn, from clips alone.
    """

    name = "vae"
    reads_latents = False
    starts_alone = True
    needs_clips = False
    skipped_from = "ours"

    def __init__(self, model: MagicVideo, s):
        super().__init__(model, s, model.vae)

    @classmethod
    def fewest_clips(cls, s, frames: int) -> int:
        """Return how many clips have --vae-batch-size frames together."""
        return max(1, s.vae_batch_size // frames)

    def plan_batch(self, step: int, frames: int) -> tuple[int, int]:
        """Return as many items as make --vae-batch-size frames, one for each process at least."""
        frames = min(frames, self.s.vae_batch_size) if step >= self.video_start() else 1
        return max(process_count(), self.s.vae_batch_size // frames), frames

    def weights(self) -> dict[str, nn.Parameter]:
        """Return all weights, or the temporal layers alone if the rest is Stable Diffusion's."""
        return {name: p for name, p in self.network.named_parameters()
                if is_video_parameter(name) or not self.model.config.pretrained}

    def trains_encoder(self) -> bool:
        """Tell whether the latents change in this stage."""
        return any(name.startswith("encoder.") for name in self.chosen())

    def video_start(self) -> int:
        """Return the first step on clips, from which on the video weights learn."""
        return int(0.8 * self.steps) if self.trains_encoder() else 0

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, None]:
        """Return || decode(z) - x ||^2 + weight * KL of each clip, (b,)."""
        mean, logvar = self.network.encode(batch.clips)
        eps = draw.normal(*mean.shape[1:]).to(mean)
        decoded = self.network.decode(self.network.sample_latents(mean, logvar, eps))
        # KL(q(z | frame) || N(0, 1)) = (mean^2 + sigma^2 - 1 - log sigma^2) / 2
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
        return (decoded - batch.clips).square().mean((1, 2, 3, 4)) + self.s.kl_weight * kl, None

    def picture(self, items: list[dict]) -> Tensor:
        """Draw clips, and under them their reconstructions."""
        videos = torch.stack([item["video"] for item in items])
        return torch.cat([videos, self.model.decode(self.model.encode(videos)).cpu()])

    def finish(self, clips: ClipDataset) -> None:
        """Set the scale of the latents: 1 / their standard deviation (SD's 0.18215 is one)."""
        if self.trains_encoder():
            self.model.config.vae.scaling_factor = 1.0
            clips.set_epoch(0)
            latents = [self.model.encode(item["video"][None]) for item in spread([clips], 64)]
            self.model.config.vae.scaling_factor = float(1 / torch.cat(latents).std())


class Video(Stage):
    """The whole U-Net on clips with their frame rate (paper §3.2).

    The text encoder learns too, unless it is Stable Diffusion's (ours: the paper's is frozen). With
    --images every n-th step trains on stills alone, so that what only these show is not forgotten
    (ours).
    """

    name = "video"

    def __init__(self, model: MagicVideo, s):
        super().__init__(model, s, model.unet, model.diffusion)

    def plan_batch(self, step: int, frames: int) -> tuple[int, int]:
        """Return --batch-size clips, or as many single frames as these have."""
        return self.s.batch_size * self.model.config.unet.frames // frames, frames

    def plan(self, step: int, frames: int, clips: Source,
             pictures: Source | None) -> tuple[list[Source], int, int]:
        """Let one step in --picture-every read stills alone, if any weight can learn from them."""
        sources, size, frames = super().plan(step, frames, clips, pictures)
        if frames > 1 and pictures and self.s.picture_every and not step % self.s.picture_every:
            if not all(map(is_video_parameter, self.chosen())):
                return [pictures], *self.plan_batch(step, 1)
        return sources, size, frames

    def batch(self, items: list[dict], draw: Draw, frames: int) -> Batch:
        """Make a batch of clips with their fps, or of stills, which have none."""
        batch = super().batch(items, draw, frames)
        return batch if frames == self.model.config.unet.frames else batch._replace(fps=None)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the U-Net's weights, and the text encoder's unless it is Stable Diffusion's."""
        weights = dict(self.network.named_parameters())
        if not self.model.config.pretrained:
            text = self.model.text_encoder.named_parameters()
            weights |= {f"text_encoder.{name}": p for name, p in text}
        return weights

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the loss of each clip, (b,), and t (b,).

        || eps - eps_hat(z_t, t, context, fps) ||^2, or that of tiny.py in presets tiny and laptop.
        """
        context = self.context(batch.captions, draw)
        t = draw.integers(self.diffusion.num_steps)
        eps = draw.normal(*batch.clips.shape[1:]).to(batch.clips)
        return self.diffusion.loss(self.network, batch.clips, context, batch.fps, t, eps), t

    def picture(self, items: list[dict]) -> Tensor:
        """Sample a clip in ten steps for each caption."""
        return self.model.sample([item["caption"] for item in items], steps=10)


class Image(Video):
    """The U-Net's image part on single frames without fps, text to image (paper §3, image start).

    Frames are the first of their clips: with the causal mask the video model's first frame sees
    itself alone (ours). With --images every other frame is a still.
    """

    name = "image"
    skipped_from = "Stable Diffusion"
    needs_clips = False

    def plan_batch(self, step: int, frames: int) -> tuple[int, int]:
        """Return as many single frames as a step of stage video has."""
        return super().plan_batch(step, 1)

    def batch(self, items: list[dict], draw: Draw, frames: int) -> Batch:
        """Make a batch of first frames."""
        key = "z0" if "z0" in items[0] else "video"
        firsts = [{**item, key: item[key][:1]} for item in items]
        return super().batch(firsts, draw, frames)._replace(fps=None)

    def weights(self) -> dict[str, nn.Parameter]:
        """Return those of stage video that an image model has."""
        return {name: p for name, p in super().weights().items() if not is_video_parameter(name)}

    def picture(self, items: list[dict]) -> Tensor:
        """Sample a single frame in ten steps for each caption."""
        return self.model.sample([item["caption"] for item in items], fps=None, steps=10)


class Cascade(Stage):
    """What interpolation and super-resolution share: a network of their own, kept in the model."""

    def __init__(self, model: MagicVideo, s):
        network = cascade.build(model, self.name)
        super().__init__(model, s, network, network.diffusion)

    def loss(self, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Return the loss of the network for each clip, (b,), and t (b,)."""
        context = self.context(batch.captions, draw)
        t = draw.integers(self.diffusion.num_steps)
        return self.network.loss(batch.clips, context, batch.fps, t, draw), t

    def finish(self, clips: ClipDataset) -> None:
        """Keep the network in the model."""
        self.model.cascade[self.name] = self.network.state_dict()


class Interpolate(Cascade):
    """The three frames between two key frames (paper §3, interpolation)."""

    name = "interpolate"
    clip_frames = cascade.NEW_FRAMES + 2
    rate_multiplier = cascade.NEW_FRAMES + 1  # so that the key frames have the model's rate

    def picture(self, items: list[dict]) -> Tensor:
        """Draw clips, and under them their first and last frame with new ones between."""
        videos = torch.stack([item["video"] for item in items])
        drawn = []
        for video, item in zip(videos, items):
            keys = self.model.encode(video[None])[:, [0, -1]]
            context = self.model.encode_text([item["caption"]])
            latents = self.network.sample(keys, context, item["fps"] / self.rate_multiplier)
            drawn.append(self.model.decode(latents).cpu())
        return torch.cat([videos, *drawn])


class Upscale(Cascade):
    """Frames of four times the height and width, in pixels (paper §3, super-resolution)."""

    name = "upscale"
    reads_latents = False
    clip_frames = 1
    needs_clips = False
    scale = cascade.SCALE
    defaults = {"max_frames": 8}  # 16 times as large, and those of a clip are nearly alike

    def picture(self, items: list[dict]) -> Tensor:
        """Draw a frame of each clip, enlarged without a network and with it, and the real one."""
        frames = torch.stack([item["video"] for item in items]).to(self.model.device)
        small = cascade.downsample(frames)  # (n, 1, 3, h, w)
        context = self.model.encode_text([item["caption"] for item in items])
        enlarged = self.network.sample(small, context)
        bicubic = cascade.upsample_bicubic(small).clamp(-1, 1)
        return torch.cat([bicubic, enlarged, frames], dim=1).cpu()


STAGES = {stage.name: stage for stage in (Vae, Image, Video, Interpolate, Upscale)}
BASE_STAGES = ("vae", "image", "video")  # of a run without --stage, in this order


def mix(clips: Source, pictures: Source | None, frames: int) -> list[Source]:
    """Return what a step reads in turn: single frames come from clips and from stills."""
    return [clips, pictures] if pictures and frames == 1 else [clips]


def spread(sources: list[ClipDataset], count: int) -> list[dict]:
    """Return `count` items of data sets in turn, spread over their captions; fewer if there are."""
    chosen = []
    for source in sources:
        n = len(source.captions)  # item i has caption i; of the shapes more items follow
        share = min(max(count // len(sources), 1), n)
        chosen.append([source[i * n // share] for i in range(share)])
    return [item for items in zip_longest(*chosen) for item in items if item]


def encode_clips(model: MagicVideo, clips: ClipDataset, count: int) -> list[dict]:
    """Encode cuts of clips once to {"z0", "caption", "fps"}; processes share the work.

    Every clip is cut at least once, and again until there are `count`; a still is encoded once.
    """
    count = max(count, len(clips.captions))
    if clips.frames == 1:
        count = min(count, len(clips))
    rank, processes = process_rank(), process_count()
    items = []
    for n in tqdm(range(rank, count, processes), "encoding", leave=False, disable=rank > 0 or None):
        clips.set_epoch(n // len(clips))
        item = clips[n % len(clips)]
        z0 = model.encode(item.pop("video")[None])[0].cpu()
        items.append({**item, "z0": z0})
    shares = [items]
    if processes > 1:
        shares = [None] * processes
        dist.all_gather_object(shares, items)
    return [shares[n % processes][n // processes] for n in range(count)]
