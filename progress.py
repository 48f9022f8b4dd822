"""How a training goes, for a person to look at: OUT/log.csv, OUT/loss.png and OUT/samples/ (all ours).

The loss of a diffusion model says little as one number: at little noise it is about detail, at much noise about what
the caption says, and the second is learned last. So it is kept by bands of t as well.
"""

import csv
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from cascade import BETWEEN, enlarge, shrink
from data import strip, write_image
from magicvideo import MagicVideo

BANDS = 4  # t in [0, 250), [250, 500), [500, 750), [750, 1000)
COLUMNS = ("stage", "step", "loss", "learning_rate", "seconds", *(f"loss_band_{i}" for i in range(BANDS)), "waited")


def by_band(errors: Tensor, t: Tensor, steps: int) -> list[float | None]:
    """Mean of `errors` in each band of t, both of one shape, t in [0, steps); None for a band without any."""
    band = t * BANDS // steps
    return [float(errors[band == i].mean()) if (band == i).any() else None for i in range(BANDS)]


def mean_bands(parts: list[list[float | None]]) -> list[float | None]:
    """The bands of a batch's parts -> of the batch: the mean of those that have frames in a band."""
    seen = [[value for value in band if value is not None] for band in zip(*parts)]
    return [sum(band) / len(band) if band else None for band in seen]


def log(path: Path, stage: str, step: int, loss: float, rate: float, seconds: float,
        bands: list[float | None] = (), waited: float = 0) -> None:
    """Adds a line to log.csv; `seconds`, and those `waited` for data, count from the stage's start or resumption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        bands = ["" if value is None else f"{value:.6f}" for value in bands or [None] * BANDS]
        writer.writerow([stage, step, f"{loss:.6f}", f"{rate:.3e}", f"{seconds:.1f}", *bands, f"{waited:.2f}"])


def forget(path: Path, stage: str, step: int) -> None:
    """Drops what log.csv says of later than this step of this stage: a killed run does these steps again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        places = [line.split(",")[:2] for line in lines]
        last = max((i for i, place in enumerate(places) if place == [stage, str(step)]), default=len(lines) - 1)
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text("".join(lines[: last + 1]))
        unfinished.replace(path)


def curves(path: Path, picture: Path) -> bool:
    """Draws log.csv as a picture, a column for each stage: loss by band of t, and the learning rate.

    Returns whether it could: without matplotlib nothing is drawn.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    stages = list(dict.fromkeys(row["stage"] for row in rows))
    figure = Figure(figsize=(5 * len(stages), 6), layout="constrained")
    axes = figure.subplots(2, len(stages), squeeze=False, sharex="col", height_ratios=(3, 1))
    for (loss, rate), stage in zip(axes.T, stages):
        of_stage = [row for row in rows if row["stage"] == stage]
        names = {f"loss_band_{i}": f"t in band {i + 1} of {BANDS}" for i in range(BANDS)} | {"loss": "all"}
        for name, label in names.items():
            points = [(int(row["step"]), float(row[name])) for row in of_stage if row.get(name)]
            if points:
                loss.plot(*zip(*smoothed(points)), label=label, color="black" if name == "loss" else None)
        loss.set(title=f"stage {stage}", ylabel="loss", yscale="log")
        loss.legend()
        rate.plot([int(row["step"]) for row in of_stage], [float(row["learning_rate"]) for row in of_stage])
        rate.set(xlabel="step", ylabel="learning rate")
    unfinished = picture.with_name(f".{picture.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(picture)
    return True


def smoothed(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most 100 points, each the mean of as many neighbours: single steps are noisy."""
    width = -(-len(points) // 100)
    parts = (points[i : i + width] for i in range(0, len(points), width))
    return [tuple(sum(values) / len(part) for values in zip(*part)) for part in parts]


@torch.no_grad()
def picture(path: Path, model: MagicVideo, clips: torch.utils.data.Dataset, stage: str) -> None:
    """How far a stage is, one clip a row: clips above what the stage makes of them, or samples in ten steps.

    In stage upscale a row is a frame, small and enlarged, then as sampled, then as it is.
    """
    if stage in ("vae", "interpolate", "upscale"):
        some = [clips[i] for i in range(min(len(clips), 4))]
        videos, captions = torch.stack([clip["video"] for clip in some]).to(model.device), [c["caption"] for c in some]
    if stage in ("vae", "interpolate"):
        z = model.config.vae.scaling_factor * model.vae.encode(videos)[0]
        if stage == "interpolate":
            z = torch.cat([model.interpolate(pair[None], [caption], clip["fps"] / (BETWEEN + 1))
                           for pair, caption, clip in zip(z[:, [0, -1]], captions, some)])
        rows = torch.cat([videos, model.decode(z)])
    elif stage == "upscale":
        small = shrink(videos)
        rows = torch.cat([enlarge(small), model.upscale(small, captions), videos], dim=1)
    else:
        captions = list(dict.fromkeys(clips.captions))  # each once
        rows = model.sample(captions[:: max(1, len(captions) // 6)][:6], fps=8 if stage == "video" else None, steps=10)
    write_image(path, strip(rows.cpu()))


def commit() -> str | None:
    """The commit of this code, "-dirty" behind it if files have changed since; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
