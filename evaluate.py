"""Does a model do what it is told? Clips of held-out captions, judged from pixels alone (ours); and other measures.

Two rows of the table watch over the judge (`judge.py`): it must be right on real clips, and no better than chance under
shuffled captions. What follows the key frames has measures of its own, `cascade_measures.py`.
"""

import argparse
import json
import math
import os
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: programs on the same cores wait without spinning

import torch
from torch import Tensor
from tqdm import tqdm

from cascade_measures import interpolation, upscaling
from data import ClipFolder, InputError, ShapesDataset, strip, write_image
from fvd import features, frechet_distance, load_i3d
from judge import TRENDS, confusions, count, decibels, judge, lines, look, prompts_of, table
from magicvideo import MagicVideo, choose_device
from progress import commit

# ---------------------------------------------------------------------------------------------------------------------
# Following prompts


def sampled(model: MagicVideo, prompts: list[str], flags: argparse.Namespace, fps: float, name: str) -> Tensor:
    """Clips (n, f, 3, h, w) of prompts, clip i drawn with --seed + i."""
    videos = []
    for i in tqdm(range(0, len(prompts), flags.batch_size), desc=name, unit="batch"):
        batch = prompts[i : i + flags.batch_size]
        videos.append(model.sample(batch, fps, flags.steps, flags.guidance, flags.sampler, flags.seed + i).cpu())
    return torch.cat(videos)


def following(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """How often color, shape and motion of a clip are its caption's; draws the first clip of every caption."""
    rows, clips = [], []
    names = {"test": "held-out captions", "train": "trained captions"}
    for split, name in names.items() if flags.split == "both" else [(flags.split, names[flags.split])]:
        prompts = prompts_of(split) * flags.seeds
        videos = sampled(model, prompts, flags, flags.fps, name)
        write_image(out / f"{name.split()[0]}.png", strip(videos[:24]))
        verdicts = [judge(video, flags.fps) for video in videos]
        rows.append(count(name, prompts, verdicts))
        if len(rows) == 1:  # chance, and so proof that the judge does not say what one wants to hear
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
            shuffled = count(f"{name.split()[0]}, shuffled", [prompts[i] for i in order], verdicts)
        clips += [{"caption": c, "seed": flags.seed + i, **v} for i, (c, v) in enumerate(zip(prompts, verdicts))]
    dataset = ShapesDataset("test", model.config.unet.frames, model.config.size, flags.seed, flags.fps, length=240)
    real = [dataset[i] for i in range(len(dataset))]
    rows += [shuffled, count("real clips", [r["caption"] for r in real], [judge(r["video"], r["fps"]) for r in real])]
    wrong = confusions([clip["caption"] for clip in clips], clips)
    words = (f"{c['asked']} judged {c['judged'] or 'nothing'}: {c['clips']} of {c['of']} clips" for c in wrong[:8])
    print(table(rows), *words, sep="\n")
    return {"rows": rows, "confusions": wrong, "clips": clips}


# ---------------------------------------------------------------------------------------------------------------------
# Other measures


def speed(video: Tensor, motion: str) -> float:
    """How far an object goes the way that its caption says, a frame: in widths of the frame, or in log area."""
    seen = look(video)
    if seen is None:
        return math.nan
    trend = next(i for i, words in enumerate(TRENDS) if motion in words)
    return float(lines(*seen[1:])[0][trend]) * (1 if motion == TRENDS[trend][1] else -1)


def rates(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """Whether FPS is obeyed: the same prompts and seeds at 4, 8 and 16 frames a second (paper §3.2, FPS).

    The more frames a second, the less an object moves from one to the next. The data set is cut at whole strides of 24
    a second, so that its clips nearest to 16 have 12.
    """
    prompts, asked, rows = prompts_of("test") * flags.seeds, (4, 8, 16), []
    motions = [prompt.split(" ", 3)[3] for prompt in prompts]
    speeds = torch.tensor([[speed(video, motion) for video, motion in zip(
        sampled(model, prompts, flags, fps, f"{fps} frames a second"), motions)] for fps in asked])  # (3, n)
    for fps, of_clips in zip(asked, speeds):
        dataset = ShapesDataset("test", model.config.unet.frames, model.config.size, flags.seed, fps, length=240)
        real = [(clip["caption"].split(" ", 3)[3], clip) for clip in (dataset[i] for i in range(len(dataset)))]
        row = {"fps": fps, "clips": len(prompts), "no object": int(of_clips.isnan().sum()),
               "data fps": sum(clip["fps"] for _, clip in real) / len(real)}  # what the object's way allows
        for kind in ("moving", "growing or shrinking"):
            chosen = torch.tensor([("moving" in motion) == (kind == "moving") for motion in motions])
            truth = [speed(c["video"], motion) for motion, c in real if ("moving" in motion) == (kind == "moving")]
            row[kind] = float(of_clips[chosen].nanmedian())
            row[kind + ", data"] = float(torch.tensor(truth).nanmedian())
        rows.append(row)
    seen = ~speeds.isnan().any(0)
    falls = ((speeds[0] > speeds[1]) & (speeds[1] > speeds[2]))[seen]
    print("median way from one frame to the next: of the frame's width, and of the logarithm of the area",
          f"{'fps':>4}{'moving':>10}{'data':>8}{'resizing':>10}{'data':>8}   data cut, on average, at", sep="\n")
    for r in rows:
        moving, resizing = r["moving"], r["growing or shrinking"]
        print(f"{r['fps']:4}{moving:10.4f}{r['moving, data']:8.4f}{resizing:10.3f}"
              f"{r['growing or shrinking, data']:8.3f}   {r['data fps']:.3g} frames a second")
    print(f"the way falls from 4 to 8 to 16 frames a second in {int(falls.sum())} of {len(falls)} prompts and seeds")
    return {"rates": rows, "falls": int(falls.sum()), "of": len(falls)}


@torch.no_grad()
def reconstruction(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """VideoVAE: PSNR of decoded clips, and of their frame-to-frame differences, which flicker spoils (paper, VideoVAE).

    With the decoder's temporal layers, and with these bypassed, which leaves the image decoder beside them.
    """
    clips, rows = real_clips(model, flags), []
    for name, temporal in (("with temporal layers", True), ("without", False)):
        errors = []
        for clip in tqdm(clips, desc=name, unit="clip"):
            mean, _ = model.vae.encode(clip["video"][None].to(model.device))
            decoded = model.vae.decode(model.config.vae.scaling_factor * mean, temporal).clamp(-1, 1)[0].cpu()
            wrong = decoded - clip["video"]                                                  # (f, 3, h, w)
            errors.append([wrong.square().mean(), wrong.diff(dim=0).square().mean()])
        psnr, flicker = (decibels(error) for error in torch.tensor(errors).mean(0))
        rows.append({"name": name, "clips": len(clips), "psnr": psnr, "flicker_psnr": flicker})
        print(f"{name:22} {len(clips)} clips: PSNR {psnr:.2f} dB, of frame-to-frame differences {flicker:.2f} dB")
    return {"reconstruction": rows}


def real_clips(model: MagicVideo, flags: argparse.Namespace, seed: int = 0) -> list[dict]:
    """At most --clips clips of --data, cut at --fps: shapes of held-out captions, or a folder's, each once."""
    frames, size = model.config.unet.frames, model.config.size
    dataset = (ShapesDataset("test", frames, size, flags.seed + seed, flags.fps, flags.clips) if flags.data == "shapes"
               else ClipFolder(flags.data, frames, size, flags.seed + seed, flags.fps))
    return [dataset[i] for i in range(min(len(dataset), flags.clips))]


def frechet(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """Fréchet video distance of samples to real clips of the same captions; for comparison, of other real clips."""
    i3d, real = load_i3d().to(model.device), real_clips(model, flags)
    other = real_clips(model, flags, seed=1)
    prompts = [clip["caption"] for clip in real]
    videos = {"samples": sampled(model, prompts, flags, flags.fps, "samples"),
              "other real clips": torch.stack([clip["video"] for clip in other])}
    reference = features(i3d, torch.stack([clip["video"] for clip in real]))
    rows = [{"name": name, "clips": len(real), "fvd": frechet_distance(reference, features(i3d, clips))}
            for name, clips in videos.items()]
    for row in rows:
        print(f"FVD of {row['name']}: {row['fvd']:.1f} ({row['clips']} clips)")
    if len(real) < 2048:
        print(f"{len(real)} clips are few: FVD depends on their number and is usually taken of 2,048 or more (--clips)")
    return {"fvd": rows}


MEASURES = {"rates": rates, "reconstruction": reconstruction, "fvd": frechet, "interpolation": interpolation,
            "upscaling": upscaling}


def main(arguments: list[str] | None = None) -> None:
    """One measure of a model: prints it and writes it to OUT/results.json, pictures beside it."""
    parser = argparse.ArgumentParser(description="Measures a model: how well it follows prompts, from pixels alone, "
                                                 "or what one of the other measures says.")
    parser.add_argument("--checkpoint", required=True, help="the model.pt that train.py wrote")
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument("--rates", action="store_true", help="measure instead how motion changes with --fps")
    measure.add_argument("--reconstruction", action="store_true", help="measure instead the VideoVAE and its flicker")
    measure.add_argument("--fvd", action="store_true", help="measure instead the Fréchet video distance to real clips")
    measure.add_argument("--interpolation", action="store_true", help="measure instead the frames between key frames")
    measure.add_argument("--upscaling", action="store_true", help="measure instead super-resolution")
    parser.add_argument("--data", default="shapes", help='"shapes"; for --reconstruction and --fvd also a folder')
    parser.add_argument("--split", default="both", choices=["test", "train", "both"], help="test: held-out captions")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each of the 24 captions")
    parser.add_argument("--clips", type=int, default=240, help="real clips, of measures that need them")
    parser.add_argument("--seed", type=int, default=0, help="clip i of a split is drawn with seed + i")
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
    parser.add_argument("--upscale-steps", type=int, default=4, help="those of super-resolution")
    parser.add_argument("--guidance", type=float, default=7.5, help="scale of classifier-free guidance")
    parser.add_argument("--sampler", default="ddim", choices=["ddim", "ddpm"])
    parser.add_argument("--fps", type=float, default=8, help="frames a second")
    parser.add_argument("--batch-size", type=int, default=24, help="clips sampled at once")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument("--out", default="evaluation", help="folder of the results, replaces those in it")
    flags = parser.parse_args(arguments)
    asked = next((name for name in MEASURES if getattr(flags, name)), None)
    for flag, value in (("--seeds", flags.seeds), ("--batch-size", flags.batch_size), ("--clips", flags.clips)):
        if value < 1:
            raise InputError(f"{flag} {value}: choose 1 or more")
    if flags.data != "shapes" and asked not in ("reconstruction", "fvd"):
        raise InputError(f"--data {flags.data}: prompts can be judged on shapes alone; add --fvd or --reconstruction")
    device, out = choose_device(flags.device), Path(flags.out)
    model = MagicVideo.load(flags.checkpoint, device)

    found = MEASURES.get(asked, following)(model, flags, out)
    made = {"command": shlex.join(["python", "evaluate.py", *(sys.argv[1:] if arguments is None else arguments)]),
            "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": str(device), "torch": str(torch.__version__), "settings": vars(flags)}
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps({**made, **found}, indent=1))
    print(f"written to {out}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        sys.exit(2)
