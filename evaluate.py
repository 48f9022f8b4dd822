"""Does a model do what it is told? Clips of held-out captions, judged from pixels alone (ours); and other measures.

`judge` looks at a clip and says a color, a shape and a motion of the shapes data set's grammar, or None. It knows
neither caption nor model; its thresholds are geometry, fitted to no model's clips. Two rows of the table watch over it:
it must be right on real clips, and no better than chance under shuffled captions. Read `data.py` for the data set.
"""

import argparse
import colorsys
import json
import math
import os
import shlex
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: programs on the same cores wait without spinning

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from data import COLORS, MOTIONS, ClipFolder, InputError, ShapesDataset, shape_captions, strip, write_image
from fvd import features, frechet_distance, load_i3d
from magicvideo import MagicVideo, choose_device
from progress import commit

# ---------------------------------------------------------------------------------------------------------------------
# The judge

WORDS = ("color", "shape", "motion")
# how much of its bounding box a shape fills (a triangle: 0.5, and more since an apex thinner than a pixel is not in the
# box), how much more of the box's lower half than of its upper half, and the logarithm of its height over its width
FILLS = {"circle": (math.pi / 4, 0, 0), "square": (1, 0, 0), "triangle": (0.54, 0.5, 0)}
# x falls or rises, y falls or rises, the area falls or rises
TRENDS = (("moving left", "moving right"), ("moving up", "moving down"), ("shrinking", "growing"))


def judge(video: Tensor, fps: float = 8) -> dict[str, str | None]:
    """What a clip (f, 3, h, w), pixels in [-1, 1], shows: {"color", "shape", "motion"}, each a word or None.

    None is "nothing recognisable". All are None unless in 3 of 4 frames a single object stands out from the border: by
    0.5 or more (red on black: 2), on 0.5 to 50 % of the frame, with 2/3 of all that stands out. Color is None if 1 of
    10 of the object's pixels differs, or if it is no color of the grammar. `fps` says how little motion is none (ours).
    """
    seen = look(video)
    if seen is None:
        return dict.fromkeys(WORDS)
    color, coverage, times = seen
    return {"color": color, "shape": shape_word(coverage), "motion": motion_word(coverage, times, fps)}


def look(video: Tensor) -> tuple[str | None, Tensor, Tensor] | None:
    """A clip (f, 3, h, w) -> its object's color, how much of each pixel it covers (n, h, w), the frames it is in (n,).

    None if there is no single object.
    """
    video = video.detach().float().cpu().clamp(-1, 1)
    f, _, h, w = video.shape
    border = torch.ones(h, w, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    background = video[:, :, border].movedim(1, 0).flatten(1).median(1).values               # (3,)
    away = video - background[:, None, None]                                                 # (f, 3, h, w)
    distinct = away.square().sum(1) > 0.5**2                                                 # (f, h, w)
    objects = largest_component(distinct)
    area, distinct_area = objects.sum((1, 2)) / (h * w), distinct.sum((1, 2)) / (h * w)
    there = (area > 0.005) & (area < 0.5) & (area > 2 / 3 * distinct_area)                   # (f,)
    if there.sum() < 3 / 4 * f:
        return None

    # The color is that of the inside. An edge mixes it with the background: that changes how far away a pixel is from
    # the background, but not the direction, so that only another color differs in direction.
    pixels, objects, times = away[there].movedim(1, -1), objects[there], torch.arange(f)[there].float()
    inside = -F.max_pool2d(-objects.float(), 3, 1, 1) > 0
    far = pixels[inside if inside.any() else objects].median(0).values                       # (3,)
    alike = F.cosine_similarity(pixels[objects], far, dim=-1) > 0.95
    color = color_word(background + far) if alike.float().mean() > 0.9 else None

    # Coverage is 1 in the object, 0 outside and between them on its edges: what it measures is finer than a pixel.
    nearby = F.max_pool2d(objects.float(), 5, 1, 2)
    return color, nearby * (pixels @ far / (far @ far).clamp(min=1e-6)).clamp(max=1), times


def largest_component(mask: Tensor) -> Tensor:
    """The largest connected component of each frame: bool (f, h, w) -> bool (f, h, w)."""
    mask, labels, before = mask.numpy(), mask.numpy() * np.arange(1, mask[0].numel() + 1).reshape(mask[0].shape), None
    while not np.array_equal(before, labels):  # until its highest label has flooded each component
        before = labels.copy()
        for turn in range(4):  # down, right, up, left: a row at a time, in place
            to, open_to = np.rot90(labels, turn, (1, 2)), np.rot90(mask, turn, (1, 2))
            for row in range(1, to.shape[1]):
                np.maximum(to[:, row], to[:, row - 1] * open_to[:, row], out=to[:, row])
    largest = [np.bincount(frame[frame > 0], minlength=1).argmax() for frame in labels]
    return torch.from_numpy(mask & (labels == np.reshape(largest, (-1, 1, 1))))


def color_word(color: Tensor) -> str | None:
    """The word for a color (3,) in [-1, 1], by hue, or white if it has none; None if it is dark, pale or between."""
    hue, saturation, value = colorsys.rgb_to_hsv(*((color + 1) / 2).tolist())
    hues = {word: colorsys.rgb_to_hsv(*COLORS[word])[0] for word in COLORS if word != "white"}
    turns = {word: abs((hue - hues[word] + 0.5) % 1 - 0.5) * 360 for word in hues}           # degrees
    nearest = min(turns, key=turns.get)
    word, clear = (nearest, turns[nearest] < 25) if saturation > 0.5 else ("white", saturation < 0.3)
    return word if clear and value > 0.4 else None


def shape_word(coverage: Tensor) -> str | None:
    """The shape that 3 of 4 frames of (f, h, w) show, by how much of its bounding box the object fills."""
    words = []
    for frame in coverage:
        (left, right), (top, bottom) = edges(frame.amax(0)), edges(frame.amax(1))
        # A blurred triangle loses its apex and fills its shorter box as a circle does, but its lower half still more.
        upper = ((top + bottom) / 2 - torch.arange(len(frame))).clamp(0, 1)                  # (h,), part of each row
        height, width = max(bottom - top, 1), max(right - left, 1)
        over, under = (float(part @ frame.sum(1)) / (height * width / 2) for part in (upper, 1 - upper))
        seen = (over + under) / 2, under - over, math.log(height / width)
        distances = {word: math.dist(seen, FILLS[word]) for word in FILLS}
        nearest = min(distances, key=distances.get)
        words.append(nearest if distances[nearest] < 0.25 else None)
    word, votes = Counter(words).most_common(1)[0]
    return word if votes >= 3 / 4 * len(words) else None


def edges(profile: Tensor) -> tuple[float, float]:
    """Where a profile (n,) first rises through 1/2 and last falls through it, in pixels and parts of a pixel."""
    p = F.pad(profile, (1, 1))
    above = (p >= 0.5).nonzero().flatten().tolist()
    if not above:
        return 0.0, 0.0
    a, b = above[0], above[-1]
    return float(a - 0.5 - (p[a] - 0.5) / (p[a] - p[a - 1])), float(b - 0.5 + (p[b] - 0.5) / (p[b] - p[b + 1]))


def motion_word(coverage: Tensor, times: Tensor, fps: float) -> str | None:
    """The motion of an object that covers (f, h, w) at frames `times` (f,), by straight lines through place and area.

    Lines are measured in the least that the data set shows at 8 frames a second. None if the steepest is below half of
    that, not twice as steep as the next, or explains less than 0.8 of the variance: it stands, goes askew, to and fro.
    """
    rises, explained = lines(coverage, times)                                                # (3,), a frame
    span = float(times.max() - times.min())
    rises = rises * max(span, 1) / torch.tensor([0.3, 0.3, math.log(2)])                     # from end to end
    least = min(span / 7, 1) * 8 / max(fps, 4)  # of 8 frames or more; at 4 fps the slowest object crosses the frame
    first, second, _ = rises.abs().argsort(descending=True).tolist()
    clear = rises[first].abs() > max(least / 2, 2 * float(rises[second].abs())) and explained[first] > 0.8
    return TRENDS[first][int(rises[first] > 0)] if clear else None


def lines(coverage: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Straight lines through x, y (in widths and heights of the frame) and log area of an object: (f, h, w), (f,) ->

    how much each rises a frame (3,), and how much of its variance the line explains (3,).
    """
    _, h, w = coverage.shape
    area = coverage.sum((1, 2)).clamp(min=1e-6)                                              # (f,)
    x, y = (coverage.sum(axis) @ torch.arange(float(n)) / area / n for axis, n in ((1, w), (2, h)))
    tracks = torch.stack([x, y, area.log()])                                                 # (3, f)
    tracks, times = tracks - tracks.mean(1, keepdim=True), times - times.mean()
    rises = tracks @ times / (times @ times).clamp(min=1e-6)
    left = (tracks - rises[:, None] * times).square().sum(1)
    return rises, 1 - left / tracks.square().sum(1).clamp(min=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Following prompts


def wilson(right: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a rate of which `right` of n were seen; unlike p +- 2 s, it holds near 0 and 1."""
    p, z = right / n, 1.959964
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def count(name: str, captions: list[str], verdicts: list[dict]) -> dict:
    """A row of the table: of how many clips each word, and all three, were judged to be their caption's."""
    hits = [[v[w] == truth for w, truth in zip(WORDS, c.split(" ", 3)[1:])] for c, v in zip(captions, verdicts)]
    n, right = len(hits), zip((*WORDS, "all three"), (*map(sum, zip(*hits)), sum(map(all, hits))))
    return {"name": name, "clips": n, **{w: {"right": k, "rate": k / n, "interval": wilson(k, n)} for w, k in right}}


def confusions(captions: list[str], verdicts: list[dict]) -> list[dict]:
    """Which words of captions were judged to be which others, the most frequent first."""
    said = [(truth, v[w]) for c, v in zip(captions, verdicts) for w, truth in zip(WORDS, c.split(" ", 3)[1:])]
    asked, wrong = Counter(truth for truth, _ in said), Counter(pair for pair in said if pair[0] != pair[1])
    return [{"asked": a, "judged": b, "clips": n, "of": asked[a]} for (a, b), n in wrong.most_common()]


def table(rows: list[dict]) -> str:
    """Rows -> text, in percent."""
    columns, percent = (*WORDS, "all three"), "{:.1%} [{:.1%}, {:.1%}]"
    lines = [f"{'right [95 % interval]':22}{'clips':>6}" + "".join(f"{word:>23}" for word in columns)]
    for row in rows:
        cells = (percent.format(row[word]["rate"], *row[word]["interval"]) for word in columns)
        lines.append(f"{row['name']:22}{row['clips']:6}" + "".join(f"{cell:>23}" for cell in cells))
    return "\n".join(lines)


def prompts_of(split: str) -> list[str]:
    """24 captions, held-out for "test" or trained for "train"; both have every word equally often."""
    others = dict(zip(MOTIONS, MOTIONS if split == "test" else MOTIONS[3:] + MOTIONS[:3]))
    words = (caption.split(" ", 3)[1:] for caption in shape_captions("test"))
    return [f"a {color} {shape} {others[motion]}" for color, shape, motion in words]


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


def decibels(error: Tensor) -> float:
    """PSNR of a mean squared error between videos in [-1, 1]."""
    return float(10 * torch.log10(4 / error))


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


MEASURES = {"rates": rates, "reconstruction": reconstruction, "fvd": frechet}


def main(arguments: list[str] | None = None) -> None:
    """One measure of a model: prints it and writes it to OUT/results.json, pictures beside it."""
    parser = argparse.ArgumentParser(description="Measures a model: how well it follows prompts, from pixels alone, "
                                                 "or what --rates, --reconstruction or --fvd say.")
    parser.add_argument("--checkpoint", required=True, help="the model.pt that train.py wrote")
    measure = parser.add_mutually_exclusive_group()
    measure.add_argument("--rates", action="store_true", help="measure instead how motion changes with --fps")
    measure.add_argument("--reconstruction", action="store_true", help="measure instead the VideoVAE and its flicker")
    measure.add_argument("--fvd", action="store_true", help="measure instead the Fréchet video distance to real clips")
    parser.add_argument("--data", default="shapes", help='"shapes"; for --reconstruction and --fvd also a folder')
    parser.add_argument("--split", default="both", choices=["test", "train", "both"], help="test: held-out captions")
    parser.add_argument("--seeds", type=int, default=4, help="clips of each of the 24 captions")
    parser.add_argument("--clips", type=int, default=240, help="real clips for --reconstruction and --fvd")
    parser.add_argument("--seed", type=int, default=0, help="clip i of a split is drawn with seed + i")
    parser.add_argument("--steps", type=int, default=50, help="steps of the sampler")
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
