"""Prompts in, clips out: `python sample.py "a red circle moving left"` (paper §3)."""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

import torch

import cascade
from clip_files import check_writable, grid, write_clip
from diffusion import SAMPLERS
from magicvideo import MagicVideo
from runs import InputError, pick_device, run_command

SHIPPED = Path(__file__).resolve().parent / "checkpoints" / "shapes.pt"
MAX_FPS = {".gif": 50, ".webp": 90, ".png": 90, ".mp4": 1000}  # shorter delays count as 100 ms


def load_newest(device: torch.device) -> tuple[Path, MagicVideo]:
    """Load the newest model under runs/, else the shipped one. InputError if there is none.

    Files of that name that are no models of ours are passed over, and named.
    """
    runs = [path for path in Path("runs").glob("*/model.pt") if path.is_file()]
    for path in [*sorted(runs, key=os.path.getmtime, reverse=True), SHIPPED]:
        try:
            return path, MagicVideo.load(path, device)
        except InputError as error:
            if path.is_file():
                print(f"passed over: {error}")
    raise InputError("no model under runs/: run python train.py, or name one with --checkpoint")


def read_flags(arguments: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line, before any work. InputError for what cannot be done."""
    parser = argparse.ArgumentParser(usage="python sample.py PROMPT... [--FLAG VALUE], see --help")
    parser.add_argument("prompts", nargs="+", help='what to show; "" samples without text')
    parser.add_argument("--checkpoint", help="model.pt or Stable Diffusion folder (default: the "
                        "newest under runs/, else the shipped one)")
    parser.add_argument("--out", default="clip.gif", help=".gif, .webp, .png or .mp4 (clip.gif)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (8)")
    parser.add_argument("--steps", type=int, help="1 to 1000 (default: the model's, 20 or 50)")
    parser.add_argument("--guidance", type=float, help="weight of the text (default: the model's)")
    parser.add_argument("--sampler", default="ddim", help="ddim or ddpm (ddim)")
    parser.add_argument("--seed", type=int, default=0, help="prompt i takes seed + i (0)")
    parser.add_argument("--interpolate", action="store_true", help="f frames become 4 f - 3")
    parser.add_argument("--upscale", action="store_true", help="four times as high and as wide")
    parser.add_argument("--picture", action="store_true", help="single pictures, text to image")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    flags = parser.parse_args(arguments)
    suffix = Path(flags.out).suffix.lower()
    if suffix not in MAX_FPS:
        raise InputError(f"--out {flags.out}: end its name in {', '.join(MAX_FPS)}")
    check_writable(Path(flags.out))
    most_fps = MAX_FPS[suffix] / (4 if flags.interpolate else 1)
    for name, low, high in (("fps", 0.1, most_fps), ("steps", 1, 1000),
                            ("guidance", -1000, 1000), ("seed", 0, 2**32 - 1)):
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:
            if name == "fps":
                with_network = " with --interpolate" if flags.interpolate else ""
                raise InputError(f"--fps {value}: give {low} to {high} for {suffix}{with_network}")
            raise InputError(f"--{name} {value}: give {low} to {high}")
    if flags.picture and flags.interpolate:
        raise InputError("--interpolate: needs clips; leave out --picture")
    if flags.sampler not in SAMPLERS:
        raise InputError(f'--sampler "{flags.sampler}": use {" or ".join(SAMPLERS)}')
    return flags


def main(arguments: list[str] | None = None) -> None:
    """Sample every prompt: key frames, and from these what is asked for; write one clip."""
    flags = read_flags(arguments)
    started = time.time()
    device = pick_device(flags.device)
    if flags.checkpoint:
        checkpoint, model = Path(flags.checkpoint), MagicVideo.load(flags.checkpoint, device)
    else:
        checkpoint, model = load_newest(device)
    if model.device.type == "cuda":
        model.unet.bfloat16()  # a quarter faster than autocast, and half the memory
    print(f"model: {checkpoint}")
    for prompt in flags.prompts:
        ids = model.tokenizer.encode(prompt)
        read = ids[: model.tokenizer.context_length - 2]
        if len(read) < len(ids):
            used = model.tokenizer.decode(read)
            print(f'the prompt is too long; only this part is used: "{used:.200}"')
    for stage in ("interpolate", "upscale"):
        if getattr(flags, stage) and stage not in model.cascade:
            raise InputError(f"--{stage}: {checkpoint} has no such network; train it: python "
                             f"train.py --stage {stage} --init-from {checkpoint}")
    if flags.interpolate and model.config.unet.frames < 2:
        raise InputError("--interpolate: this model makes single frames; use one of two or more")

    fps = None if flags.picture else flags.fps
    latents = model.sample(flags.prompts, fps, flags.steps, flags.guidance, flags.sampler,
                           flags.seed, decode=False)
    if flags.interpolate or flags.upscale:
        with torch.no_grad():
            context = model.encode_text(flags.prompts)
    if flags.interpolate:
        interpolator = cascade.build(model, "interpolate")
        latents = interpolator.sample(latents, context, fps, seed=flags.seed)
        fps *= cascade.NEW_FRAMES + 1
    clips = model.decode(latents)
    if flags.upscale:
        clips = cascade.build(model, "upscale").sample(clips, context, seed=flags.seed)
    write_clip(flags.out, grid(clips.cpu()), fps or 1)
    b, f, _, h, w = clips.shape
    print(f"wrote {flags.out}: {b} clip{'s' * (b > 1)} of {f} frame{'s' * (f > 1)}, {w} x {h}, in "
          f"{time.time() - started:.1f} s")


if __name__ == "__main__":
    run_command("sample.py", main)
