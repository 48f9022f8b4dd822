"""Trains MagicVideo, all stages in one plain loop: `python train.py` makes a working model of the embedded shapes.

    vae     VideoVAE: reconstruction + KL on clips                                    (paper §3, VideoVAE)
    image   the U-Net's image part on single frames, text to image                    (paper §3, image start)
    video   all of the U-Net on clips with their FPS, started from the image stage    (paper §3.2)

A stage trains its parts, keeps a moving average of their weights, and hands that average to the next stage. Everything
random in a step is drawn from (seed, stage, step), so a resumed run goes on as if it had never stopped.
"""

import argparse
import csv
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from data import ClipFolder, InputError, ShapesDataset, strip, write_image
from diffusion import normal
from magicvideo import PRESETS, MagicVideo, choose_device, read_checkpoint, write_checkpoint

STAGES = ("vae", "image", "video")


def setting(default, text: str):
    """A field of Settings and the flag of the same name, with its line of help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Settings:
    """What a run is made of; every field is a flag."""

    data: str = setting("shapes", 'folder of clips, or "shapes" for the embedded data set')
    preset: str = setting("tiny", "sizes of the model: tiny, small or paper")
    stage: str = setting("", "vae, image or video; without it all three, one after the other")
    init_from: str = setting("", "model.pt to start from; needed by --stage image and --stage video")
    frames: int = setting(0, "frames of a clip; 0 = as many as the preset has")
    vae_steps: int = setting(600, "steps of stage vae")
    image_steps: int = setting(1000, "steps of stage image")
    video_steps: int = setting(1000, "steps of stage video")
    batch_size: int = setting(16, "clips a step; stage image takes as many frames as these clips have")
    vae_batch_size: int = setting(6, "clips a step of stage vae")
    lr: float = setting(2e-3, "learning rate of the U-Net at its highest, after warm-up; it falls to 0 as a cosine")
    vae_lr: float = setting(2e-3, "the same for the VAE")
    warmup: int = setting(50, "steps over which the learning rate rises")
    ema: float = setting(0.995, "decay of the moving average of the weights, reached by way of (1 + n) / (10 + n)")
    kl_weight: float = setting(1e-3, "weight of the KL term of the VAE")
    text_dropout: float = setting(0.1, "part of the captions left out, which trains the unconditional branch of guidance")
    cache: int = setting(4800, "clips encoded once before stages image and video; 0 = encode every batch anew")
    save_every: int = setting(500, "steps between checkpoints")
    sample_every: int = setting(500, "steps between pictures in OUT/samples")
    seed: int = setting(0, "of weights, data and noise")


class Latents(torch.utils.data.Dataset):
    """Clips through the frozen encoder, once: [i] -> mean and logvar (f, 4, h, w), caption, fps (ours)."""

    def __init__(self, model: MagicVideo, clips, count: int):
        self.items = []
        for i in tqdm(range(count), desc="encode", unit="clip"):
            clips.set_epoch(i // len(clips))
            self.items.append(encode(model, clips[i % len(clips)]))

    def set_epoch(self, epoch: int) -> None:
        """The cached cuts stay the same in every epoch."""

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> dict:
        return self.items[i]


@torch.no_grad()
def encode(model: MagicVideo, clip: dict) -> dict:
    """A clip's "video" replaced by "mean" and "logvar" of its latents, each (f, 4, h/8, w/8), on the CPU."""
    mean, logvar = model.vae.encode(clip["video"][None].to(model.device))
    return {"mean": mean[0].cpu(), "logvar": logvar[0].cpu(), "caption": clip["caption"], "fps": clip["fps"]}


def rng(seed: int, *place: int) -> torch.Generator:
    """A generator that depends on the seed and on the place in the run alone: which stage, which step or epoch."""
    number = seed
    for part in place:
        number = (number * 1_000_003 + part + 1) % 2**63
    return torch.Generator().manual_seed(number)


def indices(count: int, batch: int, step: int, seed: int, stage: int) -> list[tuple[int, int]]:
    """The (epoch, item) pairs of a step's batch: every item once an epoch, in an order that is new each epoch."""
    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: torch.randperm(count, generator=rng(seed, stage, 0, epoch)) for epoch in {p // count for p in places}}
    return [(place // count, int(orders[place // count][place % count])) for place in places]


def vae_loss(model: MagicVideo, clips, step: int, s: Settings) -> tuple[Tensor, Tensor]:
    """The loss of stage vae on one batch of clips, and the reconstruction error to show."""
    videos = []
    for epoch, i in indices(len(clips), s.vae_batch_size, step, s.seed, 0):
        clips.set_epoch(epoch)
        videos.append(clips[i]["video"])
    video = torch.stack(videos).to(model.device)  # (b, f, 3, h, w)
    factor = 2 ** (len(model.config.vae.channels) - 1)
    shape = (*video.shape[:2], model.config.vae.latent_channels, video.shape[3] // factor, video.shape[4] // factor)
    return model.vae.loss(video, normal(shape, rng(s.seed, 0, 1, step)).to(video), s.kl_weight)


def unet_loss(model: MagicVideo, clips, step: int, s: Settings, stage: str) -> tuple[Tensor, Tensor]:
    """The diffusion loss of stages image and video on one batch: clips (b, f, ...), or as many frames (b*f, 1, ...)."""
    generator, f = rng(s.seed, STAGES.index(stage), 1, step), model.config.unet.frames
    frames = f if stage == "image" else 1  # items of an image epoch are single frames
    batch = []
    for epoch, i in indices(len(clips) * frames, s.batch_size * frames, step, s.seed, STAGES.index(stage)):
        clips.set_epoch(epoch)
        item = clips[i // frames]
        item = item if "mean" in item else encode(model, item)
        part = slice(i % frames, i % frames + 1) if stage == "image" else slice(None)
        batch.append((item["mean"][part], item["logvar"][part], item["caption"], item["fps"]))
    means, logvars, captions, fps = zip(*batch)
    mean, logvar = torch.stack(means).to(model.device), torch.stack(logvars).to(model.device)
    z0 = model.vae.sample_latents(mean, logvar, normal(mean.shape, generator).to(mean))  # (b, f, 4, h/8, w/8)
    kept = torch.rand(len(captions), generator=generator) >= s.text_dropout
    context = model.encode_text([caption if keep else "" for caption, keep in zip(captions, kept)])
    rate = torch.tensor(fps, device=model.device) if stage == "video" else None
    loss = model.diffusion.loss(model.unet, z0, context, rate, generator)
    return loss, loss


def trained_parts(model: MagicVideo, stage: str) -> list[torch.nn.Parameter]:
    """The parameters a stage trains; without CLIP's weights the text encoder trains with the U-Net (ours)."""
    if stage == "vae":
        return list(model.vae.parameters())
    unet = [p for name, p in model.unet.named_parameters() if stage == "video" or not is_video_part(name)]
    return unet + list(model.text_encoder.parameters())


def is_video_part(name: str) -> bool:
    """Whether a parameter of the U-Net is MagicVideo's own, unused by the image model."""
    return any(part in name for part in ("adaptor", "temporal_attentions", "fps_embedding"))


def learning_rate(step: int, steps: int, highest: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return highest * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


def warm_average(decay: float):
    """EMA with warm-up, decay (1 + n) / (10 + n) at first: a long average of the first steps would be noise."""
    @torch.no_grad()
    def update(averages, weights, count):
        torch._foreach_lerp_(averages, weights, 1 - min(decay, (1 + int(count)) / (10 + int(count))))
    return update




def picture(path: Path, model: MagicVideo, clips, stage: str, prompts: list[str]) -> None:
    """How far a stage is, one clip a row: clips above their reconstructions, or samples in ten steps."""
    if stage == "vae":
        videos = torch.stack([clips[i]["video"] for i in range(min(len(clips), 4))]).to(model.device)
        with torch.no_grad():
            mean, logvar = model.vae.encode(videos)
            decoded = model.vae.decode(model.vae.sample_latents(mean, logvar, torch.zeros_like(mean)))
        rows = torch.cat([videos, decoded.clamp(-1, 1)])
    else:
        rows = model.sample(prompts, fps=8 if stage == "video" else None, steps=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_image(path, strip(rows.cpu()))


def measure_scaling(model: MagicVideo, clips) -> float:
    """1 / standard deviation of the latents of some clips, so that diffusion sees about N(0, 1) (as SD's 0.18215)."""
    items = [encode(model, clips[i]) for i in range(min(len(clips), 64))]
    variance = torch.cat([item["logvar"] for item in items]).exp().mean()
    return float(1 / (torch.cat([item["mean"] for item in items]).var() + variance).sqrt())


def train_stage(model: MagicVideo, clips, stage: str, s: Settings, out: Path, resumed: dict | None) -> None:
    """Trains one stage and leaves the moving average of its weights in the model."""
    steps = {"vae": s.vae_steps, "image": s.image_steps, "video": s.video_steps}[stage]
    highest = s.vae_lr if stage == "vae" else s.lr
    prompts = [c for c in dict.fromkeys(clips.captions) if c][:6] or [""]
    parameters = trained_parts(model, stage)
    optimizer = torch.optim.AdamW(parameters, lr=highest, betas=(0.9, 0.99), weight_decay=0.01)
    average = AveragedModel(model, multi_avg_fn=warm_average(s.ema))
    first = 0
    if resumed:
        first = resumed["step"]
        optimizer.load_state_dict(resumed["optimizer"])
        average.load_state_dict(resumed["average"])
    source = clips
    if stage != "vae" and s.cache and first < steps:
        source = Latents(model, clips, s.cache)

    def save(step: int) -> None:
        write_checkpoint(out / "checkpoint.pt", {
            "format": "magicvideo-training", "settings": json.dumps(asdict(s)), "stage": stage, "step": step,
            "model": model.contents(), "average": average.state_dict(), "optimizer": optimizer.state_dict()})
        average.module.save(out / "model.pt")

    started, step = time.time(), first
    bar = tqdm(range(first, steps), desc=f"{stage:6}", initial=first, total=steps, unit="step", dynamic_ncols=True)
    try:
        for step in bar:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, highest, s.warmup)
            loss, shown = vae_loss(model, source, step, s) if stage == "vae" else unet_loss(model, source, step, s, stage)
            if not math.isfinite(loss):
                raise InputError(f"the loss is {float(loss)} at step {step} of stage {stage}: lower "
                                 f"--{'vae-lr' if stage == 'vae' else 'lr'}; {out} holds the last good checkpoint")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            average.update_parameters(model)
            bar.set_postfix(loss=f"{float(shown):.4f}", refresh=False)
            log(out / "log.csv", stage, step + 1, float(shown), group["lr"], time.time() - started)
            if (step + 1) % s.sample_every == 0 or step + 1 == steps:
                picture(out / "samples" / f"{stage}-{step + 1:06d}.png", average.module, clips, stage, prompts)
            if (step + 1) % s.save_every == 0 or step + 1 == steps:
                save(step + 1)
    except KeyboardInterrupt:
        save(step)
        raise
    model.load_state_dict(average.module.state_dict())
    if stage == "vae":
        model.config.vae.scaling_factor = measure_scaling(model, clips)


def log(path: Path, *values) -> None:
    """Adds a line to log.csv: stage, step, loss, learning rate, seconds since the stage began."""
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["stage", "step", "loss", "learning_rate", "seconds"])
        stage, step, loss, rate, seconds = values
        writer.writerow([stage, step, f"{loss:.6f}", f"{rate:.3e}", f"{seconds:.1f}"])


# what a preset trains with where it differs from the defaults above
PRESET_SETTINGS = {
    "tiny": {},
    "small": {"batch_size": 8, "vae_batch_size": 2, "lr": 2e-4, "vae_lr": 2e-4, "ema": 0.9995, "warmup": 500,
              "vae_steps": 30_000, "image_steps": 50_000, "video_steps": 100_000},
    "paper": {"batch_size": 1, "vae_batch_size": 1, "lr": 5e-5, "vae_lr": 5e-5, "ema": 0.9999, "warmup": 1000,
              "vae_steps": 50_000, "image_steps": 100_000, "video_steps": 200_000},
}


def read_flags(arguments: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """The command line -> (--out, --resume, --device) and the settings that were given, by name."""
    parser = argparse.ArgumentParser(description="Trains MagicVideo; without flags: every stage on the embedded shapes.")
    kinds = {"int": int, "float": float, "str": str}
    for f in fields(Settings):
        kind = f.type if isinstance(f.type, type) else kinds[f.type]
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default!r})")
    parser.add_argument("--out", help="folder of the run (default: runs/shapes, runs/shapes-2, ..., a new one)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    flags = parser.parse_args(arguments)
    given = {f.name: getattr(flags, f.name) for f in fields(Settings) if hasattr(flags, f.name)}
    return flags, given


def new_folder(name: str) -> Path:
    """runs/NAME, or runs/NAME-2, -3 and so on: the first that does not exist."""
    folder, n = Path("runs") / name, 1
    while folder.exists():
        n += 1
        folder = Path("runs") / f"{name}-{n}"
    return folder


def check(s: Settings) -> None:
    """Raises InputError for a setting out of range, before anything is made."""
    if s.preset not in PRESETS:
        raise InputError(f'--preset "{s.preset}": there is no such preset; use {", ".join(PRESETS)}')
    if s.stage not in ("", *STAGES):
        raise InputError(f'--stage "{s.stage}": there is no such stage; use {", ".join(STAGES)}, or none for all')
    if s.stage in ("image", "video") and not s.init_from:
        raise InputError(f"--stage {s.stage} needs a trained VAE to start from: add --init-from MODEL.pt")
    for f in fields(Settings):
        value, least = getattr(s, f.name), 1 if f.name in ("batch_size", "vae_batch_size", "save_every", "sample_every") else 0
        if not isinstance(value, str) and not (math.isfinite(value) and value >= least):
            raise InputError(f"--{f.name.replace('_', '-')} {value}: must be at least {least}")
    for name in ("ema", "text_dropout"):
        if getattr(s, name) > 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)}: must be at most 1")


def main(arguments: list[str] | None = None) -> None:
    """Set-up, the stages, a last line that says where everything is."""
    flags, given = read_flags(arguments)
    torch.set_flush_denormal(True)  # tiny numbers late in training would make a CPU slow
    device = choose_device(flags.device)

    # three ways to start: go on with a run, from a model, from nothing
    resumed = None
    if flags.resume:
        if not flags.out or not (Path(flags.out) / "checkpoint.pt").is_file():
            raise InputError(f"--resume: there is no checkpoint.pt in {flags.out or '--out'}; name a run's folder with --out")
        out = Path(flags.out)
        resumed = read_checkpoint(out / "checkpoint.pt", "magicvideo-training")
        s = Settings(**json.loads(resumed["settings"]))
        for name, value in given.items():
            if value != getattr(s, name):
                raise InputError(f"--{name.replace('_', '-')} {value}: the run in {out} was started with "
                                 f"{getattr(s, name)} and goes on with it; leave the flag out")
    else:
        preset = given.get("preset", Settings.preset)
        s = Settings(**{**PRESET_SETTINGS.get(preset, {}), **given})
        check(s)
        name = "shapes" if s.data == "shapes" else Path(s.data).resolve().name
        out = Path(flags.out) if flags.out else new_folder(name)
        if (out / "checkpoint.pt").exists() or (out / "model.pt").exists():
            raise InputError(f"--out {out} holds a run already: add --resume to go on with it, or name another folder")

    config = PRESETS[s.preset]
    if s.data == "shapes":
        clips = ShapesDataset("train", s.frames or config.unet.frames, config.size, s.seed)
    else:
        clips = ClipFolder(s.data, s.frames or config.unet.frames, config.size, s.seed)
        print(clips.summary())

    torch.manual_seed(s.seed)
    if resumed:
        model = MagicVideo.from_contents(resumed["model"], out / "checkpoint.pt")
        print(f"resumed at step {resumed['step']} of stage {resumed['stage']}")
    elif s.init_from:
        model = MagicVideo.load(s.init_from)
    else:
        model = MagicVideo.from_preset(s.preset, s.frames or None, clips.captions)
    model = model.to(device).train()

    out.mkdir(parents=True, exist_ok=True)
    started = time.time()
    stages = [s.stage] if s.stage else list(STAGES)
    if resumed:
        stages = stages[stages.index(resumed["stage"]):]
    try:
        for stage in stages:
            train_stage(model, clips, stage, s, out, resumed if resumed and stage == resumed["stage"] else None)
    except KeyboardInterrupt:
        raise InputError(f"stopped; go on with: python train.py --resume --out {out}") from None
    model.save(out / "model.pt")
    prompt = next((c for c in clips.captions if c), "")
    print(f"done in {(time.time() - started) / 60:.1f} minutes: {out}/model.pt, pictures in {out}/samples, losses in "
          f'{out}/log.csv\nnext: python sample.py "{prompt}" --checkpoint {out}/model.pt')


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
