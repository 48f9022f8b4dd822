"""Judge what a clip shows: the color, shape and motion of its object, from pixels alone (ours).

The judge knows neither caption nor model; its thresholds are geometry, fitted to no model's clips.
Read `lab/evaluate.py` next, which counts verdicts.
"""

import math
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor

from data import COLORS, MOTIONS, SHAPES, draw_shape, shape_captions

WORDS = ("color", "shape", "motion")  # of a caption
# x falls or rises, y falls or rises, the area falls or rises
TRENDS = (("moving left", "moving right"), ("moving up", "moving down"), ("shrinking", "growing"))
LEAST_TRENDS = (0.3, 0.3, math.log(2))  # of a clip at 8 frames a second, see ShapesDataset


def judge(video: Tensor, fps: float = 8) -> dict[str, str | None]:
    """Name what a clip (f, 3, h, w) in [-1, 1] shows: {"color", "shape", "motion", "direction"}.

    None means "not recognisable". All are None unless in 3 of 4 frames a single object stands out
    from the border: by 0.5 or more (red on black: 2), on 0.5 to 50 % of the frame, with 2/3 of all
    that stands out. "direction" is that of the strongest trend, however weak; "motion" is the same
    word if the trend is as clear as in the data set at `fps`, see `motion_words`.
    """
    segmented = segment_object(video)
    if segmented is None:
        return dict.fromkeys((*WORDS, "direction"))
    color, coverage, times = segmented
    motion, direction = motion_words(coverage, times, fps)
    return {"color": color, "shape": shape_word(coverage), "motion": motion, "direction": direction}


def segment_object(video: Tensor) -> tuple[str | None, Tensor, Tensor] | None:
    """Find the object of a clip (f, 3, h, w): its color, its coverage (n, h, w), its frames (n,).

    Coverage is how much of each pixel the object fills. Returns None if there is no single object.
    """
    video = video.detach().float().cpu().clamp(-1, 1)
    f, _, h, w = video.shape
    border = torch.ones(h, w, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    background = video[:, :, border].movedim(1, 0).flatten(1).median(1).values  # (3,)
    contrast = video - background[:, None, None]  # (f, 3, h, w)
    distinct = contrast.square().sum(1) > 0.5**2  # (f, h, w)
    objects = largest_component(distinct)
    area = objects.sum((1, 2)) / (h * w)  # (f,)
    distinct_area = distinct.sum((1, 2)) / (h * w)
    visible = (area > 0.005) & (area < 0.5) & (area > 2 / 3 * distinct_area)
    if visible.sum() < 3 / 4 * f:
        return None

    # The color is that of the inside. An edge mixes it with the background, which changes the
    # length of the contrast and not its direction: only another color differs in direction.
    pixels = contrast[visible].movedim(1, -1)  # (n, h, w, 3)
    objects = objects[visible]
    inside = -F.max_pool2d(-objects.float(), 3, 1, 1) > 0
    object_color = pixels[inside if inside.any() else objects].median(0).values  # (3,)
    alike = F.cosine_similarity(pixels[objects], object_color, dim=-1) > 0.95
    color = color_word(background + object_color) if alike.float().mean() > 0.9 else None

    # Coverage is 1 in the object, 0 outside, between them on edges: finer than a pixel.
    nearby = F.max_pool2d(objects.float(), 5, 1, 2)
    coverage = pixels @ object_color / (object_color @ object_color).clamp(min=1e-6)
    return color, nearby * coverage.clamp(max=1), torch.arange(f)[visible].float()


def largest_component(mask: Tensor) -> Tensor:
    """Keep the largest connected component of each frame: bool (f, h, w) -> bool (f, h, w)."""
    labels = mask * torch.arange(1.0, mask[0].numel() + 1).view(mask[0].shape)  # (f, h, w)
    before = None
    while before is None or not torch.equal(labels, before):  # the highest floods its component
        before = labels
        vertical = F.max_pool2d(labels, (3, 1), 1, (1, 0))
        horizontal = F.max_pool2d(labels, (1, 3), 1, (0, 1))
        labels = mask * torch.maximum(vertical, horizontal)
    largest = [frame[frame > 0].long().bincount(minlength=1).argmax() for frame in labels]
    return mask & (labels == torch.stack(largest)[:, None, None])


def color_word(color: Tensor) -> str | None:
    """Name the color of the data set nearest to (3,) in [-1, 1]; None if all are 0.4 away in RGB."""
    rgb = ((color + 1) / 2).tolist()
    distances = {word: math.dist(rgb, COLORS[word]) for word in COLORS}
    nearest = min(distances, key=distances.get)
    return nearest if distances[nearest] < 0.4 else None


def shape_word(coverage: Tensor) -> str | None:
    """Name the shape that fits 3 of 4 frames of (f, h, w), drawn as large and at the same place.

    It fits if its intersection with the object is most, and over 0.8, of their union.
    """
    mask = coverage > 0.5  # (f, h, w)
    area = mask.sum((1, 2)).clamp(min=1)  # (f,), in pixels
    centers = torch.arange(len(mask[0])) + 0.5
    x = mask.float().sum(1) @ centers / area  # (f,)
    y = mask.float().sum(2) @ centers / area
    overlaps = []
    for shape, fill in zip(SHAPES, (math.pi / 4, 1, 1 / 2)):  # of its bounding box
        side = (area / fill).sqrt()
        middle = y - side / 6 if shape == "triangle" else y  # where its box has its middle
        drawn = draw_shape(shape, len(mask[0]), x.numpy(), middle.numpy(), side.numpy())
        drawn = torch.from_numpy(drawn) > 0.5
        overlaps.append((mask & drawn).sum((1, 2)) / (mask | drawn).sum((1, 2)))
    best, index = torch.stack(overlaps).max(0)  # (f,) each
    votes = Counter(SHAPES[i] for i in index[best > 0.8].tolist()).most_common(1)
    return votes[0][0] if votes and votes[0][1] >= 3 / 4 * len(mask) else None


def motion_words(coverage: Tensor, times: Tensor, fps: float) -> tuple[str | None, str]:
    """Name the motion as the data set has it, or None, and the direction of the strongest trend.

    Trends count in multiples of the least that the data set shows at 8 frames a second. The motion
    is None if the strongest is below half of that, not twice the next, or explains less than 0.8 of
    the variance: the object stands, moves askew, or to and fro.
    """
    slopes, explained = fit_trends(coverage, times)  # (3,) per frame
    span = float(times.max() - times.min())
    strengths = slopes * max(span, 1) / torch.tensor(LEAST_TRENDS)  # from end to end
    first, second, _ = strengths.abs().argsort(descending=True).tolist()
    direction = TRENDS[first][int(slopes[first] > 0)]
    # of 8 frames or more; at 4 fps the slowest object crosses the frame
    least = min(span / 7, 1) * 8 / max(fps, 4)
    demanded = max(least / 2, 2 * float(strengths[second].abs()))
    is_clear = strengths[first].abs() > demanded and explained[first] > 0.8
    return direction if is_clear else None, direction


def fit_trends(coverage: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Fit straight lines to x, y (in frame widths and heights) and log area of an object.

    coverage (f, h, w), times (f,) -> slopes per frame (3,), explained shares of variance (3,).
    """
    tracks = object_tracks(coverage)
    tracks = tracks - tracks.mean(1, keepdim=True)
    times = times - times.mean()
    slopes = tracks @ times / (times @ times).clamp(min=1e-6)
    residual = (tracks - slopes[:, None] * times).square().sum(1)
    return slopes, 1 - residual / tracks.square().sum(1).clamp(min=1e-9)


def object_tracks(coverage: Tensor) -> Tensor:
    """Follow x and y (in frame widths and heights) and log area: coverage (f, h, w) -> (3, f)."""
    _, h, w = coverage.shape
    area = coverage.sum((1, 2)).clamp(min=1e-6)  # (f,)
    x = coverage.sum(1) @ torch.arange(float(w)) / area / w
    y = coverage.sum(2) @ torch.arange(float(h)) / area / h
    return torch.stack([x, y, area.log()])


def expected_trend(caption: str) -> tuple[int, int]:
    """Return which trend a caption asks for, and the sign of its slope."""
    motion = caption.split(" ", 3)[3]
    trend = next(i for i, words in enumerate(TRENDS) if motion in words)
    return trend, 2 * TRENDS[trend].index(motion) - 1


# --------------------------------------------------------------------------------------------------
# Counting verdicts

LABELS = {"color": "color", "shape": "shape", "motion": "motion as in the data set",
          "direction": "direction right", "all three": "color, shape, motion"}


def balanced_prompts(split: str) -> list[str]:
    """List 24 captions, held out ("test") or trained ("train"), with every word equally often."""
    others = dict(zip(MOTIONS, MOTIONS if split == "test" else MOTIONS[3:] + MOTIONS[:3]))
    words = (caption.split(" ", 3)[1:] for caption in shape_captions("test"))
    return [f"a {color} {shape} {others[motion]}" for color, shape, motion in words]


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate of `right` in n, which holds near 0 and 1 too."""
    p, z = right / n, 1.959964
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - spread) / (1 + z * z / n)), min(1.0, (middle + spread) / (1 + z * z / n))


def count(name: str, captions: list[str], verdicts: list[dict]) -> dict:
    """Count of how many clips each verdict is the caption's."""
    hits = {key: [] for key in LABELS}
    for caption, verdict in zip(captions, verdicts):
        color, shape, motion = caption.split(" ", 3)[1:]
        truth = {"color": color, "shape": shape, "motion": motion, "direction": motion}
        for key in truth:
            hits[key].append(verdict[key] == truth[key])
        hits["all three"].append(all(hits[word][-1] for word in WORDS))
    n = len(captions)
    return {"name": name, "clips": n,
            **{key: {"right": sum(hit), "rate": sum(hit) / n, "interval": wilson(sum(hit), n)}
               for key, hit in hits.items()}}


def table_rows(counts: list[dict]) -> list[dict]:
    """Make a row for each verdict and a column for each count: percent right with intervals."""
    rows = [{"right, % [95 % interval]": label} for label in LABELS.values()]
    for counted in counts:
        for row, key in zip(rows, LABELS):
            rate, low, high = (100 * x for x in (counted[key]["rate"], *counted[key]["interval"]))
            row[f"{counted['name']}, {counted['clips']}"] = f"{rate:.0f} [{low:.0f}, {high:.0f}]"
    return rows


def confusions(captions: list[str], verdicts: list[dict]) -> list[dict]:
    """List which words of captions were judged to be which others, the most frequent first."""
    pairs = [(truth, verdict[word]) for caption, verdict in zip(captions, verdicts)
             for word, truth in zip(WORDS, caption.split(" ", 3)[1:])]
    asked = Counter(truth for truth, _ in pairs)
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    return [{"asked": truth, "judged": word, "clips": n, "of": asked[truth]}
            for (truth, word), n in wrong.most_common()]
