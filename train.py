"""Trains MagicVideo in one plain loop: `python train.py` makes a working model of the shapes.

What each stage reads, trains and minimises is in `stages.py`. A stage hands the moving average of
its weights on. Read `data.py` next: how clips are cut.
"""

import argparse
import json
import math
import os
import re
import shlex
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no warnings of torch.distributed

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clip_files import write_film_strip
from data import ClipDataset, ClipFolder, Data, open_data, open_pictures
from magicvideo import PRESETS, MagicVideo
from runs import (BINS, EMA, InputError, add_up, append_log, build_optimizers, check_precision,
                  claim_folder, free_memory, join_processes, leave_processes, load_checkpoint,
                  lowest_held_out_loss, pick_device, plot_losses, process_count, process_rank,
                  read_log, run_command, save_checkpoint, set_learning_rates, start_processes,
                  stop_signals, usable_cores)
from stages import BASE_STAGES, STAGES, Draw, Source, Stage, encode_clips, mix, spread

# --------------------------------------------------------------------------------------------------
# Settings


def flag(default, text: str):
    """Make a field of Settings and the flag of the same name, with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """Hyperparameters of a run, each a flag of train.py; the defaults are those of preset tiny."""

    preset: str = flag("tiny", "sizes and defaults: tiny, laptop (for a folder), small or paper")
    stage: str = flag("", f"one of {', '.join(STAGES)} (default: the first three)")
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
    images: str = flag("", 'folder of captioned pictures, or "shapes", beside the clips')
    picture_every: int = flag(10, "with --images: every n-th step of stage video is on pictures; "
                              "0 = none")
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
               "image_steps": 2500, "video_steps": 2500, "interpolate_steps": 1500,
               "upscale_steps": 1500, "cache": 6000, "kl_weight": 5e-4},
    "small": {**GPU_SETTINGS, "batch_size": 8, "vae_batch_size": 16, "lr": 2e-4, "ema": 0.9995,
              "warmup": 500, "vae_steps": 30_000, "image_steps": 50_000, "video_steps": 100_000},
    "paper": {**GPU_SETTINGS, "batch_size": 1, "vae_batch_size": 8, "lr": 5e-5, "ema": 0.9999,
              "warmup": 1000, "vae_steps": 50_000, "image_steps": 100_000, "video_steps": 200_000,
              "precision": "bf16", "gradient_checkpointing": True},
}


# --------------------------------------------------------------------------------------------------
# The loop


def train_stage(stage: Stage, data: Data, latents: list[Source | None], out: Path,
                resumed: dict | None = None) -> None:
    """Train one stage (paper §3) and leave the moving average of the weights in the model.

    It trains on `latents` of clips and of pictures where there are some, else on these. Stopped by
    a signal it finishes the step, saves, and raises KeyboardInterrupt.
    """
    s = stage.s
    clips, pictures = latents or (data.clips, data.pictures)
    optimizers, average = make_optimizers_and_average(stage, resumed)
    compute_loss = stage
    if process_count() > 1:
        # without find_unused_parameters a resumed run would add up gradients in another order
        compute_loss = DistributedDataParallel(stage, find_unused_parameters=True)
    started = time.time()
    bar = tqdm(range(average.count, stage.steps), f"{stage.name:6}", stage.steps,
               initial=average.count, dynamic_ncols=True, disable=process_rank() > 0)
    with stop_signals() as stop:
        for step in bar:
            set_learning_rates(optimizers, (s.lr, s.muon_lr), step, stage.steps, s.warmup)
            sources, size, frames = stage.plan(step, data.clips.frames, clips, pictures)
            total = torch.zeros(2)  # the loss of the batch, and how many processes shall stop
            bins = torch.zeros(2, BINS).double()
            for shard in micro_batches(size, s.accumulate):
                batch, draw = stage.read(sources, step, size, frames, shard)
                share = len(batch.clips) * process_count() / size  # of this process's items
                losses, t = compute_loss(batch, draw)  # (b,)
                loss = losses.mean() * share
                loss.backward()
                total[0] += loss.item() / process_count()
                bins += loss_by_timestep_bin(stage, losses, t, frames)
            norm = nn.utils.clip_grad_norm_(average.parameters, 1.0)
            total[1] = len(stop)
            add_up(total)
            add_up(bins)
            check_finite(stage, step, total[0], norm, out)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update()

            done = step + 1
            bar.set_postfix(loss=f"{total[0]:.4f}", refresh=False)
            if process_rank() == 0:
                row = {"stage": stage.name, "step": done, "loss": f"{total[0]:.6f}",
                       "learning_rate": f"{optimizers[0].param_groups[0]['lr']:.3e}",
                       "seconds": f"{time.time() - started:.2f}", **describe_bins(bins)}
                if s.sample_every and (done == stage.steps
                                       or done % s.sample_every == 0 and not stop):
                    picture = out / "samples" / f"{stage.name}-{done:06d}.png"
                    with average.applied(), record(picture):
                        row["held_out_loss"] = f"{held_out_loss(stage, data, step):.6f}"
                        draw_picture(picture, stage, data)
                with record(out / "log.csv"):
                    append_log(out / "log.csv", row)
                if done == stage.steps or total[1] or done % s.save_every == 0:
                    save_run(out, stage, done, optimizers, average, data)
            if total[1]:
                add_up(total)  # waits for the save: torchrun ends all after the first
                raise KeyboardInterrupt
        late = torch.tensor(len(stop))  # signals that came while the last step was being saved
        add_up(late)
        if late:
            raise KeyboardInterrupt
    average.copy_to_weights()
    stage.finish(data.clips)


def micro_batches(size: int, count: int) -> list[slice]:
    """Return which items of a step this process reads, as at most `count` micro-batches.

    They are dealt out in turn: each micro-batch of each process gets the next item.
    """
    count = max(1, min(count, size // process_count()))
    return [slice(process_rank() * count + i, size, process_count() * count) for i in range(count)]


def micro_batch_size(size: int, count: int) -> int:
    """Return how many items the largest micro-batch of a step has."""
    return len(range(size)[micro_batches(size, count)[0]])


def make_optimizers_and_average(
        stage: Stage, resumed: dict | None) -> tuple[list[torch.optim.Optimizer], EMA]:
    """Return the optimizers and the moving average of a stage: new, or as they were saved."""
    groups = stage.parameter_groups()
    parameters = [p for group in groups for p in group["params"]]
    stage.freeze_the_rest()
    optimizers = build_optimizers([stage.network, stage.model.text_encoder], groups,
                                  stage.s.muon_lr > 0)
    average = EMA(parameters, stage.s.ema)
    if resumed:
        stage.network.load_state_dict(resumed["network"])
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        average.shadow = [p.to(stage.model.device) for p in resumed["ema"]]
        average.count = resumed["step"]
    return optimizers, average


def check_finite(stage: Stage, step: int, loss: Tensor, norm: Tensor, out: Path) -> None:
    """Raise InputError before a loss or gradient that is not finite reaches the weights."""
    if not math.isfinite(loss + norm):
        rates = "--lr and --muon-lr" if stage.s.muon_lr else "--lr"
        raise InputError(f"stage {stage.name}, step {step}: the loss is {loss:.4g}, its gradient "
                         f"{norm:.4g}; lower {rates} ({out} is as last saved)")


def loss_by_timestep_bin(stage: Stage, losses: Tensor, t: Tensor | None, frames: int) -> Tensor:
    """Add up the losses (b,) of clips, and their weights, by timesteps t (b,) -> (2, BINS).

    Bins are quarters of t; the last, where there is little but the caption to go on, shows how much
    the caption helps.
    """
    bins = torch.zeros(2, BINS).double()
    if t is not None:
        index = t * BINS // stage.diffusion.num_steps
        bins[0].index_add_(0, index, losses.detach().cpu().double())
        bins[1].index_add_(0, index, stage.diffusion.loss_weight(t, frames).double())
    return bins


def describe_bins(bins: Tensor) -> dict[str, str]:
    """Turn losses and weights (2, BINS) into columns of log.csv, empty where no clip was."""
    return {f"loss_bin_{i}": f"{loss / weight:.6f}" if weight else ""
            for i, (loss, weight) in enumerate(bins.T.tolist())}


HELD_OUT = 24  # items of the held-out loss: one for each held-out caption of the shapes


@torch.no_grad()
def held_out_loss(stage: Stage, data: Data, step: int) -> float:
    """Compute the loss of what is never trained on, with the same noise every time.

    They come in micro-batches no larger than those of a step, which fit in memory.
    """
    size, frames = stage.plan_batch(step, data.clips.frames)
    items = spread(mix(data.held_out, data.held_out_pictures, frames), HELD_OUT)
    at_once = micro_batch_size(size, stage.s.accumulate)
    total = 0.0
    for i in range(0, len(items), at_once):
        shard = slice(i, i + at_once)
        draw = Draw(torch.Generator().manual_seed(0), len(items), shard)
        batch = stage.batch(items[shard], draw, frames)
        losses, _ = stage(batch, draw)
        total += losses.sum().item()
    return total / len(items)


@torch.no_grad()
def draw_picture(path: Path, stage: Stage, data: Data) -> None:
    """Write a picture of how far the stage is."""
    rows = stage.picture(spread([data.held_out], 4))  # (n, f, 3, h, w)
    write_film_strip(path, rows)


@contextmanager
def record(path: Path):
    """Go on, and say so, where a record cannot be written: it must not end a training."""
    try:
        yield
    except (OSError, InputError) as error:
        tqdm.write(f"{path} is not written: {error}", file=sys.stderr)


def save_run(out: Path, stage: Stage, step: int, optimizers: list, average: EMA,
             data: Data) -> None:
    """Write checkpoint.pt, from which the run goes on, and model.pt, as if the stage ended here."""
    model = stage.model
    save_checkpoint(out / "checkpoint.pt", {
        "format": "magicvideo-training", "settings": json.dumps(asdict(stage.s)),
        "clips": data.names(), "stage": stage.name, "step": step,
        "model": model.state(), "network": stage.network.state_dict(), "ema": average.shadow,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    scaling_factor = model.config.vae.scaling_factor
    with average.applied():
        stage.finish(data.clips)
        model.save(out / "model.pt")
    model.config.vae.scaling_factor = scaling_factor
    with record(out / "loss.png"):
        plot_losses(read_log(out / "log.csv"), out / "loss.png")


# --------------------------------------------------------------------------------------------------
# The run around it


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
    group.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    group.add_argument("--ranks", type=int, help="processes on a CPU (default: 1, 2 or 4)")
    flags = parser.parse_args(arguments)
    return flags, {f.name: getattr(flags, f.name) for f in fields(Settings) if f.name in flags}


def check(s: Settings) -> None:
    """Raise InputError for a setting out of range, before anything is made."""
    choices = {"preset": [*PRESETS], "stage": ["", *STAGES], "precision": ["fp32", "bf16"]}
    highest = {"ema": 1, "text_dropout": 1, "seed": 2**32 - 1}
    for name, value in asdict(s).items():
        least = int(name in ("batch_size", "vae_batch_size", "accumulate", "save_every",
                             "max_frames"))
        most = highest.get(name, 2**62)
        if value not in choices.get(name, [value]):
            raise InputError(f'--{name} "{value}": use {", ".join(filter(None, choices[name]))}')
        if not isinstance(value, str) and not least <= value <= most:
            range_text = f"{least} to {most}" if name in highest else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value}: give {range_text}")
    try:
        re.compile(s.trainable)
    except re.error as error:
        raise InputError(f'--trainable "{s.trainable}": {error}') from error
    if s.held_out and not Path(s.held_out).is_file():
        raise InputError(f"--held-out {s.held_out}: no such file; give a file with one clip name "
                         f"per line")
    if not s.data and (not s.stage or STAGES[s.stage].needs_clips):
        raise InputError(f"--images {s.images}: pictures do not move; add --data FOLDER of clips, "
                         f"or --stage image for a model of pictures alone")
    if s.picture_every == 1 and s.images and s.data:
        raise InputError("--picture-every 1: leaves no step for clips; give 2 or more, or 0")
    after_vae = s.stage in BASE_STAGES and not s.data  # pictures alone
    if s.stage and not (STAGES[s.stage].starts_alone or after_vae or s.init_from):
        raise InputError(f"--stage {s.stage}: needs a trained model; add --init-from MODEL.pt")


# at --resume
CAN_CHANGE = ("data", "images", "held_out", "frame_store", "save_every", "sample_every",
              "accumulate", "gradient_checkpointing")


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
        is_of_own_clips = model.config.preset != "tiny" and not model.config.pretrained
        if is_of_own_clips and not {"data", "images"} & {*overrides}:
            raise InputError(f"--init-from {path}: add --data FOLDER with the clips to train it on")
        overrides = {"preset": model.config.preset, **overrides}
    elif {overrides.get("data", "shapes"), overrides.get("images", "shapes")} != {"shapes"}:
        overrides = {"preset": "laptop", **overrides}
    if overrides.get("images", "shapes") != "shapes":
        overrides = {"data": "", **overrides}
    if overrides.get("stage") in STAGES:
        overrides = {**STAGES[overrides["stage"]].defaults, **overrides}
    s = Settings(**{**PRESET_SETTINGS.get(overrides.get("preset"), {}), **overrides})
    check(s)
    return s, model


def choose_stages(s: Settings, pretrained: bool) -> list[type[Stage]]:
    """Return the stages to run: that of --stage, or of the first three those that a start lacks.

    A start from a model of ours leaves out stage vae, one from Stable Diffusion stage image.
    """
    start = "Stable Diffusion" if pretrained else "ours" if s.init_from else "scratch"
    stages = []
    names = [s.stage] if s.stage else BASE_STAGES
    if not s.data and not s.init_from:  # stage image of pictures alone needs a VideoVAE
        names = BASE_STAGES[: BASE_STAGES.index(s.stage) + 1]
    for name in names:
        stage = STAGES[name]
        if stage.skipped_from == start and not s.stage:
            if process_rank() == 0:
                print(f"stage {name} is left out: {s.init_from} has been through it")
        elif getattr(s, f"{name}_steps"):
            stages.append(stage)
    if not stages:
        raise InputError(f"--{name}-steps 0: trains nothing; give 1 or more")
    return stages


def scale_steps(s: Settings, overrides: dict, count: int, stages: list[type[Stage]]) -> Settings:
    """Shorten the stages for fewer than 1,000 items, to a quarter at least, and say so (ours).

    Ten clips do not need the hours of thousands. A number of steps that a flag gives stays.
    """
    share = min(1, max(0.25, (count / 1000) ** 0.5))
    names = [name for name in [*(f"{stage.name}_steps" for stage in stages), "cache"]
             if name not in overrides]
    if share < 1 and names and process_rank() == 0:
        flags = ", ".join("--" + name.replace("_", "-") for name in names)
        kind = "pictures" if not s.data else "clips and pictures" if s.images else "clips"
        print(f"{count} {kind}, fewer than 1,000: {share:.0%} of the preset's {flags}")
    return replace(s, **{name: round(share * getattr(s, name)) for name in names})


def count_processes(s: Settings, stages: list[type[Stage]], frames: int) -> int:
    """Return how many processes train on a CPU: 1, 2 or 4, with equal parts of every batch."""
    clips = math.gcd(*(stage.fewest_clips(s, frames) for stage in stages))
    fitting = [n for n in (4, 2, 1) if n <= usable_cores() and clips % n == 0]
    return next((n for n in fitting if s.batch_size % (n * s.accumulate) == 0), 1)


def fit_batch(s: Settings, overrides: dict, count: int) -> Settings:
    """Let a default batch have a clip for each micro-batch of each process, and say so.

    Raises InputError for a batch that `overrides` gives and that cannot be shared equally.
    """
    parts = count * s.accumulate
    if s.batch_size % parts == 0:
        return s
    if "batch_size" in overrides or s.batch_size > parts:
        raise InputError(f"--batch-size {s.batch_size}, --accumulate {s.accumulate}: give "
                         f"multiples of {count} processes x {s.accumulate} micro-batches")
    if process_rank() == 0:
        print(f"--batch-size {parts}: one clip for each of {count} processes x {s.accumulate}")
    return replace(s, batch_size=parts)


def describe(model: MagicVideo, folder: ClipFolder, held_out: ClipFolder) -> None:
    """Print what was read of a folder of clips or pictures and of their captions."""
    held_out_captions = held_out.captions if held_out.names != folder.names else []  # one or two
    captions = [caption for caption in folder.captions + held_out_captions if caption]
    missing = len(folder) + len(held_out_captions) - len(captions)
    length = model.config.text.context_length
    cut = sum(len(model.tokenizer.encode(caption)) > length - 2 for caption in captions)
    print(*folder.notes, sep="\n")
    print(f"captions: {missing} missing, {len(captions) - len({*captions})} the same as another, "
          f"{cut} cut at {length} tokens; {len(held_out_captions)} {folder.kind} held out")


def open_all(s: Settings, frames: int, size: int, rate_multiplier: int) -> Data:
    """Open the clips and the pictures of a run; pictures alone take the clips' place."""
    of_folder = {"store": s.frame_store, "skip_unusable": s.skip_unusable}
    if not s.data:
        return Data(*open_pictures(s.images, size, s.seed, s.held_out, **of_folder))
    pictures = open_pictures(s.images, size, s.seed, **of_folder) if s.images else ()
    clips = open_data(s.data, frames, size, s.seed, rate_multiplier, s.held_out,
                      max_frames=s.max_frames, **of_folder)
    return Data(*clips, *pictures)


def new_model(s: Settings, captions: list[str]) -> MagicVideo:
    """Make an untrained model, whose tokenizer learns from the captions."""
    model = MagicVideo.from_preset(s.preset, s.frames, [*filter(None, captions)])
    # log sigma^2 starts at -6: with noise of size 1 the decoder would ignore the latents
    nn.init.constant_(model.vae.quant_conv.bias[model.config.vae.latent_channels :], -6.0)
    return model


def estimate_minutes(stage: Stage, clips: ClipDataset) -> float:
    """Time a step of a stage, which changes no weight -> about how long the stage will take."""
    size, frames = stage.plan_batch(0, clips.frames)
    shards = micro_batches(size, stage.s.accumulate)
    item = clips[0]
    if stage.s.cache and stage.reads_latents:
        item["z0"] = stage.model.encode(item.pop("video")[None])[0].cpu()
    items = [item] * micro_batch_size(size, stage.s.accumulate)
    stage.freeze_the_rest()
    for _ in range(3):  # the last counts
        started = time.time()
        draw = Draw(torch.Generator(), size, shards[0])
        batch = stage.batch(items, draw, frames)
        losses, _ = stage(batch, draw)
        losses.mean().backward()
        losses.sum().item()  # waits for a GPU
        stage.zero_grad()
    return (time.time() - started) * len(shards) * stage.steps / 60


def estimate_memory(stage: Stage, clips: ClipDataset) -> float:
    """Estimate the memory of a training step in this process, in GB.

    What the backward pass keeps of one item, times the items of a micro-batch; and of each weight
    that learns its gradient, its moving average and two moments.
    """
    size, frames = stage.plan_batch(stage.steps - 1, clips.frames)
    count = micro_batch_size(size, stage.s.accumulate)
    stage.freeze_the_rest()
    sizes = {}  # of storages, by address: several tensors can share one

    def pack(x: Tensor) -> Tensor:
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    draw = Draw(torch.Generator(), 1)
    batch = stage.batch([clips[0]], draw, frames)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        losses, _ = stage(batch, draw)  # as long as it lives no address is used twice
    for p in stage.parameters():
        sizes.pop(p.data_ptr(), None)
    learning = sum(p.nbytes for p in stage.chosen().values())
    return (count * sum(sizes.values()) + 4 * learning) / 1e9


def train(stages: list[Stage], data: Data, out: Path, resumed: dict | None) -> None:
    """Train the stages of a run, write its model, and say where everything is."""
    say = print if process_rank() == 0 else lambda text: None
    started = time.time()
    s, model = stages[0].s, stages[0].model
    steps = ", ".join(f"{stage.steps} steps of stage {stage.name}" for stage in stages)
    say(f"preset {s.preset}: {steps}")
    if resumed:
        stages = stages[[stage.name for stage in stages].index(resumed["stage"]) :]
        say(f"resumed at step {resumed['step']} of stage {resumed['stage']}")
    minutes = {}
    if not resumed and sum(stage.steps for stage in stages) > 100:
        # torch itself, and what is freed at once, as measured (ours)
        needed = 0.5 + 1.2 * max(estimate_memory(stage, data.clips) for stage in stages)
        free = free_memory(model.device) / (1 if model.device.type == "cuda" else process_count())
        if needed > free:
            say(f"about {needed:.1f} GB of memory for each process, where {free:.1f} GB are free; "
                f"less takes --accumulate 2 or more, --gradient-checkpointing or a smaller "
                f"--batch-size")
        minutes = {stage.name: estimate_minutes(stage, data.clips) for stage in stages}
        longest = max(minutes, key=minutes.get)
        say(f"about {sum(minutes.values()):.0f} minutes on this machine; fewer --{longest}-steps "
            f"make it shorter")
    latents = []
    for stage in stages:
        if minutes:
            say(f"stage {stage.name}: about {minutes[stage.name]:.1f} minutes")
        if s.cache and not latents and stage.reads_latents:
            latents = [encode_clips(model, source, s.cache) if source else None
                       for source in (data.clips, data.pictures)]
        train_stage(stage, data, latents if stage.reads_latents else [], out, resumed)
        resumed = None
    if process_rank() == 0:
        model.save(out / "model.pt")
        for stage in stages:
            lowest = lowest_held_out_loss(out / "log.csv", stage.name)
            if stage.diffusion and lowest:  # that of stage vae is of frames first, then of clips
                say(f"stage {stage.name}: the held-out loss was lowest at step {lowest}")
    pictures = f", pictures in {out}/samples" if (out / "samples").is_dir() else ""
    prompt = min(filter(None, data.clips.captions), key=len, default="")[:200]
    kind = "" if s.data else " --picture --out picture.png"  # a model of pictures alone
    say(f"done in {(time.time() - started) / 60:.1f} minutes: {out}/model.pt{pictures}, losses in "
        f"{out}/log.csv\nnext: python sample.py {shlex.quote(prompt)} --checkpoint "
        f"{shlex.quote(str(out))}/model.pt{kind}")


def main(arguments: list[str], script: str | None = None) -> None:
    """Read the command line and train; on a CPU by several processes of `script`."""
    flags, overrides = read_flags(arguments)
    device = pick_device(flags.device)
    if flags.ranks is not None and flags.ranks < 1:
        raise InputError(f"--ranks {flags.ranks}: give 1 or more")
    if process_count() > 1 and not flags.out:
        raise InputError("torchrun: add --out FOLDER, so that all processes find it")
    out = Path(flags.out or "")
    resumed = None
    if flags.resume and not flags.out:
        raise InputError("--resume: name the run's folder with --out")
    if flags.resume:
        s, model, resumed = resume(out, overrides)
    elif flags.out and ((out / "checkpoint.pt").exists() or (out / "model.pt").exists()):
        raise InputError(f"--out {out}: holds a run; add --resume to go on, or name another folder")
    else:
        s, model = start(overrides)
    check_precision(device, s.precision)
    config = model.config if model else PRESETS[s.preset]
    classes = choose_stages(s, config.pretrained)
    frames = classes[-1].clip_frames or s.frames or config.unet.frames
    count = process_count()
    if script and device.type == "cpu" and "WORLD_SIZE" not in os.environ:
        count = flags.ranks or count_processes(s, classes, frames)
    batch = {"batch_size": s.batch_size} if resumed else {}  # a resumed run keeps its batch
    s = fit_batch(s, overrides | batch, count)
    data = open_all(s, frames, config.size * classes[-1].scale, classes[-1].rate_multiplier)
    if resumed and resumed["clips"] != data.names():
        folders = f"--data {s.data}" + (f", --images {s.images}" if s.images else "")
        raise InputError(f"{folders}: these are not the clips this run started with; name a folder "
                         f"with the same")
    if not resumed and s.data != "shapes":
        s = scale_steps(s, overrides, sum(map(len, data.trained())), classes)
    torch.manual_seed(s.seed)
    captions = [caption for source in data.trained() for caption in source.captions]
    model = (model or new_model(s, captions)).train()
    stages = [stage(model, s) for stage in classes]
    for stage in stages:
        stage.chosen()  # raises InputError before the first stage for what the last one lacks
    log = None
    processes = []
    if process_rank() == 0:
        for folder, held_out in zip(data[::2], data[1::2]):
            if isinstance(folder, ClipFolder):
                describe(model, folder, held_out)
        out, log = claim_folder(flags.out, Path(s.data or s.images).resolve().name)
        if not resumed:
            log.truncate(0)  # of a run that was killed before its first checkpoint
    try:
        if count > process_count():
            processes = start_processes(count, [script, *arguments, "--out", str(out)])
        device = join_processes(device, processes)
        for stage in stages:
            stage.to(device)
        train(stages, data, out, resumed)
    except KeyboardInterrupt:
        saved = (out / "checkpoint.pt").exists()
        command = f"go on with: python train.py --resume --out {shlex.quote(str(out))}"
        raise InputError(f"stopped; {command}" if saved else "stopped, nothing saved yet") from None
    except RuntimeError as error:
        if re.search("out of memory|allocate memory", str(error)):
            raise InputError("not enough memory; --accumulate 2 or more, --gradient-checkpointing "
                             "or a smaller --batch-size takes less, see --help") from error
        if process_count() == 1 or "onnection" not in str(error):
            raise
        raise InputError(f"another process has ended; go on with --resume --out {out}") from error
    finally:
        leave_processes(processes)
        if log:
            log.close()


if __name__ == "__main__":
    run_command("train.py", lambda: main(sys.argv[1:], __file__))
