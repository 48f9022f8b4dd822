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
LEAST_TRENDS = torch.tensor([0.3, 0.3, math.log(2)])  # at 8 frames a second, see ShapesDataset


def judge(video: Tensor, fps: float = 8) -> dict:
    """Name what a clip (f, 3, h, w) in [-1, 1] shows: {"color", "shape", "motion", "direction"}.

    None means "not recognisable". "direction" is that of the strongest trend, and "speed" its size;
    "motion" is the same word, or None where the trend is not as clear as in the data set at `fps`.
    """
    segmented = segment_object(video)
    if segmented is None:
        return {**dict.fromkeys((*WORDS, "direction")), "speed": math.nan}
    color, coverage, times = segmented
    return {"color": color, "shape": shape_word(coverage), **judge_motion(coverage, times, fps)}


def segment_object(video: Tensor) -> tuple[str | None, Tensor, Tensor] | None:
    """Find the object of a clip (f, 3, h, w): its color, coverage (n, h, w), frames (n,).

    Returns None unless in 3 of 4 frames a single object stands out from the border: by 0.5 or more
    (red on black: 2), on 0.5 to 50 % of the frame, with 2/3 of all that stands out.
    """
    video = video.detach().float().cpu().clamp(-1, 1)
    f, _, h, w = video.shape
    border = torch.cat([video[..., :2], video[..., -2:]], dim=3)  # left and right
    background = border.movedim(1, 0).flatten(1).median(1).values  # (3,)
    contrast = video - background[:, None, None]  # (f, 3, h, w)
    distinct = contrast.square().sum(1) > 0.5**2  # (f, h, w)
    objects = largest_component(distinct)
    area = objects.sum((1, 2)) / (h * w)  # (f,)
    distinct_area = distinct.sum((1, 2)) / (h * w)
    visible = (area > 0.005) & (area < 0.5) & (area > 2 / 3 * distinct_area)
    if visible.sum() < 3 / 4 * f:
        return None
    # An edge mixes the object's color with the background, which changes the length of the contrast
    # and not its direction: length tells how much of a pixel the object covers, finer than a pixel.
    pixels = contrast.movedim(1, -1)[visible]  # (n, h, w, 3)
    objects = objects[visible]
    object_color = pixels[objects].median(0).values  # (3,)
    alike = F.cosine_similarity(pixels[objects], object_color, dim=-1) > 0.95
    color = color_word(background + object_color) if alike.float().mean() > 0.9 else None
    coverage = pixels @ object_color / (object_color @ object_color).clamp(min=1e-6)
    return color, objects * coverage.clamp(0, 1), torch.arange(f)[visible].float()


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
    """Name the color nearest to (3,) in [-1, 1]; None if all are 0.4 away, channels in [0, 1]."""
    rgb = ((color + 1) / 2).tolist()
    distances = {word: math.dist(rgb, COLORS[word]) for word in COLORS}
    nearest = min(distances, key=distances.get)
    return nearest if distances[nearest] < 0.4 else None


def shape_word(coverage: Tensor) -> str | None:
    """Name the shape that fits 3 of 4 frames of (f, h, w), drawn as large and at the same place.

    It fits if its intersection with the object is most, and over 0.8, of their union.
    """
    w = coverage.shape[2]
    x, y, log_area = object_tracks(coverage)  # (f,) each
    mask = coverage > 0.5
    overlaps = []
    for shape, fill in zip(SHAPES, (math.pi / 4, 1, 1 / 2)):  # of its bounding box
        side = (log_area.exp() / fill).sqrt()
        above = side / 6 if shape == "triangle" else 0  # its middle, above its centroid
        drawn = draw_shape(shape, w, x.numpy(), (y - above).numpy(), side.numpy())
        drawn = torch.from_numpy(drawn) > 0.5
        overlaps.append((mask & drawn).sum((1, 2)) / (mask | drawn).sum((1, 2)))
    best, index = torch.stack(overlaps).max(0)  # (f,) each
    votes = Counter(SHAPES[i] for i in index[best > 0.8].tolist()).most_common(1)
    return votes[0][0] if votes and votes[0][1] >= 3 / 4 * len(coverage) else None


def judge_motion(coverage: Tensor, times: Tensor, fps: float) -> dict:
    """Name the direction of the strongest trend, its speed, and the motion as in the data set.

    Speed 1 is the least that the data set shows at 8 fps. The motion is None if the strongest trend
    is below half of the least at `fps`, not twice the next, or explains less than 0.8 of the
    variance: the object stands, moves askew, or to and fro.
    """
    slopes, explained = fit_trends(coverage, times)  # (3,)
    speeds = 7 * slopes.abs() / LEAST_TRENDS
    first, second, _ = speeds.argsort(descending=True).tolist()
    direction = TRENDS[first][int(slopes[first] > 0)]
    # of 8 frames or more; at 4 fps the slowest object crosses the frame
    least = min(1, 7 / max(times[-1] - times[0], 1)) * 8 / max(fps, 4)
    is_clear = speeds[first] > max(least / 2, 2 * speeds[second]) and explained[first] > 0.8
    return {"motion": direction if is_clear else None, "direction": direction,
            "speed": float(speeds[first])}


def fit_trends(coverage: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Fit straight lines to x, y and log area: (f, h, w), frames (f,) -> slopes, shares explained.

    Slopes (3,) are per frame, shares (3,) of the variance.
    """
    tracks = object_tracks(coverage) / torch.tensor([[coverage.shape[2]], [coverage.shape[1]], [1]])
    tracks = tracks - tracks.mean(1, keepdim=True)
    times = times - times.mean()
    slopes = tracks @ times / (times @ times).clamp(min=1e-6)
    residual = (tracks - slopes[:, None] * times).square().sum(1)
    return slopes, 1 - residual / tracks.square().sum(1).clamp(min=1e-9)


def object_tracks(coverage: Tensor) -> Tensor:
    """Follow x, y and log area of an object, in pixels: coverage (f, h, w) -> (3, f)."""
    area = coverage.sum((1, 2)).clamp(min=1e-6)  # (f,)
    x = coverage.sum(1) @ (torch.arange(coverage.shape[2]) + 0.5) / area
    y = coverage.sum(2) @ (torch.arange(coverage.shape[1]) + 0.5) / area
    return torch.stack([x, y, area.log()])


LABELS = {"color": "color", "shape": "shape", "motion": "motion as in the data set",
          "direction": "direction right", "axis": "direction right or opposite",
          "all three": "color, shape, motion"}


def balanced_prompts(split: str) -> list[str]:
    """List 24 captions, held out ("test") or trained ("train"), with every word equally often."""
    others = dict(zip(MOTIONS, MOTIONS if split == "test" else MOTIONS[3:] + MOTIONS[:3]))
    words = (caption.split(" ", 3)[1:] for caption in shape_captions("test"))
    return [f"a {color} {shape} {others[motion]}" for color, shape, motion in words]


def count(captions: list[str], verdicts: list[dict]) -> dict[str, tuple[int, int]]:
    """Count how often each verdict is the caption's: {verdict: (right, of how many)}."""
    hits = []
    for caption, verdict in zip(captions, verdicts):
        color, shape, motion = caption.split(" ", 3)[1:]
        truth = {"color": color, "shape": shape, "motion": motion, "direction": motion}
        hit = {key: verdict[key] == truth[key] for key in truth}
        hit["axis"] = any({verdict["direction"], motion} <= {*trend} for trend in TRENDS)
        hits.append({**hit, "all three": all(hit[word] for word in WORDS)})
    return {key: (sum(hit[key] for hit in hits), len(hits)) for key in LABELS}


def table_rows(counts: dict[str, dict]) -> list[dict]:
    """Make a row for each verdict and a column for each count: percent right with intervals."""
    rows = []
    for key, label in LABELS.items():
        row = {"right, % [95 % interval]": label}
        for name, counted in counts.items():
            right, n = counted[key]
            low, high = (100 * end for end in wilson(right, n))
            row[f"{name}, {n}"] = f"{100 * right / n:.0f} [{low:.0f}, {high:.0f}]"
        rows.append(row)
    return rows


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a rate of `right` in n, which holds near 0 and 1 too."""
    p, z = right / n, 1.959964
    middle = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2)
    scale = 1 + z * z / n
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def confusions(captions: list[str], verdicts: list[dict]) -> list[dict]:
    """List which words of captions were judged to be which others, the most frequent first."""
    pairs = [(truth, verdict[word]) for caption, verdict in zip(captions, verdicts)
             for word, truth in zip(WORDS, caption.split(" ", 3)[1:])]
    asked = Counter(truth for truth, _ in pairs)
    wrong = Counter(pair for pair in pairs if pair[0] != pair[1])
    return [{"asked": truth, "judged": word, "clips": n, "of": asked[truth]}
            for (truth, word), n in wrong.most_common()]
