"""Trains MagicVideo, all stages in one plain loop: `python train.py` makes a working model of the embedded shapes.

    vae     VideoVAE: reconstruction + KL                                              (paper §3, VideoVAE)
    image   the U-Net's image part on single frames, text to image                    (paper §3, image start)
    video   all of the U-Net on clips with their FPS, started from the image stage    (paper §3.2)

A stage trains its parts, keeps a moving average of their weights, and hands that average to the next stage. Everything
random in a step is drawn from (seed, stage, step), so a resumed run goes on as if it had never stopped.
"""

import ctypes
import json
import math
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from data import ClipFolder, InputError, ShapesDataset
from diffusion import normal
from magicvideo import PRESETS, MagicVideo, choose_device, is_new_part, read_checkpoint, write_checkpoint
from optim import MovingAverage, learning_rate, make_optimizers
from progress import by_band, curves, log, mean_bands, picture
from settings import PRESET_SETTINGS, STAGES, Settings, check, read_flags
from unet3d import Level

# ----------------------------------------------------------------------------------------------------------------------
# What a step sees


def rng(seed: int, *place: int) -> torch.Generator:
    """A generator that depends on the seed and the place in the run alone: the stage, the step or epoch."""
    number = seed
    for part in place:
        number = (number * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(number)


def indices(count: int, batch: int, step: int, seed: int, stage: int) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of a step's batch: every item once an epoch, in an order that is new each epoch."""
    places = range(step * batch, (step + 1) * batch)
    epochs = {place // count for place in places}
    orders = {epoch: torch.randperm(count, generator=rng(seed, stage, 0, epoch)) for epoch in epochs}
    return [(place // count, int(orders[place // count][place % count])) for place in places]


@torch.no_grad()
def encode(model: MagicVideo, clip: dict) -> dict:
    """A clip with its "video" replaced by "mean" and "logvar" of its latents, each (f, 4, h/8, w/8), on the CPU."""
    mean, logvar = model.vae.encode(clip["video"][None].to(model.device))
    return {"mean": mean[0].cpu(), "logvar": logvar[0].cpu(), "caption": clip["caption"], "fps": clip["fps"]}


class Latents(list):
    """Clips through the frozen encoder, once: [i] -> what `encode` returns, the same in every epoch (ours)."""

    def __init__(self, model: MagicVideo, clips: Dataset, count: int):
        super().__init__()
        for i in tqdm(range(count), desc="encode", unit="clip", dynamic_ncols=True):
            clips.set_epoch(i // len(clips))
            self.append(encode(model, clips[i % len(clips)]))

    def set_epoch(self, epoch: int) -> None:
        """Nothing changes."""


def vae_loss(model: MagicVideo, clips: Dataset, step: int, s: Settings) -> Tensor:
    """Reconstruction + KL on one batch (paper §3, VideoVAE; squared error: ours, SD's perceptual terms need weights).

    Single frames of different clips at first, without the temporal layers, since frames of one clip teach little more
    than one of them does; whole clips, for these layers, in the last fifth of the steps, and in all where the image
    part stays as it is (ours).
    """
    image = any(p.requires_grad for name, p in model.vae.named_parameters() if not is_new_part(name))
    f = 1 if image and step < 0.8 * s.vae_steps else clips.frames
    generator, videos = rng(s.seed, 0, 1, step), []
    for epoch, i in indices(len(clips), max(1, s.vae_batch_size // f), step, s.seed, 0):
        clips.set_epoch(epoch)
        first = int(torch.randint(clips.frames - f + 1, (), generator=generator))
        videos.append(clips[i]["video"][first : first + f])
    video = torch.stack(videos).to(model.device)  # (b, f, 3, h, w)
    mean, logvar = model.vae.encode(video)
    z = model.vae.sample_latents(mean, logvar, normal(mean.shape, generator).to(mean))
    # KL(q(z | frame) || N(0, 1)) per latent number
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    loss = F.mse_loss(model.vae.decode(z, temporal=f > 1), video) + s.kl_weight * kl
    # frames of one clip are too much alike to say how latents vary
    return loss + (s.thumbnail * thumbnail_term(mean, video) if s.thumbnail and f == 1 else 0)


def thumbnail_term(mean: Tensor, video: Tensor) -> Tensor:
    """Pulls latents (b, f, 4, h/8, w/8) of video (b, f, 3, h, w) to a form that diffusion learns fast -> scalar.

    Three of them to a small copy of the frame, the others to size one and no correlation with these. Left alone, a VAE
    this small lays its colors on one line, yellow next to orange (ours; see README, "What we saw").
    """
    small = F.adaptive_avg_pool2d(video.flatten(0, 1), mean.shape[-2:]).unflatten(0, video.shape[:2])
    small = 3 * (small - small.mean((0, 1, 3, 4), keepdim=True))  # about as large as the prior, N(0, 1)
    covariance = mean.transpose(0, 2).flatten(1).cov()  # (4, 4)
    free = covariance[3:] - torch.eye(len(covariance)).to(covariance)[3:]
    return F.mse_loss(mean[:, :, :3], small) + free.square().mean()


def unet_batch(model: MagicVideo, clips: Dataset, step: int, s: Settings, stage: str) -> list[tuple]:
    """A step's batch, (mean, logvar, caption, fps) of every clip, or in stage image of as many frames: f a clip.

    Those frames are from different clips where latents are cached; to decode a clip for one frame would be a waste.
    """
    place, f = STAGES.index(stage), model.config.unet.frames
    spread = f if stage == "image" and isinstance(clips, Latents) else 1  # items a clip is split into
    batch = []
    for epoch, i in indices(len(clips) * spread, s.batch_size * spread, step, s.seed, place):
        clips.set_epoch(epoch)
        item = clips[i // spread]
        item = item if "mean" in item else encode(model, item)
        cuts = [slice(None)]  # all frames together
        if stage == "image":  # one by itself, or of a clip that was decoded for them each by itself
            cuts = [slice(k, k + 1) for k in ([i % f] if spread > 1 else range(f))]
        batch += [(item["mean"][cut], item["logvar"][cut], item["caption"], item["fps"]) for cut in cuts]
    return batch


def unet_loss(model: MagicVideo, batch: list[tuple], generator: torch.Generator, s: Settings,
              stage: str) -> tuple[Tensor, list]:
    """The diffusion loss on a batch, or a part of one, of clips (b, f, ...) or frames (b, 1, ...).

    Second comes the same loss by bands of t, for the log.
    """
    means, logvars, captions, fps = zip(*batch)
    mean, logvar = torch.stack(means).to(model.device), torch.stack(logvars).to(model.device)  # (b, f, 4, h/8, w/8)
    noise = s.latent_noise * normal(mean.shape, generator).to(mean)
    z0 = model.vae.sample_latents(mean, logvar, noise)
    kept = torch.rand(len(captions), generator=generator) >= s.text_dropout
    context = model.encode_text([caption if keep else "" for caption, keep in zip(captions, kept)])
    rate = torch.tensor(fps, device=model.device) if stage == "video" else None
    errors, t = model.diffusion.errors(model.unet, z0, context, rate, generator)  # (b, f) each
    return errors[t >= 0].mean(), by_band(errors.detach(), t, model.diffusion.config.steps)


# ----------------------------------------------------------------------------------------------------------------------
# A stage


def trained_parts(model: MagicVideo, stage: str, s: Settings) -> list[dict]:
    """What a stage trains, as groups of an optimizer, "factor" times the learning rate each.

    Stable Diffusion's text encoder and VAE encoder stay as they are, and with --train new all of its weights; without
    them the text encoder trains with the U-Net. The new parts start at zero and have far to go in few steps, so
    they can learn faster (both ours). Raises InputError for a --freeze that names no weight, or leaves none to train.
    """
    part = model.vae if stage == "vae" else model.unet
    frozen = [piece for piece in s.freeze.split(",") if piece]
    for piece in frozen:
        if not any(piece in name for name, _ in model.named_parameters()):
            raise InputError(f'--freeze "{piece}": no weight has that in its name; try adaptor, or temporal')
    free = [(name, p) for name, p in part.named_parameters() if not any(piece in name for piece in frozen)]
    new, image = ([p for name, p in free if is_new_part(name) == kind] for kind in (True, False))
    if not free:
        raise InputError(f'--freeze "{s.freeze}": leaves nothing to train in stage {stage}; freeze less')
    if stage == "vae":  # Stable Diffusion's latents must stay what its U-Net knows
        return [{"params": new if model.config.pretrained else image + new, "factor": 1.0}]
    text = [] if model.config.pretrained else list(model.text_encoder.parameters())
    groups = [] if s.train == "new" else [{"params": image + text, "factor": 1.0}]
    if stage == "video":
        groups.append({"params": new, "factor": s.new_parts_lr})
    return groups


def backward(losses: list[Callable], parameters: list[nn.Parameter], pool: ThreadPoolExecutor,
             autocast: Callable) -> tuple[float, list]:
    """Losses of a batch's parts -> their mean, its gradients going into p.grad, and their mean bands (ours).

    On a CPU each core takes a part of its own, since two cores share the small products of a small network badly; on a
    GPU one part follows the other, which is gradient accumulation: as large a batch in less memory.
    """
    def run(loss: Callable) -> tuple:
        with autocast():
            value, bands = loss()
        return value.item(), bands, torch.autograd.grad(value / len(losses), parameters, allow_unused=True)

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // len(losses)))
    values, bands = [], []
    for value, of_part, gradients in pool.map(run, losses):
        for p, gradient in zip(parameters, gradients):
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad.add_(gradient)
        values.append(value)
        bands.append(of_part)
    torch.set_num_threads(threads)
    return sum(values) / len(values), mean_bands(bands)


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


def train_stage(model: MagicVideo, clips: Dataset, source: Dataset, stage: str, s: Settings, out: Path,
                resumed: dict | None) -> None:
    """Trains one stage on `source`, `clips` or their latents; leaves the moving average of its weights in the model.

    Stopped by a signal it finishes the step, saves, and raises KeyboardInterrupt.
    """
    steps = s.steps(stage)
    highest = s.vae_lr if stage == "vae" else s.lr
    groups = trained_parts(model, stage, s)
    parameters = [p for group in groups for p in group["params"]]
    for p in model.parameters():
        p.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    optimizers = make_optimizers(model, groups, s.muon_lr > 0)
    average = MovingAverage(parameters, s.ema)
    for module in model.unet.modules():
        if isinstance(module, Level):
            module.checkpointing = s.gradient_checkpointing
    first = 0
    if resumed:
        first = average.count = resumed["step"]
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        average.values = [value.to(model.device) for value in resumed["average"]]
    autocast = partial(torch.autocast, model.device.type, torch.bfloat16, s.precision == "bf16", cache_enabled=False)
    workers = s.parts if model.device.type == "cpu" else 1
    started = time.time()
    bar = tqdm(range(first, steps), desc=f"{stage:6}", initial=first, total=steps, unit="step", dynamic_ncols=True)
    with stop_signals() as stop, ThreadPoolExecutor(workers, "part", torch.set_flush_denormal, (True,)) as pool:
        for step in bar:
            for optimizer, top in zip(optimizers, (highest, s.muon_lr)):
                for group in optimizer.param_groups:
                    group["lr"] = group["factor"] * learning_rate(step, steps, top, s.warmup)
            if stage == "vae":
                losses = [lambda: (vae_loss(model, source, step, s), [])]
            else:
                batch, place = unet_batch(model, source, step, s, stage), STAGES.index(stage)
                losses = [partial(unet_loss, model, batch[k :: s.parts], rng(s.seed, place, 1, step, k), s, stage)
                          for k in range(min(s.parts, len(batch)))]
            loss, bands = backward(losses, parameters, pool, autocast)
            if not math.isfinite(loss):
                raise InputError(f"the loss is {loss} at step {step} of stage {stage}: lower "
                                 f"--{'vae-lr' if stage == 'vae' else 'lr'}; {out} keeps its last checkpoint")
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            average.update()

            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            rate, seconds = optimizers[0].param_groups[0]["lr"], time.time() - started
            log(out / "log.csv", stage, step + 1, loss, rate, seconds, bands)
            stopping, last = bool(stop), step + 1 == steps  # a signal from here on is for the next step
            save = last or stopping or (step + 1) % s.save_every == 0
            show = s.sample_every and (last or (step + 1) % s.sample_every == 0)
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
        if stop:  # while the last step was saved
            raise KeyboardInterrupt
    average.swap()
    if stage == "vae" and not model.config.pretrained:
        model.config.vae.scaling_factor = measure_scaling(model, clips, s)


# ----------------------------------------------------------------------------------------------------------------------
# A run


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free for those of the next step, where each step had pages zeroed anew (ours)."""
    with suppress(OSError, TypeError, AttributeError):  # systems without glibc do as they do
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no large blocks of their own, which go back to the kernel at once
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def new_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, -3 and so on: the first that does not exist."""
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


def main(arguments: list[str] | None = None) -> None:
    """Set-up, the stages, a last line that says where everything is."""
    flags, given = read_flags(arguments)
    torch.set_flush_denormal(True)  # numbers near zero, which many weights become, would make a CPU slow
    keep_freed_memory()
    device = choose_device(flags.device)

    # three ways to start: from a run's checkpoint, from a model, from nothing
    resumed = None
    if flags.resume:
        out = Path(flags.out or "")
        if not flags.out or not (out / "checkpoint.pt").is_file():
            raise InputError(f"--resume: no checkpoint.pt in {flags.out or '--out'}; name a run's folder with --out")
        resumed = read_checkpoint(out / "checkpoint.pt", "magicvideo-training")
        s = Settings(**json.loads(resumed["settings"]))
        for name, value in given.items():
            if value != getattr(s, name):
                raise InputError(f"--{name.replace('_', '-')} {value}: the run in {out} was started with "
                                 f"{getattr(s, name)} and goes on with it; leave the flag out")
    else:
        preset = "paper" if Path(given.get("init_from") or "-").is_dir() else given.get("preset", "tiny")
        s = Settings(**{**PRESET_SETTINGS.get(preset, {}), **given})
        check(s)
        out = Path(flags.out) if flags.out else new_folder(Path(s.data).resolve().name)
        if (out / "checkpoint.pt").exists() or (out / "model.pt").exists():
            raise InputError(f"--out {out} holds a run already: add --resume to go on with it, or name another folder")
    torch.manual_seed(s.seed)
    model = None
    if resumed:
        model = MagicVideo.from_contents(resumed.pop("model"), out / "checkpoint.pt")
    elif s.init_from:
        folder = Path(s.init_from).is_dir()
        model = (MagicVideo.from_stable_diffusion(s.init_from, s.frames or 16) if folder
                 else MagicVideo.load(s.init_from))
        if s.frames not in (0, model.config.unet.frames):
            raise InputError(f"--frames {s.frames}: {s.init_from} makes {model.config.unet.frames} frames, and its "
                             f"adaptors hold one scale and shift for each (paper §3.2.1); leave it out")

    config = model.config if model else PRESETS[s.preset]
    frames = s.frames or config.unet.frames
    if s.data == "shapes":
        clips = ShapesDataset("train", frames, config.size, s.seed)
    else:
        clips = ClipFolder(s.data, frames, config.size, s.seed)
        print(clips.summary())
    model = model or MagicVideo.from_preset(s.preset, frames, [caption for caption in clips.captions if caption])
    model = model.to(device).train()

    stages = [s.stage] if s.stage else [x for x in STAGES if x != "image" or not model.config.pretrained]
    stages = [stage for stage in stages if s.steps(stage)]
    if resumed:
        stages = stages[stages.index(resumed["stage"]):]
        print(f"resumed at step {resumed['step']} of stage {resumed['stage']}")
    started, source = time.time(), clips
    try:
        for stage in stages:
            if stage != "vae" and source is clips and s.data == "shapes" and s.cache:
                source = Latents(model, clips, s.cache)
            train_stage(model, clips, source, stage, s, out, resumed if resumed and stage == resumed["stage"] else None)
    except KeyboardInterrupt:
        saved = (out / "checkpoint.pt").exists()
        raise InputError(f"stopped; go on with: python train.py --resume --out {out}" if saved
                         else "stopped before the first checkpoint; nothing was written") from None
    model.save(out / "model.pt")
    prompt = next((caption for caption in clips.captions if caption), "")
    pictures = f", pictures in {out}/samples" if s.sample_every else ""
    print(f"done in {(time.time() - started) / 60:.1f} minutes: {out}/model.pt{pictures}, losses in {out}/log.csv\n"
          f'next: python sample.py "{prompt}" --checkpoint {out}/model.pt')


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
