"""Measure whether sampled clips follow their captions, judged from pixels alone (ours), and more.

Two columns of the table watch over the judge (`lab/judge.py`): it must be right on real clips, and
no better than chance under shuffled captions. Read `lab/ablation.py` next.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

from lab.results import check_ranges, report, run_command  # before torch: sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cascade
from clip_files import MAX_FRAMES, write_film_strip
from data import ClipFolder, ShapesDataset
from lab.fvd import frechet_distance, i3d_features, load_i3d
from lab.judge import balanced_prompts, confusions, count, judge, table_rows
from magicvideo import MagicVideo
from runs import InputError, pick_device


def prompt_accuracy(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Count how often color, shape and motion of a sampled clip are those of its caption."""
    judged = {}  # captions and verdicts
    for split, name in (("test", "held-out captions"), ("train", "trained captions")):
        if flags.split in (split, "both"):
            prompts = balanced_prompts(split) * flags.seeds
            videos = sample_prompts(model, prompts, flags, flags.fps)
            write_film_strip(Path(flags.out) / f"{split}.png", videos[:24])
            judged[name] = (prompts, [judge(video, flags.fps) for video in videos])
    prompts, verdicts = next(iter(judged.values()))
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    judged["captions shuffled"] = ([prompts[i] for i in order], verdicts)
    real = real_clips(model, flags)
    judged["real clips"] = ([clip["caption"] for clip in real],
                            [judge(clip["video"], clip["fps"]) for clip in real])
    counts = {name: count(*pair) for name, pair in judged.items()}
    wrong = confusions(prompts, verdicts)[:8]
    return {"rows": table_rows(counts), "confusions": wrong, "counts": counts}


def sample_prompts(model: MagicVideo, prompts: list[str], flags: argparse.Namespace,
                   fps: float) -> Tensor:
    """Sample clips (n, f, 3, h, w), clip i with --seed + i."""
    videos = []
    for i in tqdm(range(0, len(prompts), 24), f"{fps:g} fps", disable=None):
        batch = prompts[i : i + 24]
        videos.append(model.sample(batch, fps, flags.steps, flags.guidance, seed=flags.seed + i))
    return torch.cat(videos).cpu()


def real_clips(model: MagicVideo, flags: argparse.Namespace, seed: int = 0,
               fps: float | None = None, frames: int = 0, scale: int = 1,
               rate_multiplier: int = 1) -> list[dict]:
    """Cut at most --clips held-out clips, of shapes or of a folder: as the model's, unless told."""
    cut = (frames or model.config.unet.frames, scale * model.config.size, flags.seed + seed,
           (fps or flags.fps) * rate_multiplier)
    if flags.data == "shapes":
        clips = ShapesDataset("test", *cut, rate_multiplier=rate_multiplier)
        return [clips[i] for i in range(min(len(clips), flags.clips))]
    folder = open_folder(flags, *cut, max_frames=MAX_FRAMES if scale == 1 else cut[0])
    _, *parts = split(folder, flags.held_out).values()
    return [*islice((part[i] for part in parts for i in range(len(part))), flags.clips)]


def own_clips(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Find the real clip nearest to each sample, by `signature`: it should have the same caption.

    No judge's network is asked. top-1 and top-5 tell how often a clip of the caption is the nearest
    or among the five nearest; a row for each list of --words, how often the nearest clip's caption
    has the word of the prompt. Chance is that of a clip drawn at random. Then how much the samples
    move, and PSNR of the VideoVAE.
    """
    folder = open_folder(flags, model.config.unet.frames, model.config.size, flags.seed, flags.fps)
    real = torch.stack([signature(torch.tensor(folder.pixels[start : start + total]))
                        for start, total, *_ in tqdm(folder.clips, "real clips", disable=None)])
    rows = []
    motion = []
    for name, part in split(folder, flags.held_out).items():
        captions = [*dict.fromkeys(filter(None, part.captions))]
        if not captions:
            raise InputError(f"--data {flags.data}: no {name}; add some to metadata.csv")
        prompts = captions[:: math.ceil(len(captions) / flags.prompts)]
        videos = sample_prompts(model, prompts, flags, flags.fps)
        picture = f"{name.removesuffix(' captions').replace(' ', '-')}.png"
        write_film_strip(Path(flags.out) / picture, videos[:24])
        cuts = torch.stack([part[part.captions.index(prompt)]["video"] for prompt in prompts])
        motion.append({"how much moves": name, **compare_motion(prompts, videos, cuts)})
        found = torch.stack([signature(clip) for clip in to_bytes(videos)])
        nearest = torch.cdist(found, real).argsort(dim=1)  # (prompts, clips)
        for kind, match in matches(flags.words):
            asked = [n for n, prompt in enumerate(prompts) if match(prompt, prompt)]
            agree = torch.tensor([[match(prompts[n], caption) for caption in folder.captions]
                                  for n in asked]).float()  # (asked, clips)
            ranked = agree.gather(1, nearest[asked]) if asked else agree.new_zeros(0, 5)
            rows.append({"of": name, "kind": kind, "prompts": len(asked),
                         "top-1": float(ranked[:, :1].mean()), "chance": float(agree.mean()),
                         "top-5": float(ranked[:, :5].amax(1).mean())})
    return {"rows": rows, "motion": motion, "reconstruction": reconstruction(model, flags)["rows"]}


def split(folder: ClipFolder, files: list[str]) -> dict[str, ClipFolder]:
    """Part a folder: clips trained on, and those held out, each file of --held-out by itself."""
    if len(files) < 2:
        return dict(zip(("trained captions", "held-out captions"), folder.split(*files)))
    parts = {Path(file).stem.replace("_", " "): folder.split(file)[1] for file in files}
    held_out = {name for part in parts.values() for name in part.names}
    trained = [i for i, name in enumerate(folder.names) if name not in held_out]
    return {"trained captions": folder.subset(trained), **parts}


def compare_motion(prompts: list[str], videos: Tensor, real: Tensor) -> dict:
    """Divide how much samples (n, f, 3, h, w) move by how much real clips of their captions do.

    Motion is the spread over time, of `signature`; a still has none.
    """
    sampled, true = (torch.stack([signature(clip).chunk(2)[1].mean() for clip in to_bytes(clips)])
                     for clips in (videos, real))
    ratio = sampled / true.clamp(min=1e-6)
    low, median, high = torch.quantile(ratio, torch.tensor([0.25, 0.5, 0.75])).tolist()
    order = [prompts[i] for i in ratio.argsort()]
    return {"samples": float(sampled.median()), "real clips": float(true.median()),
            "ratio": median, "quartiles": f"{low:.2f} to {high:.2f}",
            "0.5 to 2": float(((ratio > 0.5) & (ratio < 2)).float().mean()),
            "least": ", ".join(order[:3]), "most": ", ".join(order[-3:])}


def to_bytes(videos: Tensor) -> Tensor:
    """Turn videos (n, f, 3, h, w) in [-1, 1] to bytes (n, f, h, w, 3)."""
    return ((videos.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 1, 3, 4, 2)


def signature(frames: Tensor) -> Tensor:
    """Reduce frames (f, h, w, 3) of bytes to their mean and spread over time, at 16 x 16."""
    small = F.adaptive_avg_pool2d(frames.permute(0, 3, 1, 2).float() / 127.5 - 1, 16)
    return torch.cat([small.mean(0).flatten(), small.std(0, correction=0).flatten()])


def matches(lists: list[str]) -> list[tuple[str, Callable]]:
    """Return pairs of a name and a function, which tells whether a prompt and a caption agree."""
    def same_word(words: set[str], prompt: str, caption: str) -> bool:
        asked = words.intersection(prompt.split())
        return len(asked) == 1 and words.intersection(caption.split()) == asked

    return [("caption", lambda prompt, caption: prompt == caption),
            *((words, partial(same_word, {*words.split()})) for words in lists)]


def open_folder(flags: argparse.Namespace, frames: int, size: int, seed: int, fps: float,
                max_frames: int = MAX_FRAMES) -> ClipFolder:
    """Open the clips of --data, as many as can be used, and say which cannot."""
    folder = ClipFolder(flags.data, frames, size, seed, fps, flags.frame_store, max_frames,
                        skip_unusable=True)
    for note in folder.notes:
        if "left out" in note:
            print(note)
    return folder


def rates(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Measure the speed of objects at 4, 8 and 16 fps, same prompts and seeds (paper §3.2, FPS).

    The data set is cut at whole strides of 24 fps, so that its clips nearest to 16 have 12.
    """
    prompts = balanced_prompts("test") * flags.seeds
    speeds = []
    rows = []
    for fps in (4, 8, 16):
        videos = sample_prompts(model, prompts, flags, fps)
        real = real_clips(model, flags, fps=fps)
        speeds.append(torch.tensor([judge(video)["speed"] for video in videos]))
        true = torch.tensor([judge(clip["video"])["speed"] for clip in real])
        rows.append({"fps": fps, "median speed": float(speeds[-1].nanmedian()),
                     "of the data set": float(true.nanmedian()),
                     "cut at, fps": sum(clip["fps"] for clip in real) / len(real)})
    four, eight, sixteen = speeds
    is_slower = (four > eight) & (eight > sixteen)
    is_judged = ~(four + eight + sixteen).isnan()
    return {"rows": rows, "slower from 4 to 8 to 16 fps":
            f"{int(is_slower.sum())} of {int(is_judged.sum())} clips"}


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
    return psnr_table(errors)


def psnr_table(errors: dict[str, list[Tensor]]) -> dict:
    """Turn squared errors of clips in [-1, 1], a list for each name, into PSNR in dB."""
    return {"rows": [{"name": name, "clips": len(values),
                      "PSNR": float(10 * torch.log10(4 / torch.stack(values).mean()))}
                     for name, values in errors.items()]}


def fvd(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compute FVD to real clips of samples of their captions, and of other real clips."""
    i3d = {name: weight.to(model.device) for name, weight in load_i3d().items()}
    real = real_clips(model, flags)
    others = "other real clips" if flags.data == "shapes" else "the same clips, cut again"
    videos = {"samples": sample_prompts(model, [c["caption"] for c in real], flags, flags.fps),
              others: torch.stack([c["video"] for c in real_clips(model, flags, 1)])}
    reference = i3d_features(i3d, torch.stack([clip["video"] for clip in real]))
    return {"rows": [{"name": name, "clips": len(real),
                      "FVD": frechet_distance(reference, i3d_features(i3d, clips))}
                     for name, clips in videos.items()]}


@torch.no_grad()
def interpolation(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compare frames between true key frames with the true ones, beside a cross-fade."""
    network = cascade.build(model, "interpolate")
    gap = cascade.NEW_FRAMES + 1
    length = gap * (model.config.unet.frames - 1) + 1
    times = torch.arange(length) / gap  # of key frames: 0, 1, 2 ...
    is_new = times % 1 > 0
    shares = (1 - (times[:, None] - times[::gap]).abs()).clamp(min=0)  # of a cross-fade, (n, f)
    errors = defaultdict(list)
    rows = []  # of the picture: the real clip, and what each way makes of its key frames
    clips = real_clips(model, flags, frames=length, rate_multiplier=gap)
    for i, clip in enumerate(tqdm(clips, disable=None)):
        true = clip["video"]
        keys = model.encode(true[None, ::gap])
        context = model.encode_text([clip["caption"]])
        z = network.sample(keys, context, clip["fps"] / gap, seed=flags.seed + i)
        decoded_keys = model.decode(keys)[0].cpu()
        videos = {"interpolated": model.decode(z)[0].cpu(),
                  "cross-fade": torch.tensordot(shares, true[::gap], dims=1),
                  "cross-fade of decoded key frames": torch.tensordot(shares, decoded_keys, dims=1),
                  "nearest key frame": true[(times + 0.5).long() * gap],
                  "encoded and decoded": model.decode(model.encode(true[None]))[0].cpu()}
        for name, video in videos.items():
            errors[name].append((video - true)[is_new].square().mean())
        if i % math.ceil(len(clips) / 8) == 0:
            rows += [video[: 2 * gap + 1] for video in (true, *[*videos.values()][:2])]
    write_film_strip(Path(flags.out) / "interpolation.png", torch.stack(rows))
    return psnr_table(errors)


@torch.no_grad()
def upscaling(model: MagicVideo, flags: argparse.Namespace) -> dict:
    """Compare enlarged frames with the true large ones, beside bicubic upsampling."""
    network = cascade.build(model, "upscale")
    errors = defaultdict(list)
    rows = []
    clips = real_clips(model, flags, frames=2, scale=cascade.SCALE)
    for i, clip in enumerate(tqdm(clips, disable=None)):
        true = clip["video"][None, :1].to(model.device)  # (1, 1, 3, 4h, 4w)
        small = cascade.downsample(true)
        context = model.encode_text([clip["caption"]])
        upscaled = network.sample(small, context, seed=flags.seed + i)
        bicubic = cascade.upsample_bicubic(small).clamp(-1, 1)
        errors["upscaled"].append((upscaled - true).square().mean())
        errors["bicubic"].append((bicubic - true).square().mean())
        if i % math.ceil(len(clips) / 8) == 0:
            rows.append(torch.cat([bicubic, upscaled, true], dim=1)[0].cpu())
    write_film_strip(Path(flags.out) / "upscaling.png", torch.stack(rows))
    return psnr_table(errors)


MEASURES = {f.__name__: f for f in (rates, reconstruction, fvd, interpolation, upscaling)}


def main(arguments: list[str] | None = None) -> None:
    """Measure one thing, print it and write it to OUT/results.json."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", required=True, help="the model.pt that train.py wrote")
    measure = parser.add_mutually_exclusive_group()
    for name, function in MEASURES.items():
        measure.add_argument(f"--{name}", dest="measure", action="store_const", const=name,
                             help=function.__doc__.split("\n")[0])
    parser.add_argument("--data", default="shapes", help="a folder of clips (shapes)")
    parser.add_argument("--held-out", nargs="+", default=[], metavar="FILE", help="name the clips "
                        "held out; several files are counted each by itself")
    parser.add_argument("--frame-store", default="runs/frames", help="as of train.py (runs/frames)")
    parser.add_argument("--prompts", type=int, default=128, help="of a folder, at most (128)")
    parser.add_argument("--words", nargs="*", default=[], metavar="LIST",
                        help='of a folder: words of one kind, e.g. "man woman person"')
    parser.add_argument("--split", default="both", choices=["test", "train", "both"],
                        help="captions: test = held out, train = trained (both)")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each of 24 captions (4)")
    parser.add_argument("--clips", type=int, default=240, help="real clips, at most (240)")
    parser.add_argument("--seed", type=int, default=0, help="clip i is drawn with seed + i (0)")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (50)")
    parser.add_argument("--guidance", type=float, help="weight of the text (the model's)")
    parser.add_argument("--fps", type=float, default=8.0, help="frames per second (8)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    parser.add_argument("--out", default="evaluation", help="folder of the results (evaluation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, seeds=(1, 10**6), prompts=(1, 10**6), clips=(1, 10**6), seed=(0, 2**31),
                 steps=(1, 1000), fps=(0.1, 1000))
    if flags.data != "shapes" and flags.measure == "rates":
        raise InputError("--rates: measures shapes alone; leave --data out")
    model = MagicVideo.load(flags.checkpoint, pick_device(flags.device))
    stage = {"interpolation": "interpolate", "upscaling": "upscale"}.get(flags.measure)
    if stage and stage not in model.cascade:
        raise InputError(f"--{flags.measure}: {flags.checkpoint} has no such network; train it: "
                         f"python train.py --stage {stage} --init-from {flags.checkpoint}")
    measure = prompt_accuracy if flags.data == "shapes" else own_clips
    found = MEASURES.get(flags.measure, measure)(model, flags)
    report(Path(flags.out) / "results.json", flags, found)


if __name__ == "__main__":
    run_command("lab.evaluate", main)
