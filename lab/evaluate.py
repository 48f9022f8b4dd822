"""Measure a model: does it do what captions say? Judged from pixels alone (ours); other measures.

Two columns of the table watch over the judge (`lab/judge.py`): it must be right on real clips, and
no better than chance under shuffled captions. Read `lab/ablation.py` next.
"""

import argparse
import math
import os
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

import torch
from torch import Tensor
from tqdm import tqdm

import cascade
from data import ClipFolder, InputError, ShapesDataset
from lab.fvd import frechet_distance, i3d_features, load_i3d
from lab.judge import (LEAST_TRENDS, balanced_prompts, confusions, count, expected_trend,
                       fit_trends, judge, object_tracks, segment_object, table_rows)
from lab.results import check_ranges, print_table, run_command, write_results
from magicvideo import MagicVideo, pick_device
from sample import film_strip, write_clip

BATCH_SIZE = 24  # clips sampled at once


def prompt_accuracy(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Count how often color, shape and motion of a sampled clip are those of its caption."""
    names = {"test": "held-out captions", "train": "trained captions"}
    counts = []
    clips = []
    for split in names if flags.split == "both" else [flags.split]:
        prompts = balanced_prompts(split) * flags.seeds
        videos = sample_prompts(model, prompts, flags, flags.fps)
        picture = Path(flags.out) / f"{split}.png"
        write_clip(picture, film_strip(videos[:24])[None], fps=1)
        verdicts = [judge(video, flags.fps) for video in videos]
        counts.append(count(names[split], prompts, verdicts))
        clips += [{"caption": prompt, "seed": flags.seed + i, **verdict}
                  for i, (prompt, verdict) in enumerate(zip(prompts, verdicts))]
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    counts.append(count("captions shuffled", [prompts[i] for i in order], verdicts))
    real = real_clips(model, flags)
    verdicts = [judge(clip["video"], clip["fps"]) for clip in real]
    counts.append(count("real clips", [clip["caption"] for clip in real], verdicts))
    wrong = confusions([clip["caption"] for clip in clips], clips)
    return {"rows": table_rows(counts), "confusions": wrong, "counts": counts, "clips": clips}


def sample_prompts(model: MagicVideo, prompts: list[str], flags: argparse.Namespace,
                   fps: float) -> Tensor:
    """Sample clips (n, f, 3, h, w), clip i with --seed + i."""
    videos = []
    for i in tqdm(range(0, len(prompts), BATCH_SIZE), f"{fps:g} fps", disable=None):
        batch = prompts[i : i + BATCH_SIZE]
        videos.append(model.sample(batch, fps, flags.steps, flags.guidance, seed=flags.seed + i))
    return torch.cat(videos).cpu()


def real_clips(model: MagicVideo, flags: argparse.Namespace, seed: int = 0,
               fps: float | None = None) -> list[dict]:
    """Cut at most --clips clips at `fps`: shapes with held-out captions, or each of a folder."""
    cut = {"frames": model.config.unet.frames, "size": model.config.size,
           "seed": flags.seed + seed, "fps": fps or flags.fps}
    is_shapes = flags.data == "shapes"
    clips = ShapesDataset("test", **cut) if is_shapes else ClipFolder(flags.data, **cut)
    return [clips[i] for i in range(min(len(clips), flags.clips))]


# --------------------------------------------------------------------------------------------------
# Other measures


def rates(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Measure the speed of objects at 4, 8 and 16 fps, same prompts and seeds (paper §3.2, FPS).

    The data set is cut at whole strides of 24 fps, so that its clips nearest to 16 have 12.
    """
    prompts = balanced_prompts("test") * flags.seeds
    speeds = []
    rows = []
    for fps in (4, 8, 16):
        videos = sample_prompts(model, prompts, flags, fps)
        speeds.append(torch.tensor([speed(*clip) for clip in zip(videos, prompts)]))
        real = real_clips(model, flags, fps=fps)
        true = torch.tensor([speed(clip["video"], clip["caption"]) for clip in real])
        rows.append({"fps": fps, "median speed": float(speeds[-1].nanmedian()),
                     "of the data set": float(true.nanmedian()),
                     "cut at, fps": sum(clip["fps"] for clip in real) / len(real)})
    four, eight, sixteen = speeds
    is_slower = ((four > eight) & (eight > sixteen))[~torch.stack(speeds).isnan().any(0)]
    return {"rows": rows,
            "slower from 4 to 8 to 16 fps": f"{int(is_slower.sum())} of {len(is_slower)} clips"}


def speed(video: Tensor, caption: str) -> float:
    """Measure how far an object gets per frame the way its caption says; NaN if unseen.

    1 is the least of the data set at 8 fps: 0.3 widths of the frame, or twice the area, in 7 steps.
    """
    segmented = segment_object(video)
    if segmented is None:
        return math.nan
    slopes, _ = fit_trends(*segmented[1:])
    trend, sign = expected_trend(caption)
    return sign * float(slopes[trend]) * 7 / LEAST_TRENDS[trend]


@torch.no_grad()
def reconstruction(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Measure the VideoVAE: PSNR of clips, and of frame differences, which flicker spoils (paper).

    With the decoder's temporal layers, and frame by frame, which bypasses them.
    """
    errors = defaultdict(list)
    for clip in tqdm(real_clips(model, flags), disable=None):
        z = model.encode(clip["video"][None])  # (1, f, 4, h/8, w/8)
        decoded = {"with temporal layers": model.decode(z)[0],
                   "without": model.decode(z.transpose(0, 1))[:, 0]}
        for name, video in decoded.items():
            error = video.cpu() - clip["video"]  # (f, 3, h, w)
            errors[f"clips, {name}"].append(error.square().mean())
            errors[f"differences, {name}"].append(error.diff(dim=0).square().mean())
    return {"rows": psnr_rows(errors)}


def psnr_rows(errors: dict[str, list[Tensor]]) -> list[dict]:
    """Turn squared errors of clips in [-1, 1] into PSNR of their mean, in dB."""
    return [{"name": name, "clips": len(values),
             "PSNR": float(10 * torch.log10(4 / torch.stack(values).mean()))}
            for name, values in errors.items()]


def fvd(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compute FVD to real clips of samples of their captions, and of other real clips."""
    i3d = load_i3d().to(model.device)
    real = real_clips(model, flags)
    videos = {"samples": sample_prompts(model, [c["caption"] for c in real], flags, flags.fps),
              "other real clips": torch.stack([c["video"] for c in real_clips(model, flags, 1)])}
    reference = i3d_features(i3d, torch.stack([clip["video"] for clip in real]))
    rows = [{"name": name, "clips": len(real),
             "FVD": frechet_distance(reference, i3d_features(i3d, clips))}
            for name, clips in videos.items()]
    return {"rows": rows, "note": "FVD depends on the number of clips; papers take 2,048 or more"}


@torch.no_grad()
def interpolation(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compare frames between true key frames with the true ones, beside a cross-fade."""
    network = cascade.build(model, "interpolate")
    gap = cascade.NEW_FRAMES + 1
    length = gap * (model.config.unet.frames - 1) + 1
    clips = ShapesDataset("test", length, model.config.size, flags.seed, gap * flags.fps,
                          flags.clips, rate_multiplier=gap)
    is_new = torch.arange(length) % gap > 0
    part = (torch.arange(length) % gap / gap).view(-1, 1, 1, 1)
    errors = defaultdict(list)
    smooth = []
    for i in tqdm(range(len(clips)), disable=None):
        clip = clips[i]
        true = clip["video"]
        keys = model.encode(true[None, ::gap])
        context = model.encode_text([clip["caption"]])
        z = network.sample(keys, context, clip["fps"] / gap, seed=flags.seed + i)
        before = true[::gap].repeat_interleave(gap, 0)[:length]
        after = torch.cat([true[gap::gap].repeat_interleave(gap, 0), true[-1:]])
        videos = {"interpolated": model.decode(z)[0].cpu(), "cross-fade": before.lerp(after, part),
                  "encoded and decoded": model.decode(model.encode(true[None]))[0].cpu()}
        for name, video in videos.items():
            errors[name].append((video - true)[is_new].square().mean())
        smooth.append(motion_smoothness(videos["interpolated"], clip["caption"]))
    return {"rows": psnr_rows(errors), "clips that go their way in every frame": sum(smooth)}


def motion_smoothness(video: Tensor, caption: str) -> bool:
    """Tell whether an object moves, grows or shrinks as its caption says from each frame to the next."""
    segmented = segment_object(video)
    if segmented is None or len(segmented[2]) < len(video):
        return False
    trend, sign = expected_trend(caption)
    return bool((sign * object_tracks(segmented[1])[trend].diff() > 0).all())


@torch.no_grad()
def upscaling(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compare enlarged frames with the true large ones, beside bicubic upsampling."""
    network = cascade.build(model, "upscale")
    size = cascade.SCALE * model.config.size
    clips = ShapesDataset("test", 2, size, flags.seed, flags.fps, flags.clips)
    errors = defaultdict(list)
    for i in tqdm(range(len(clips)), disable=None):
        true = clips[i]["video"][None, :1].to(model.device)  # (1, 1, 3, 4h, 4w)
        small = cascade.downsample(true)
        context = model.encode_text([clips[i]["caption"]])
        upscaled = network.sample(small, context, seed=flags.seed + i)
        bicubic = cascade.upsample_bicubic(small).clamp(-1, 1)
        errors["upscaled"].append((upscaled - true).square().mean())
        errors["bicubic"].append((bicubic - true).square().mean())
    return {"rows": psnr_rows(errors)}


MEASURES = {"rates": rates, "reconstruction": reconstruction, "fvd": fvd,
            "interpolation": interpolation, "upscaling": upscaling}


def main(arguments: list[str] | None = None) -> None:
    """Measure one thing, print it and write it to OUT/results.json."""
    parser = argparse.ArgumentParser(description="Measures how well a model follows prompts, "
                                     "judged from pixels alone, or one of the other measures.")
    parser.add_argument("--checkpoint", required=True, help="the model.pt that train.py wrote")
    measure = parser.add_mutually_exclusive_group()
    for name, function in MEASURES.items():
        measure.add_argument(f"--{name}", action="store_true", help=function.__doc__.split("\n")[0])
    parser.add_argument("--data", default="shapes",
                        help='"shapes"; for --reconstruction and --fvd also a folder of clips')
    parser.add_argument("--split", default="both", choices=["test", "train", "both"],
                        help="captions: test = held out, train = trained (both)")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each of 24 captions (4)")
    parser.add_argument("--clips", type=int, default=240, help="real clips, at most (240)")
    parser.add_argument("--seed", type=int, default=0, help="clip i is drawn with seed + i (0)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=float, help="weight of the text (the model's)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (8)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--out", default="evaluation", help="folder of the results (evaluation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, seeds=(1, 1e6), clips=(1, 1e6), seed=(0, 2**31), steps=(1, 1000),
                 fps=(0.1, 1000))
    asked = next((name for name in MEASURES if getattr(flags, name)), None)
    if flags.data != "shapes" and asked not in ("reconstruction", "fvd"):
        raise InputError(f"--data {flags.data}: needs --reconstruction or --fvd; prompts are judged "
                         f"on shapes alone")
    model = MagicVideo.load(flags.checkpoint, pick_device(flags.device))
    stage = {"interpolation": "interpolate", "upscaling": "upscale"}.get(asked)
    if stage and stage not in model.cascade:
        raise InputError(f"--{asked}: {flags.checkpoint} has no such network; train it: python "
                         f"train.py --stage {stage} --init-from {flags.checkpoint}")
    found = MEASURES.get(asked, prompt_accuracy)(model, flags)
    print_table(found["rows"])
    print_table(found.get("confusions", [])[:8])
    for name, value in found.items():
        if not isinstance(value, list):
            print(f"{name}: {value}")
    write_results(Path(flags.out) / "results.json", flags, found)


if __name__ == "__main__":
    run_command(main)
