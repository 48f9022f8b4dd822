"""Trains MagicVideo in one plain loop: `python train.py` makes a working model of the shapes.

    vae           VideoVAE: reconstruction + KL                              (paper §3, VideoVAE)
    image         the U-Net's image part on single frames, text to image     (paper §3, image start)
    video         the whole U-Net on clips with their FPS                    (paper §3.2)
    interpolate   by --stage alone: the frames between two key frames        (paper §3)
    upscale       by --stage alone: frames of four times the size            (paper §3)

A stage hands the moving average of its weights on. All random numbers of a step are drawn from
(seed, stage, step) for the whole batch, of which each process takes its shard: a resumed run goes
on as if it had never stopped, and several processes train as one does.
"""

import argparse
import csv
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of torch.distributed

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cascade
from clip_files import film_strip, write_clip
from data import ClipDataset, open_data
from magicvideo import PRESETS, MagicVideo
from runs import (InputError, claim_folder, join_ranks, load_checkpoint, pick_device, plot_losses, run_command,
                  save_checkpoint, start_ranks, stop_signals)
from stable_diffusion import is_video_parameter
from tiny import EMA, build_optimizers, encode_clips, set_learning_rates
from unet3d import Level

BASE_STAGES = ("vae", "image", "video")
ALL_STAGES = BASE_STAGES + cascade.CASCADE_STAGES

# --------------------------------------------------------------------------------------------------
# Settings


def flag(default, text: str):
    """Make a field of Settings and the flag of the same name, with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Hyperparameters of a run, each a flag of train.py; the defaults are those of preset tiny."""

    preset: str = flag("tiny", "sizes and defaults: tiny, laptop (for a folder), small or paper")
    stage: str = flag("", f"one of {', '.join(ALL_STAGES)} (default: the first three)")
    init_from: str = flag("", "model.pt or Stable Diffusion folder to start from")
    trainable: str = flag("", 'train only parameters that match, e.g. "adaptor|temporal|fps"')
    frames: int = flag(0, "frames of a clip; 0 = as the preset")
    vae_steps: int = flag(400, "training steps of stage vae; 0 leaves it out")
    image_steps: int = flag(100, "training steps of stage image")
    video_steps: int = flag(900, "training steps of stage video")
    interpolate_steps: int = flag(1000, "training steps of stage interpolate")
    upscale_steps: int = flag(1000, "training steps of stage upscale")
    batch_size: int = flag(32, "clips per step, of all processes (stage image: times the frames)")
    vae_batch_size: int = flag(16, "frames per step of stage vae")
    accumulate: int = flag(1, "micro-batches per step: less memory, more time")
    lr: float = flag(2.5e-3, "peak learning rate of AdamW")
    muon_lr: float = flag(0.01, "peak learning rate of Muon, for weight matrices; 0 = AdamW")
    warmup: int = flag(50, "steps over which the learning rate rises")
    ema: float = flag(0.995, "decay of the moving average of the weights")
    kl_weight: float = flag(2e-3, "weight of the VAE's KL term")
    text_dropout: float = flag(0.05, "fraction of captions dropped, for guidance")
    precision: str = flag("fp32", "fp32, or bf16 with weights in float32")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass")
    data: str = flag("shapes", 'folder of clips, or "shapes"')
    skip_unusable: bool = flag(False, "leave out clips that are damaged or too short")
    max_frames: int = flag(1000, "frames read of each clip, from its start")
    held_out: str = flag("", "file that names the clips held out (default: every tenth)")
    frame_store: str = flag("runs/frames", "where the decoded frames of a folder are kept")
    cache: int = flag(3600, "cuts of clips whose latents stay in memory; 0 = encode every step")
    save_every: int = flag(500, "steps between checkpoints")
    sample_every: int = flag(500, "steps between pictures and held-out losses; 0 = none")
    seed: int = flag(0, "of weights, data and noise")


GROUPS = {"preset": "what", "vae_steps": "how long", "batch_size": "optimisation", "data": "data",
          "save_every": "run"}  # of flags, by their first one
GPU_SETTINGS = {"cache": 0, "muon_lr": 0.0, "kl_weight": 1e-4, "text_dropout": 0.1,
                "interpolate_steps": 50_000, "upscale_steps": 50_000}
PRESET_SETTINGS = {
    "laptop": {"batch_size": 16, "muon_lr": 0.02, "text_dropout": 0.1, "vae_steps": 3500,
               "image_steps": 2500, "video_steps": 2500, "cache": 6000, "kl_weight": 5e-4},
    "small": {**GPU_SETTINGS, "batch_size": 8, "vae_batch_size": 16, "lr": 2e-4, "ema": 0.9995,
              "warmup": 500, "vae_steps": 30_000, "image_steps": 50_000, "video_steps": 100_000},
    "paper": {**GPU_SETTINGS, "batch_size": 1, "vae_batch_size": 8, "lr": 5e-5, "ema": 0.9999,
              "warmup": 1000, "vae_steps": 50_000, "image_steps": 100_000, "video_steps": 200_000,
              "precision": "bf16", "gradient_checkpointing": True},
}


def read_flags(arguments: list[str]) -> tuple[argparse.Namespace, dict]:
    """Parse the command line -> all flags, and those of them that are settings."""
    parser = argparse.ArgumentParser(usage="python train.py [--FLAG VALUE ...], see --help")
    for f in fields(Settings):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        shown = f" (default: {f.default})" if f.default != "" else ""
        group.add_argument("--" + f.name.replace("_", "-"), **kind, default=argparse.SUPPRESS,
                           help=f.metadata["help"] + shown)
    group.add_argument("--out", help="folder (default: a new one, runs/DATA, runs/DATA-2 ...)")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out")
    group.add_argument("--device", help="cuda, mps or cpu (default: the first that is there)")
    group.add_argument("--ranks", type=int, help="processes on a CPU (default: 1, 2 or 4)")
    flags = parser.parse_args(arguments)
    return flags, {f.name: getattr(flags, f.name) for f in fields(Settings) if f.name in flags}


def check(s: Settings) -> None:
    """Raise InputError for a setting out of range, before anything is made."""
    choices = {"preset": [*PRESETS], "stage": ["", *ALL_STAGES], "precision": ["fp32", "bf16"]}
    highest = {"ema": 1, "text_dropout": 1, "seed": 2**32 - 1}
    for name, value in asdict(s).items():
        least = int(name in ("batch_size", "vae_batch_size", "accumulate", "save_every",
                             "max_frames"))
        most = highest.get(name, 2**62)
        if value not in choices.get(name, [value]):
            raise InputError(f'--{name} "{value}": use {", ".join(filter(None, choices[name]))}')
        if not isinstance(value, str) and not least <= value <= most:
            raise InputError(f"--{name.replace('_', '-')} {value}: give {least} to {most}")
    try:
        re.compile(s.trainable)
    except re.error as error:
        raise InputError(f'--trainable "{s.trainable}": {error}') from error
    if s.held_out and not Path(s.held_out).is_file():
        raise InputError(f"--held-out {s.held_out}: no such file; name one of clips, one a line")
    stages = [s.stage] if s.stage else BASE_STAGES
    if not any(getattr(s, f"{stage}_steps") for stage in stages):
        raise InputError(f"--{stages[-1]}-steps 0: trains nothing; give 1 or more")
    if s.stage not in ("", "vae") and not s.init_from:
        raise InputError(f"--stage {s.stage}: needs a trained model; add --init-from MODEL.pt")


# --------------------------------------------------------------------------------------------------
# What a step reads


def rank() -> int:
    """Return which of the processes this is, 0 where it is the only one."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def make_generator(seed: int, stage: str, *position: int) -> torch.Generator:
    """Make the generator of a position in the run, the same whenever it is asked for."""
    number = seed
    for part in (ALL_STAGES.index(stage), *position):
        number = (number * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(number)


def read_batch(clips: ClipDataset | list[dict], size: int, step: int, stage: str, s: Settings,
               shard: slice = slice(None)) -> tuple[list[dict], Callable]:
    """Read a shard of a batch, and make the function that draws its random numbers.

    random(torch.randn, 3, 4) draws for the whole batch and keeps the shard, (b, 3, 4).
    """
    items = []
    orders = {}
    for n in range(size)[shard]:  # every item once an epoch, each epoch shuffled anew
        epoch, position = divmod(step * size + n, len(clips))
        if epoch not in orders:
            generator = make_generator(s.seed, stage, 0, epoch)
            orders[epoch] = torch.randperm(len(clips), generator=generator)
        if isinstance(clips, ClipDataset):  # not latents
            clips.set_epoch(epoch)
        items.append(clips[int(orders[epoch][position])])
    return items, make_random(make_generator(s.seed, stage, 1, step), size, shard)


def make_random(generator: torch.Generator, size: int, shard: slice = slice(None)) -> Callable:
    """Make a function that draws for a batch of `size` and keeps a shard of it."""
    return lambda draw, *shape: draw((size, *shape), generator=generator)[shard]


class StageLoss(nn.Module):
    """What each stage minimises, as one module for DistributedDataParallel.

    Items of a data set -> the error of each clip (b,), and its timesteps (b,) or None.
    """

    def __init__(self, model: MagicVideo, network: nn.Module, stage: str, s: Settings):
        super().__init__()
        self.model = model
        self.network = network
        self.stage = stage
        self.s = s

    def forward(self, items: list[dict], random: Callable,
                frames: int) -> tuple[Tensor, Tensor | None]:
        """Compute the loss of the stage on `frames` frames in a row of each clip."""
        weight = self.model.unet.conv_in.weight  # has the device and type of all inputs
        clips = [item["z0"] if "z0" in item else item["video"] for item in items]
        # stage image trains on first frames: with the causal mask frame 1 sees itself alone (ours)
        num_starts = 1 if self.stage == "image" else len(clips[0]) - frames + 1
        first = random(partial(torch.randint, num_starts))
        x = torch.stack([clip[i : i + frames] for clip, i in zip(clips, first)]).to(weight)
        if self.stage == "vae":
            return self.vae(x, random), None
        if "video" in items[0] and self.stage != "upscale":
            x = self.model.encode(x)
        captions = ["" if u < self.s.text_dropout else item["caption"]  # for guidance
                    for u, item in zip(random(torch.rand), items)]
        context = self.model.encode_text(captions)
        fps = torch.tensor([item["fps"] for item in items], device=weight.device)
        fps = None if self.stage == "image" else fps
        t = random(partial(torch.randint, self.model.diffusion.num_steps))
        if self.stage in cascade.CASCADE_STAGES:
            return self.network.loss(x, context, fps, t, random), t
        # || eps - eps_hat(z_t, t, context, fps) ||^2 (paper §3.2)
        eps = random(torch.randn, *x.shape[1:]).to(x)
        return self.model.diffusion.loss(self.network, x, context, fps, t, eps), t

    def vae(self, video: Tensor, random: Callable) -> Tensor:
        """Reconstruction + KL (paper §3, VideoVAE; squared error, not LPIPS, is ours)."""
        mean, logvar = self.network.encode(video)
        eps = random(torch.randn, *mean.shape[1:]).to(mean)
        decoded = self.network.decode(self.network.sample_latents(mean, logvar, eps))
        # KL(q(z | frame) || N(0, 1)) = (mean^2 + sigma^2 - 1 - log sigma^2) / 2
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean((1, 2, 3, 4))
        return (decoded - video).square().mean((1, 2, 3, 4)) + self.s.kl_weight * kl


# --------------------------------------------------------------------------------------------------
# A stage


def parameter_groups(model: MagicVideo, network: nn.Module, stage: str, s: Settings) -> list[dict]:
    """Return two parameter groups, image and video weights, each with the step it begins at.

    Of Stable Diffusion the text encoder and the image part of the VAE are never trained; otherwise
    the text encoder trains with the U-Net. Raises InputError for a --trainable that leaves none.
    """
    named = dict(network.named_parameters())
    if stage in ("image", "video") and not model.config.pretrained:
        named |= {f"text_encoder.{name}": p for name, p in model.text_encoder.named_parameters()}
    chosen = [name for name in named if re.search(s.trainable, name)]
    image = [name for name in chosen if not is_video_parameter(name)]
    video = [name for name in chosen if is_video_parameter(name)]
    if stage == "vae" and model.config.pretrained:  # latents must stay what the U-Net knows
        image = []
    if stage == "image":
        video = []
    if not image and not video:
        raise InputError(f'--trainable "{s.trainable}": matches nothing that stage {stage} trains')
    # Stage vae sees single frames first, since frames of a clip are nearly duplicates, and clips in
    # its last fifth, for the temporal layers; with a frozen encoder clips alone.
    start = int(0.8 * s.vae_steps) if any(name.startswith("encoder.") for name in image) else 0
    return [{"params": [named[name] for name in image], "start": 0},
            {"params": [named[name] for name in video], "start": start}]


def prepare(model: MagicVideo, network: nn.Module, stage: str, s: Settings,
            resumed: dict | None) -> tuple[list[torch.optim.Optimizer], EMA]:
    """Return the optimizers and the moving average of a stage: new, or as they were saved."""
    groups = parameter_groups(model, network, stage, s)
    parameters = [p for group in groups for p in group["params"]]
    for module in (model, network):
        module.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizers = build_optimizers([network, model.text_encoder], groups, s.muon_lr > 0)
    ema = EMA(parameters, s.ema)
    if resumed:
        network.load_state_dict(resumed["network"])
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        ema.shadow = [average.to(model.device) for average in resumed["ema"]]
        ema.count = resumed["step"]
    return optimizers, ema


def build_network(model: MagicVideo, stage: str, s: Settings) -> nn.Module:
    """Return the network that a stage trains, with gradient checkpointing if that is asked for."""
    network = model.vae if stage == "vae" else model.unet
    if stage in cascade.CASCADE_STAGES:
        network = cascade.build(model, stage)
    for level in network.modules() if s.gradient_checkpointing else ():
        if isinstance(level, Level):
            level.layer = partial(checkpoint, partial(Level.layer, level), use_reentrant=False)
    return network


def batch_size(stage: str, frames: int, clips: ClipDataset, s: Settings) -> tuple[int, int]:
    """Return the items of a step, of all processes, and its micro-batches (of stage vae fewer)."""
    sizes = {"vae": max(1, s.vae_batch_size // frames), "image": s.batch_size * clips.frames}
    size = sizes.get(stage, s.batch_size)
    return size, math.gcd(size // world(), s.accumulate)


def estimate_minutes(model: MagicVideo, clips: ClipDataset, stage: str, s: Settings) -> float:
    """Time a step of a stage, which changes no weight -> about how long the stage will take."""
    item = clips[0]
    if s.cache and stage not in ("vae", "upscale"):
        item["z0"] = model.encode(item.pop("video")[None])[0].cpu()
    frames = 1 if stage in ("vae", "image") else clips.frames
    size, accumulate = batch_size(stage, frames, clips, s)
    size //= world() * accumulate
    stage_loss = StageLoss(model, build_network(model, stage, s), stage, s)
    for _ in range(3):  # the last counts
        started = time.time()
        with torch.autocast(model.device.type, torch.bfloat16, s.precision == "bf16"):
            errors, _ = stage_loss([item] * size, make_random(torch.Generator(), size), frames)
        errors.mean().backward()
        errors.sum().item()  # waits for a GPU
        stage_loss.zero_grad()
    return (time.time() - started) * accumulate * getattr(s, f"{stage}_steps") / 60


def train_stage(model: MagicVideo, clips: ClipDataset, latents: list[dict], held_out: ClipDataset,
                stage: str, s: Settings, out: Path, resumed: dict | None = None) -> None:
    """Train one stage (paper §3) and leave the moving average of the weights in the model.

    It trains on `latents` of cuts of the clips where there are some, else on the clips.
    Stopped by a signal it finishes the step, saves, and raises KeyboardInterrupt.
    """
    network = build_network(model, stage, s)
    optimizers, ema = prepare(model, network, stage, s, resumed)
    stage_loss = StageLoss(model, network, stage, s)
    compute_loss = stage_loss
    if world() > 1:
        compute_loss = DistributedDataParallel(stage_loss, find_unused_parameters=stage == "vae")
    source = latents or clips
    steps = getattr(s, f"{stage}_steps")
    use_bf16 = s.precision == "bf16"
    started = time.time()
    bar = tqdm(range(ema.count, steps), f"{stage:6}", steps, initial=ema.count, dynamic_ncols=True,
               disable=rank() > 0)
    with stop_signals() as stop:
        for step in bar:
            set_learning_rates(optimizers, (s.lr, s.muon_lr), step, steps, s.warmup)
            clips_begin = optimizers[0].param_groups[1]["start"]
            frames = 1 if stage == "image" or step < clips_begin else clips.frames
            size, accumulate = batch_size(stage, frames, clips, s)
            total = torch.zeros(2)  # the loss of the batch, and how many processes shall stop
            for micro in range(accumulate):
                shard = slice(rank() * accumulate + micro, size, world() * accumulate)
                items, random = read_batch(source, size, step, stage, s, shard)
                with torch.autocast(model.device.type, torch.bfloat16, use_bf16):
                    errors, t = compute_loss(items, random, frames)  # (b,)
                    loss = errors.mean() / accumulate
                loss.backward()
                total[0] += loss.item() / world()
            norm = nn.utils.clip_grad_norm_(ema.parameters, 1.0)
            total[1] = len(stop)
            if world() > 1:
                dist.all_reduce(total)
            if not math.isfinite(total[0] + norm):
                rates = "--lr and --muon-lr" if s.muon_lr else "--lr"
                raise InputError(f"stage {stage}, step {step}: the loss is {total[0]:.4g}, its "
                                 f"gradient {norm:.4g}; lower {rates} ({out} is as last saved)")
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            ema.update()

            bar.set_postfix(loss=f"{total[0]:.4f}", refresh=False)
            if rank() == 0:
                done = step + 1
                row = {"stage": stage, "step": done, "loss": f"{total[0]:.6f}",
                       "learning_rate": f"{optimizers[0].param_groups[0]['lr']:.3e}",
                       "seconds": f"{time.time() - started:.2f}",
                       **loss_by_timestep_bin(errors, t, model.diffusion.num_steps)}
                if s.sample_every and (done == steps or done % s.sample_every == 0):
                    with ema.applied():
                        row["held_out_loss"] = held_out_loss(stage_loss, held_out, frames)
                        picture = out / "samples" / f"{stage}-{done:06d}.png"
                        if stage in BASE_STAGES:
                            with optional(picture):
                                save_samples(picture, model, stage, held_out)
                with optional(f"row {done} of {out}/log.csv"):
                    append_log(out / "log.csv", row)
                if done == steps or total[1] or done % s.save_every == 0:
                    save_run(out, model, network, stage, done, optimizers, ema, clips, s)
            if total[1]:
                raise KeyboardInterrupt
    ema.copy_to_weights()
    hand_over(model, network, stage, clips)


BINS = 4  # of the timestep: t in [0, 250), [250, 500), [500, 750), [750, 1000)
COLUMNS = ("stage", "step", "loss", "held_out_loss", "learning_rate", "seconds",
           *(f"loss_bin_{i}" for i in range(BINS)))


def loss_by_timestep_bin(errors: Tensor, t: Tensor | None, num_steps: int) -> dict[str, str]:
    """Average rank 0's errors (b,) by timesteps t (b,): at high t the caption alone tells much."""
    if t is None:
        return {}
    errors = [errors[(t * BINS // num_steps).to(errors.device) == i] for i in range(BINS)]
    return {f"loss_bin_{i}": f"{e.mean():.6f}" for i, e in enumerate(errors) if len(e)}


def append_log(path: Path, row: dict) -> None:
    """Add a row to log.csv."""
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if not file.tell():
            writer.writeheader()
        writer.writerow(row)


def read_log(path: Path) -> list[dict]:
    """Read the whole rows of log.csv; a kill can have cut off its last one."""
    rows = csv.DictReader(path.read_text().splitlines())
    return [row for row in rows if None not in row.values()]


@contextmanager
def optional(what: str):
    """Go on, and say so, where a record or a picture fails: it must not end a training."""
    try:
        yield
    except Exception as error:
        tqdm.write(f"{what} is left out: {error}", file=sys.stderr)


def hand_over(model: MagicVideo, network: nn.Module, stage: str, clips: ClipDataset) -> None:
    """Keep the cascade's network in the model, or set the scaling factor of a trained VAE."""
    if stage in cascade.CASCADE_STAGES:
        model.cascade[stage] = network.state_dict()
    if stage == "vae" and model.vae.encoder.conv_in.weight.requires_grad:
        # 1 / standard deviation of the latents, as SD's 0.18215 is
        chosen = range(0, len(clips), max(1, len(clips) // 64))[:64]
        clips.set_epoch(0)
        model.config.vae.scaling_factor = 1.0
        latents = [model.encode(clips[i]["video"][None]) for i in chosen]
        model.config.vae.scaling_factor = float(1 / torch.cat(latents).std())


@torch.no_grad()
def held_out_loss(stage_loss: StageLoss, held_out: ClipDataset, frames: int) -> str:
    """Compute the loss on a batch of clips never trained on, with the same noise every time."""
    items = [held_out[i] for i in range(min(len(held_out), 16))]
    random = make_random(torch.Generator().manual_seed(0), len(items))
    return f"{stage_loss(items, random, frames)[0].mean():.6f}"


def save_samples(path: Path, model: MagicVideo, stage: str, clips: ClipDataset) -> None:
    """Draw how far a base stage is: clips and their reconstructions, or samples of ten steps."""
    items = [clips[i] for i in range(min(len(clips), 4))]
    rows = torch.stack([item["video"] for item in items])
    if stage == "vae":
        rows = torch.cat([rows, model.decode(model.encode(rows)).cpu()])
    else:
        captions = [item["caption"] for item in items]
        rows = model.sample(captions, fps=None if stage == "image" else 8, steps=10)
    write_clip(path, film_strip(rows)[None], fps=1)


def save_run(out: Path, model: MagicVideo, network: nn.Module, stage: str, step: int,
             optimizers: list, ema: EMA, clips: ClipDataset, s: Settings) -> None:
    """Write checkpoint.pt, from which the run goes on, and model.pt, as if the stage ended here."""
    save_checkpoint(out / "checkpoint.pt", {
        "format": "magicvideo-training", "settings": json.dumps(asdict(s)),
        "clips": getattr(clips, "names", []), "stage": stage, "step": step, "model": model.state(),
        "network": network.state_dict(), "ema": ema.shadow,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    scaling_factor = model.config.vae.scaling_factor
    with ema.applied():
        hand_over(model, network, stage, clips)
        model.save(out / "model.pt")
    model.config.vae.scaling_factor = scaling_factor
    with optional(out / "loss.png"):
        plot_losses(read_log(out / "log.csv"), out / "loss.png")


# --------------------------------------------------------------------------------------------------
# A run


CAN_CHANGE = ("data", "held_out", "frame_store", "save_every", "sample_every")  # at --resume


def resume(out: Path, overrides: dict) -> tuple[Settings, MagicVideo, dict]:
    """Read settings, model and checkpoint of the run in `out`. InputError for other settings."""
    if not (out / "checkpoint.pt").is_file():
        raise InputError(f"--resume: no checkpoint.pt in {out}; name a run's folder with --out")
    resumed = load_checkpoint(out / "checkpoint.pt", "magicvideo-training")
    try:
        s = Settings(**json.loads(resumed["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out}/checkpoint.pt: made by another version of this code ({error}); "
                         f"start anew with --init-from {out}/model.pt") from error
    for name, value in overrides.items():
        if name in CAN_CHANGE:
            setattr(s, name, value)
        elif value != getattr(s, name):
            raise InputError(f"--{name.replace('_', '-')} {value}: the run in {out} was started "
                             f"with {getattr(s, name)} and goes on with it; leave the flag out")
    check(s)
    return s, MagicVideo.from_state(resumed.pop("model"), out / "checkpoint.pt"), resumed


def start(overrides: dict) -> tuple[Settings, MagicVideo | None]:
    """Make the settings of a new run, and load the model that it starts from, if any."""
    model = None
    if path := overrides.get("init_from"):
        model = MagicVideo.load(path, frames=overrides.get("frames") or None)
        overrides = {"preset": model.config.preset, **overrides}
    elif overrides.get("data", "shapes") != "shapes":
        overrides = {"preset": "laptop", **overrides}
    s = Settings(**{**PRESET_SETTINGS.get(overrides.get("preset"), {}), **overrides})
    check(s)
    return s, model


def scale_steps(s: Settings, overrides: dict, count: int) -> Settings:
    """Shorten the stages for fewer than 1,000 clips, to a quarter at least (ours).

    Ten clips do not need the hours of thousands. A number of steps that a flag gives stays.
    """
    share = min(1, max(0.25, (count / 1000) ** 0.5))
    names = [name for name in ("vae_steps", "image_steps", "video_steps", "cache")
             if name not in overrides]
    return replace(s, **{name: round(share * getattr(s, name)) for name in names})


def describe(model: MagicVideo, clips: ClipDataset, held_out: ClipDataset) -> None:
    """Print what was read of a folder of clips and of their captions."""
    captions = [caption for caption in clips.captions + held_out.captions if caption]
    missing = len(clips) + len(held_out) - len(captions)
    length = model.config.text.context_length
    cut = sum(len(model.tokenizer.encode(caption)) > length - 2 for caption in captions)
    print(*clips.notes, sep="\n")
    print(f"captions: {missing} missing, {len(captions) - len({*captions})} the same as another, "
          f"{cut} cut at {length} tokens; {len(held_out)} clips held out")


def train(model: MagicVideo, clips: ClipDataset, held_out: ClipDataset, s: Settings, out: Path,
          resumed: dict | None) -> None:
    """Train all stages of a run, write its model, and say where everything is."""
    say = print if rank() == 0 else lambda text: None
    started = time.time()
    skipped = "image" if model.config.pretrained else "vae" if s.init_from else ""
    stages = [stage for stage in BASE_STAGES if getattr(s, f"{stage}_steps") and stage != skipped]
    stages = [s.stage] if s.stage else stages
    if skipped == "vae" and not s.stage:
        say(f"the VAE of {s.init_from} stays as it is; --stage vae trains it")
    steps = [f"{getattr(s, f'{stage}_steps')} steps of stage {stage}" for stage in stages]
    say(f"preset {s.preset}: {', '.join(steps)}")
    log = out / "log.csv"
    if resumed:
        position = stages.index(resumed["stage"])
        if rank() == 0:  # the rows after the checkpoint come again
            rows = read_log(log)
            log.write_text("")
            for row in rows:
                append_log(log, row)
                if (row["stage"], int(row["step"])) == (resumed["stage"], resumed["step"]):
                    break
        stages = stages[position:]
        say(f"resumed at step {resumed['step']} of stage {resumed['stage']}")
    minutes = {}
    if not resumed and sum(getattr(s, f"{stage}_steps") for stage in stages) > 100:
        minutes = {stage: estimate_minutes(model, clips, stage, s) for stage in stages}
        longest = max(stages, key=minutes.get)
        say(f"about {sum(minutes.values()):.0f} minutes on this machine; fewer --{longest}-steps "
            f"make it shorter")
    latents = []
    for stage in stages:
        if stage in minutes:
            say(f"stage {stage}: about {minutes[stage]:.1f} minutes")
        if s.cache and not latents and stage not in ("vae", "upscale"):
            cuts = max(s.cache, len(clips.captions))
            latents = encode_clips(model, clips, cuts, rank(), world())
        is_resumed = resumed and stage == resumed["stage"]
        train_stage(model, clips, latents, held_out, stage, s, out, resumed if is_resumed else None)
    if rank() == 0:
        model.save(out / "model.pt")
        losses = [(float(row["held_out_loss"]), row["step"]) for row in read_log(log)
                  if row["stage"] == stages[-1] and row["held_out_loss"]]
        if losses:
            loss, step = min(losses)
            say(f"stage {stages[-1]}: the held-out loss was lowest at step {step}, {loss:.4f}")
    prompt = next((caption for caption in clips.captions if caption), "")
    say(f"done in {(time.time() - started) / 60:.1f} minutes: {out}/model.pt, pictures in "
        f"{out}/samples, losses in {out}/log.csv\nnext: python sample.py {shlex.quote(prompt)} "
        f"--checkpoint {shlex.quote(str(out))}/model.pt")


def main(arguments: list[str], script: str | None = None) -> None:
    """Read the command line and train; on a CPU by several processes of `script`."""
    flags, overrides = read_flags(arguments)
    device = pick_device(flags.device)
    if world() > 1 and not flags.out:
        raise InputError("torchrun: add --out FOLDER, so that all processes find it")
    out = Path(flags.out or "")
    has_run = bool(flags.out) and (out / "checkpoint.pt").exists()
    resumed = None
    if flags.resume and not flags.out:
        raise InputError("--resume: name the run's folder with --out")
    if flags.resume or has_run and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        s, model, resumed = resume(out, overrides)
    elif has_run or flags.out and (out / "model.pt").exists():
        raise InputError(f"--out {out}: holds a run; add --resume to go on, or name another folder")
    else:
        s, model = start(overrides)
    config = model.config if model else PRESETS[s.preset]
    frames = {"interpolate": cascade.NEW_FRAMES + 2, "upscale": 1}.get(
        s.stage, s.frames or config.unet.frames)
    smallest = math.gcd(s.batch_size, max(1, s.vae_batch_size // frames))  # batches, in clips
    count = world()
    if script and device.type == "cpu" and "WORLD_SIZE" not in os.environ:
        count = flags.ranks or math.gcd(smallest, s.batch_size // s.accumulate or 1, os.cpu_count())
    if smallest % count or s.batch_size % (count * s.accumulate):
        raise InputError(f"--batch-size {s.batch_size}, --vae-batch-size {s.vae_batch_size}: give "
                         f"multiples of {count} processes x {s.accumulate} micro-batches, clips of "
                         f"{frames} frames")
    size = config.size * (cascade.SCALE if s.stage == "upscale" else 1)
    rate_multiplier = cascade.NEW_FRAMES + 1 if s.stage == "interpolate" else 1
    clips, held_out = open_data(
        s.data, frames, size, s.seed, rate_multiplier, s.held_out, store=s.frame_store,
        max_frames=s.max_frames, skip_unusable=s.skip_unusable)
    if resumed and resumed.get("clips") not in (None, getattr(clips, "names", [])):
        raise InputError(f"--data {s.data}: its clips are not those that the run began with; name "
                         f"a folder with the same")
    if not resumed and s.data != "shapes":
        s = scale_steps(s, overrides, len(clips))
    log = None
    if rank() == 0:
        out, log = claim_folder(flags.out, Path(s.data).resolve().name)
        if not resumed:
            log.truncate(0)  # of a run that was killed before its first checkpoint
    processes = []
    try:
        if count > world():
            processes = start_ranks(count, [script, *arguments, "--out", str(out)])
        device = join_ranks(device)
        torch.manual_seed(s.seed)
        if not model:
            captions = [caption for caption in clips.captions if caption]
            model = MagicVideo.from_preset(s.preset, s.frames, captions)
            # log sigma^2 starts at -6: with noise of size 1 the decoder would ignore the latents
            nn.init.constant_(model.vae.quant_conv.bias[model.config.vae.latent_channels :], -6.0)
        if rank() == 0 and s.data != "shapes":
            describe(model, clips, held_out)
        train(model.to(device).train(), clips, held_out, s, out, resumed)
    except KeyboardInterrupt:
        saved = (out / "checkpoint.pt").exists()
        command = f"go on with: python train.py --resume --out {shlex.quote(str(out))}"
        raise InputError(f"stopped; {command}" if saved else "stopped, nothing saved yet") from None
    except RuntimeError as error:
        if world() == 1 or "onnection" not in str(error):
            raise
        raise InputError(f"another process has ended; go on with --resume --out {out}") from error
    finally:
        for process in processes:  # they have ended, or wait for this one, which has failed
            process.kill()
        if log:
            log.close()


if __name__ == "__main__":
    run_command("train.py", lambda: main(sys.argv[1:], __file__))
