"""Trains MagicVideo, all stages in one plain loop: `python train.py` makes a working model of the embedded shapes.

    vae     VideoVAE: reconstruction + KL                                              (paper §3, VideoVAE)
    image   the U-Net's image part on single frames, text to image                    (paper §3, image start)
    video   all of the U-Net on clips with their FPS, started from the image stage    (paper §3.2)

and, asked for one by one, what follows the key frames:

    interpolate   a U-Net for the frames between two key frames, started from theirs  (paper §3, interpolation)
    upscale       a U-Net in pixels for frames four times the size                    (paper §3, super-resolution)

A stage trains its parts, keeps a moving average of their weights, and hands that average to the next stage. Everything
random in a step is drawn from (seed, stage, step, place in the batch), so a resumed run goes on as if it had never
stopped, and several processes train as one does (`parallel.py`). Where a step's clips come from is in `batches.py`.
"""

import argparse
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: programs on the same cores wait without spinning

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from batches import Frames, Latents, encode, indices, latents_of, read, rng, share
from cascade import BETWEEN, FACTOR
from data import ClipFolder, InputError, ShapesDataset, check_clips
from losses import unet_loss, vae_frames, vae_loss
from magicvideo import PRESETS, MagicVideo, choose_device, read_checkpoint, write_checkpoint
from optim import MovingAverage, learning_rate, make_optimizers
from parallel import (average_over_ranks, backward, join, keep_freed_memory, leave, own_device, rank, restarted,
                      world)
from progress import curves, forget, log, picture
from settings import EVERY, LATER, PRESET_SETTINGS, STAGES, Settings, check, read_flags
from stable_diffusion import is_new_part
from unet3d import Level

# ----------------------------------------------------------------------------------------------------------------------
# A stage


def trained_parts(model: MagicVideo, stage: str, s: Settings) -> list[dict]:
    """What a stage trains, as groups of an optimizer, "factor" times the learning rate each.

    Stable Diffusion's text encoder and VAE encoder stay as they are, and with --train new all of its weights; without
    them the text encoder trains with the U-Net. The new parts start at zero and have far to go in few steps, so
    they can learn faster (both ours). Raises InputError for a --freeze that names no weight, or leaves none to train.
    """
    part = {"vae": model.vae, "interpolate": model.interpolator, "upscale": model.upscaler}.get(stage, model.unet)
    frozen = [piece for piece in s.freeze.split(",") if piece]
    for piece in frozen:
        if not any(piece in name for name, _ in model.named_parameters()):
            raise InputError(f'--freeze "{piece}": no weight has that in its name; try adaptor, or temporal')
    free = [(name, p) for name, p in part.named_parameters() if not any(piece in name for piece in frozen)
            and not (s.decoder_only and name.startswith(("encoder.", "quant_conv.")))]
    new, image = ([p for name, p in free if is_new_part(name) == kind] for kind in (True, False))
    if not free:
        raise InputError(f'--freeze "{s.freeze}": leaves nothing to train in stage {stage}; freeze less')
    if stage == "vae":  # Stable Diffusion's latents must stay what its U-Net knows
        return [{"params": new if model.config.pretrained and not s.decoder_only else image + new, "factor": 1.0}]
    text = [] if model.config.pretrained or stage in LATER else list(model.text_encoder.parameters())
    groups = [] if s.train == "new" else [{"params": image + text, "factor": 1.0}]
    if stage in ("video", "interpolate"):
        groups.append({"params": new, "factor": s.new_parts_lr})
    return groups


def measure_scaling(model: MagicVideo, clips: Dataset, s: Settings) -> float:
    """1 / standard deviation of the latents of 64 clips, so that diffusion sees about N(0, 1) (as SD's 0.18215)."""
    some = torch.randperm(len(clips), generator=rng(s.seed, 0, 2))[:64].tolist()
    items = [encode(model, clips[i]) for i in some]
    mean, logvar = (torch.cat([item[name] for item in items]) for name in ("mean", "logvar"))
    return float(1 / (mean.var() + s.latent_noise**2 * logvar.exp().mean()).sqrt())


@contextmanager
def stop_signals():
    """A list that fills on Ctrl-C or SIGTERM, so that the step at hand is finished and saved first."""
    stop = []
    before = {s: signal.signal(s, lambda *_: stop.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def step_batches(model: MagicVideo, source: Dataset, stage: str, s: Settings, first: int):
    """What this rank reads in each step from `first` on: lists of (place in the batch of all ranks, (epoch, item))."""
    for step in range(first, s.steps(stage)):
        size = s.batch_size * (source.frames if isinstance(source, Frames) else 1)
        if stage == "vae":
            size = max(1, s.vae_batch_size // vae_frames(model, step, s))
        yield share(indices(len(source), size * world(), step, s.seed, EVERY.index(stage)))


def prepare(model: MagicVideo, stage: str, s: Settings, resumed: dict | None) -> tuple[list, list, MovingAverage, int]:
    """What a stage needs: the weights that it trains, their optimizers and moving average, and its first step.

    New, or as they were in `resumed`, a checkpoint.
    """
    groups = trained_parts(model, stage, s)
    parameters = [p for group in groups for p in group["params"]]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    for module in model.modules():
        if isinstance(module, Level):
            module.checkpointing = s.gradient_checkpointing
    optimizers, average = make_optimizers(model, groups, s.muon_lr > 0), MovingAverage(parameters, s.ema)
    if not resumed:
        return parameters, optimizers, average, 0
    for optimizer, state in zip(optimizers, resumed["optimizers"]):
        optimizer.load_state_dict(state)
    average.count, average.values = resumed["step"], [value.to(model.device) for value in resumed["average"]]
    return parameters, optimizers, average, resumed["step"]


def train_stage(model: MagicVideo, clips: Dataset, source: Dataset, stage: str, s: Settings, out: Path,
                resumed: dict | None) -> None:
    """Trains one stage (paper §3) on `source`, `clips` or their latents; leaves the weights' average in the model.

    Stopped by a signal it finishes the step, saves, and raises KeyboardInterrupt.
    """
    parameters, optimizers, average, first = prepare(model, stage, s, resumed)
    steps, highest = s.steps(stage), s.vae_lr if stage == "vae" else s.lr
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16, s.precision == "bf16", cache_enabled=False)
    together = min(s.parts, torch.get_num_threads()) if model.device.type == "cpu" and not s.compile else 1
    if stage == "image" and isinstance(source, Latents):
        source = Frames(source)  # of different clips
    reader = read(source, step_batches(model, source, stage, s, first), 0 if isinstance(source, Latents) else s.workers)
    started, waited, lead = time.time(), 0.0, rank() == 0
    bar = tqdm(range(first, steps), desc=f"{stage:6}", initial=first, total=steps, unit="step", dynamic_ncols=True,
               disable=not lead)
    with (stop_signals() as stop, closing(reader),
          ThreadPoolExecutor(together, "part", torch.set_flush_denormal, (True,)) as pool):
        for step in bar:
            for optimizer, top in zip(optimizers, (highest, s.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = group["factor"] * learning_rate(step, steps, top, s.warmup)
            asked = time.time()
            items = next(reader)
            waited += time.time() - asked
            if stage == "vae":
                losses = [(1.0, lambda: (vae_loss(model, items, step, s), []))]
            else:
                items = items if stage == "upscale" else latents_of(model, items, stage)
                parts = [items[k :: s.parts] for k in range(min(s.parts, len(items)))]
                losses = [(len(part) / len(items), partial(unet_loss, model, part, step, s, stage)) for part in parts]
            loss, bands = backward(losses, parameters, pool, autocast)
            shared = torch.tensor([loss, len(stop)]).to(parameters[0])
            average_over_ranks([shared, *(p.grad for p in parameters if p.grad is not None)])
            loss, stop_of_all = shared.tolist()
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step} of stage {stage}: lower "
                                 f"--{'vae-lr' if stage == 'vae' else 'lr'}; {out} keeps its last checkpoint")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update()

            last = step + 1 == steps
            stopping = bool(stop if world() == 1 else stop_of_all)  # a signal from here on is for the next step
            if lead:
                bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                rate, seconds = optimizers[0].param_groups[0]["lr"], time.time() - started
                log(out / "log.csv", stage, step + 1, loss, rate, seconds, bands, waited)
            save = lead and (last or stopping or (step + 1) % s.save_every == 0)
            show = lead and s.sample_every and (last or (step + 1) % s.sample_every == 0)
            if save:
                write_checkpoint(out / "checkpoint.pt", {
                    "format": "magicvideo-training", "settings": json.dumps(asdict(s)), "stage": stage,
                    "step": step + 1, "model": model.contents(), "average": average.values,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
            if save or show:
                average.swap()
                if save:
                    model.save(out / "model.pt")
                if show:
                    curves(out / "log.csv", out / "loss.png")
                    picture(out / "samples" / f"{stage}-{step + 1:06d}.png", model, clips, stage)
                average.swap()
            if stopping:
                raise KeyboardInterrupt
        if stop and world() == 1:  # while the last step was saved
            raise KeyboardInterrupt
    average.swap()
    if stage == "vae" and not (model.config.pretrained or s.decoder_only):
        model.config.vae.scaling_factor = measure_scaling(model, clips, s)


# ----------------------------------------------------------------------------------------------------------------------
# A run


def new_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, -3 and so on: the first that does not exist."""
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


def report(folder: str, frames: int) -> None:
    """--check-data: a line for every clip that cannot be used; raises InputError if there is one."""
    if folder == "shapes":
        raise InputError("--check-data: the embedded shapes are no files; add --data FOLDER")
    bad = check_clips(folder, frames)
    print(*bad, sep="\n")
    if bad:
        raise InputError(f"--check-data: {folder} cannot be used as it is, see the {len(bad)} lines above")
    print(f"{folder}: every clip can be decoded and has {frames} frames or more")


def run_of(flags: argparse.Namespace, given: dict) -> tuple[Settings, Path, dict | None]:
    """A new run or one that goes on: its settings, its folder, and the checkpoint it goes on from.

    Raises InputError where a new run would write over another, and where one goes on with other settings.
    """
    if not (flags.resume or restarted() and (Path(flags.out or "") / "checkpoint.pt").is_file()):
        preset = "paper" if Path(given.get("init_from") or "-").is_dir() else given.get("preset", "tiny")
        s = Settings(**{**PRESET_SETTINGS.get(preset, {}), **given})
        check(s)
        out = Path(flags.out) if flags.out else new_folder(Path(s.data).resolve().name)
        if (out / "checkpoint.pt").exists() or (out / "model.pt").exists():
            raise InputError(f"--out {out} holds a run already: add --resume to go on with it, or name another folder")
        return s, out, None
    out = Path(flags.out or "")
    if not flags.out or not (out / "checkpoint.pt").is_file():
        raise InputError(f"--resume: no checkpoint.pt in {flags.out or '--out'}; name a run's folder with --out")
    resumed = read_checkpoint(out / "checkpoint.pt", "magicvideo-training")
    try:
        s = Settings(**json.loads(resumed["settings"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{out}/checkpoint.pt: of another version than this code ({error}); start anew with "
                         f"--init-from {out}/model.pt, or use the code that wrote it") from error
    for name, value in given.items():
        if value != getattr(s, name):
            raise InputError(f"--{name.replace('_', '-')} {value}: the run in {out} was started with "
                             f"{getattr(s, name)} and goes on with it; leave the flag out")
    return s, out, resumed


def start_from(path: str, frames: int) -> MagicVideo:
    """--init-from: a Stable Diffusion folder, made ready for `frames` (0 = 16), or a model.pt, which knows its own."""
    if Path(path).is_dir():
        return MagicVideo.from_stable_diffusion(path, frames or 16)
    model = MagicVideo.load(path)
    if frames not in (0, model.config.unet.frames):
        raise InputError(f"--frames {frames}: {path} makes {model.config.unet.frames} frames, and its adaptors hold "
                         f"one scale and shift for each (paper §3.2.1); leave it out")
    return model


def main(arguments: list[str] | None = None) -> None:
    """Set-up, the stages, a last line that says where everything is."""
    flags, given = read_flags(arguments)
    torch.set_flush_denormal(True)  # numbers near zero, which many weights become, would make a CPU slow
    keep_freed_memory()
    device = own_device(choose_device(flags.device))
    join(device)
    say = print if rank() == 0 else lambda text: None
    if world() > 1 and not flags.out:
        raise InputError("torchrun: add --out FOLDER, so that all processes, and a run that is restarted, find it")

    s, out, resumed = run_of(flags, given)
    if flags.check_data:
        return report(s.data, s.frames or PRESETS[s.preset].unet.frames)
    torch.manual_seed(s.seed)
    # three ways to start: from a run's checkpoint, from a model, from nothing
    model = None
    if resumed:
        model = MagicVideo.from_contents(resumed.pop("model"), out / "checkpoint.pt")
    elif s.init_from:
        model = start_from(s.init_from, s.frames)

    config = model.config if model else PRESETS[s.preset]
    frames = s.frames or config.unet.frames
    frames, size, between = {"interpolate": (BETWEEN + 2, config.size, BETWEEN),
                             "upscale": (1, FACTOR * config.size, 0)}.get(s.stage, (frames, config.size, 0))
    if s.data == "shapes":
        clips = ShapesDataset("train", frames, size, s.seed, between=between)
    else:
        clips = ClipFolder(s.data, frames, size, s.seed)
        say(clips.summary())
    model = model or MagicVideo.from_preset(s.preset, frames, [caption for caption in clips.captions if caption])
    if s.stage in LATER:
        model.add_later(s.stage)
    elif model.config.later and not s.decoder_only:
        say(f"{', '.join(model.config.later)}: learned with the text and latents of before; train them anew")
    model = model.to(device).train()
    if s.compile:
        for unet in (model.unet, model.interpolator, model.upscaler):
            if unet:
                unet.compile()

    stages = [s.stage] if s.stage else [x for x in STAGES if x != "image" or not model.config.pretrained]
    stages = [stage for stage in stages if s.steps(stage)]
    if resumed:
        stages = stages[stages.index(resumed["stage"]):]
        if rank() == 0:
            forget(out / "log.csv", resumed["stage"], resumed["step"])
        say(f"resumed at step {resumed['step']} of stage {resumed['stage']}")
    started, source = time.time(), clips
    count = s.cache if s.data == "shapes" else max(s.cache, len(clips))  # of a folder every clip, the more often cut
    try:
        for stage in stages:
            if stage not in ("vae", "upscale") and source is clips and s.cache:
                source = Latents(model, clips, count, out / "latents.pt")
            train_stage(model, clips, source, stage, s, out, resumed if resumed and stage == resumed["stage"] else None)
    except RuntimeError as error:  # torch says so wherever the program is at that moment
        if "DataLoader worker" not in str(error):
            raise
        raise InputError(f"--workers {s.workers}: a process that reads clips has ended ({str(error).splitlines()[0]}); "
                         f"go on with: python train.py --resume --out {out}") from error
    except KeyboardInterrupt:
        saved = (out / "checkpoint.pt").exists()
        raise InputError(f"stopped; go on with: python train.py --resume --out {out}" if saved
                         else "stopped before the first checkpoint; nothing was written") from None
    if rank() == 0:
        model.save(out / "model.pt")
    leave()
    prompt = next((caption for caption in clips.captions if caption), "")
    pictures = f", pictures in {out}/samples" if s.sample_every else ""
    say(f"done in {(time.time() - started) / 60:.1f} minutes: {out}/model.pt{pictures}, losses in {out}/log.csv\n"
          f'next: python sample.py "{prompt}" --checkpoint {out}/model.pt')


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
