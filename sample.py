"""Prompts in, clips out: `python sample.py "a red circle moving left"` (paper §3, from text to the decoded clip).

A file of prompts, one a line, makes a clip each; `torchrun --nproc-per-node 8 sample.py --prompts FILE` shares them out
over the GPUs of one machine or many. Clips that are there already are not made again.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: programs on the same cores wait without spinning

import torch
from tqdm import tqdm

from cascade import BETWEEN
from data import InputError, check_clip_path, grid, write_clip
from diffusion import SAMPLERS
from magicvideo import MagicVideo, choose_device
from parallel import own_device, started_by_torchrun

SHIPPED = Path(__file__).parent / "checkpoints" / "shapes.pt"


def newest_model() -> Path:
    """The model of the newest run under runs/, else the one shipped with the code. Raises InputError if neither is."""
    models = sorted(Path("runs").glob("*/model.pt"), key=lambda path: path.stat().st_mtime)
    if models:
        return models[-1]
    if SHIPPED.is_file():
        return SHIPPED
    raise InputError("no model under runs/: run python train.py first, or name one with --checkpoint")


def read_prompts(file: str) -> list[str]:
    """The lines of a file of prompts; raises InputError if it cannot be read or has none."""
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--prompts {file}: cannot be read ({error}); give text, UTF-8, a prompt a line") from error
    if not lines:
        raise InputError(f"--prompts {file}: no prompts in it; write one a line")
    return lines


def stages(model: MagicVideo, prompts: list[str], seed: int, out: Path, flags: argparse.Namespace) -> Iterator[tuple]:
    """Key frames, and from these what is asked for: yields (clips (b, f, 3, h, w), frames a second, where to write).

    The last stage's clips, and with --save-stages those of each; one progress bar counts the steps of all.
    """
    total = flags.steps + flags.interpolate * flags.interpolate_steps
    total += flags.upscale * flags.upscale_steps * len(prompts)
    with tqdm(total=total, unit="step", dynamic_ncols=True) as bar:
        def progress(steps: list) -> Iterator:
            for step in steps:
                yield step
                bar.update()

        bar.set_description("key frames")
        fps = flags.fps
        latents = model.sample_latents(prompts, fps, flags.steps, flags.guidance, flags.sampler, seed, flags.eta,
                                       flags.frames, progress)
        if flags.interpolate:
            if flags.save_stages:
                yield model.decode(latents), fps, out.with_stem(f"{out.stem}-keys")
            bar.set_description("interpolate")
            latents = model.interpolate(latents, prompts, fps, flags.interpolate_steps, seed, progress)
            fps *= BETWEEN + 1
        clips = model.decode(latents)
        if flags.upscale:
            if flags.save_stages:
                yield clips, fps, out.with_stem(f"{out.stem}-{'interpolated' if flags.interpolate else 'keys'}")
            bar.set_description("upscale")
            clips = model.upscale(clips, prompts, flags.upscale_steps, seed, flags.same_noise, flags.tile, progress)
    yield clips, fps, out


def memory(device: torch.device) -> str:
    """The most memory that this process has held, in words; nothing where the system does not say."""
    if device.type == "cuda":
        return f", {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB of the GPU"
    try:
        import resource
    except ImportError:
        return ""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KB
    return f", {most / 1024 if sys.platform == 'darwin' else most:.1f} GB"


def main(arguments: list[str] | None = None) -> None:
    """Reads the command line, samples every prompt, writes one clip, a grid where there are several, or one a line."""
    parser = argparse.ArgumentParser(description="Samples clips from prompts; several prompts make one grid.")
    parser.add_argument("prompts", nargs="*", help='what to show; "" samples without text')
    parser.add_argument("--prompts", dest="file", metavar="FILE",
                        help="a file of prompts, one a line: a clip for each, OUT-00001.gif and so on")
    parser.add_argument("--checkpoint", help="a model.pt or a Stable Diffusion folder (default: the newest model "
                                             "under runs/, else the shipped one)")
    parser.add_argument("--out", default="clip.gif", help="a .gif, .webp, .png (animated) or .mp4 (default: clip.gif)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (default: 8)")
    parser.add_argument("--frames", type=int, help="frames of the clip: the number that the model was trained for")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps, 1 to 1000 (default: 50)")
    parser.add_argument("--guidance", type=float, default=7.5, help="weight of the text (default: 7.5)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="(default: ddim)")
    parser.add_argument("--eta", type=float, default=0.0, help="noise of the ddim sampler, 0 to 1 (default: 0)")
    parser.add_argument("--interpolate", action="store_true", help="three frames more between two: F become 4F - 3")
    parser.add_argument("--upscale", action="store_true", help="four times as high and as wide")
    parser.add_argument("--interpolate-steps", type=int, default=20, help="sampling steps of it (default: 20)")
    parser.add_argument("--upscale-steps", type=int, default=4, help="sampling steps of it (default: 4)")
    parser.add_argument("--same-noise", action="store_true", help="--upscale: one start noise for all frames of a clip")
    parser.add_argument("--tile", type=int, default=0, metavar="N",
                        help="--upscale: N x N pixels at a time, for less memory (default: whole frames)")
    parser.add_argument("--save-stages", action="store_true", help="write each stage's clip too: OUT-keys, "
                                                                   "OUT-interpolated")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; prompt i takes seed + i (default: 0)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    flags = parser.parse_args(arguments)

    if bool(flags.prompts) == bool(flags.file):
        raise InputError('give prompts, or a file of them: python sample.py "a red circle", or --prompts FILE')
    if (flags.tile or flags.same_noise) and not flags.upscale:
        raise InputError(f"--{'tile' if flags.tile else 'same-noise'}: says how --upscale works; add --upscale")
    if flags.save_stages and not (flags.upscale or flags.interpolate):
        raise InputError("--save-stages: there is but one stage; add --interpolate or --upscale")
    lines = read_prompts(flags.file) if flags.file else []
    check_clip_path(flags.out)  # before the work, not after it
    torch.set_flush_denormal(True)
    checkpoint = Path(flags.checkpoint) if flags.checkpoint else newest_model()
    model = MagicVideo.load(checkpoint, own_device(choose_device(flags.device)))
    print(f"model: {checkpoint}")

    for stage in ("interpolate", "upscale"):
        if getattr(flags, stage):
            model.needs(stage, getattr(flags, f"{stage}_steps"), flags.tile)  # before the work, not after it

    def sample(prompts: list[str], seed: int, out: Path) -> None:
        started = time.time()
        for clips, fps, path in stages(model, prompts, seed, out, flags):
            write_clip(path, grid(clips.cpu()) if len(clips) > 1 else clips[0].cpu(), fps)
            b, f, _, h, w = clips.shape
            print(f"wrote {path}: {b} clip{'s' * (b > 1)} of {f} frames, {w} x {h}, in {time.time() - started:.1f} s"
                  f"{memory(model.device)}")

    if flags.prompts:
        sample(flags.prompts, flags.seed, Path(flags.out))
    rank, world = started_by_torchrun()
    for i in range(rank, len(lines), world):
        out = Path(flags.out).with_stem(f"{Path(flags.out).stem}-{i + 1:05d}")
        if out.exists():
            print(f"{out} is there already")
        else:
            sample([lines[i]], flags.seed + i, out)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"sample.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sample.py: stopped, nothing written", file=sys.stderr)
        sys.exit(130)
