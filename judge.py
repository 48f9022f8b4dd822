"""What does a clip show? `judge` looks at pixels and says a color, a shape and a motion of the shapes, or None.

It knows neither caption nor model; its thresholds are geometry, fitted to no model's clips (ours). `evaluate.py` counts
how often it says what was asked for. Read `data.py` for the data set.
"""

import colorsys
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import COLORS, MOTIONS, shape_captions

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
# Counting what it says


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


def decibels(error: Tensor) -> float:
    """PSNR of a mean squared error between videos in [-1, 1]."""
    return float(10 * torch.log10(4 / error))
