"""Test the paper's claims at small scale, by short trainings that differ in one thing (ours).

    start       stage image, then video; or stage video for as many steps    (paper §3)
    adaptors    with and without                                             (paper §3.2.1)
    branches    spatial and temporal; spatial alone; temporal alone          (ablation figure)
    masks       strict, literal, bidirectional                               (§3.2.2, unet3d.py)
    flicker     VideoVAE with and without its temporal layers                (paper, VideoVAE)

A part that is not trained stays at its start, where it has no effect. Runs are those of train.py
and are kept: a command that was stopped goes on with the run that it was at.
"""

import argparse
import csv
from pathlib import Path

from lab.results import check_ranges, report, run_command  # before torch: sets how threads wait

import torch

import train
from lab import evaluate
from lab.judge import LABELS
from magicvideo import MagicVideo
from sample import SHIPPED

CLAIMS = {
    "start": ("all parts", "from scratch"),
    "adaptors": ("all parts", "without adaptors"),
    "branches": ("all parts", "spatial alone", "temporal alone"),
    "masks": ("all parts", "literal", "bidirectional"),
    "flicker": ("temporal layers", "without temporal layers"),
}
UNTRAINED = {"without adaptors": "adaptor", "spatial alone": "temporal",
             "temporal alone": r"\.attentions\.", "without temporal layers": "temporal"}


def train_once(folder: Path, variant: str, *flags) -> MagicVideo:
    """Train a variant in `folder` with flags of train.py, or go on, or take what is there."""
    if not (folder / "done").exists():
        flags = [*map(str, flags), "--cache", "400", "--sample-every", str(10**9)]
        if variant in UNTRAINED:
            flags += ["--trainable", f"^(?!.*{UNTRAINED[variant]})"]
        is_stopped = (folder / "checkpoint.pt").exists()
        train.main(["--out", str(folder), *(["--resume"] if is_stopped else flags)])
        (folder / "done").touch()
    return MagicVideo.load(folder)


def fresh_model(seed: int) -> MagicVideo:
    """Build a model with the VideoVAE of the shipped one and all other weights new."""
    trained = MagicVideo.load(SHIPPED)
    torch.manual_seed(seed)
    model = MagicVideo(trained.config, trained.tokenizer)
    model.vae = trained.vae
    return model


def alter(model: MagicVideo, variant: str) -> MagicVideo:
    """Give a model another mask, or take its spatial branch's effect away (ablation figure)."""
    if variant in ("literal", "bidirectional"):
        model.config.unet.mask = variant  # in effect when the model is loaded again
    for name, p in model.unet.named_parameters():
        if variant == "temporal alone" and ".proj_out." in name:
            torch.nn.init.zeros_(p)
    return model


def measure(variant: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Train a variant and measure it on held-out captions."""
    folder = out / f"{variant} {seed}".replace(" ", "-")
    options = argparse.Namespace(split="test", seeds=1, clips=240, seed=0, steps=25, guidance=None,
                                 fps=8.0, data="shapes", out=folder)
    if flags.claim == "flicker":
        model = train_once(folder, variant, "--stage", "vae", "--seed", seed, "--vae-steps",
                           flags.steps)
        return {row["name"]: row["PSNR"] for row in evaluate.reconstruction(model, options)["rows"]}

    start = out / f"start-{seed}.pt"
    fresh_model(seed).save(start)
    steps = flags.image_steps + flags.steps  # a step of stage image sees as many frames
    if variant != "from scratch":
        image = train_once(out / f"image-{seed}", "", "--stage", "image", "--init-from", start,
                           "--image-steps", flags.image_steps, "--seed", seed)
        alter(image, variant).save(start)
        steps = flags.steps
    model = train_once(folder, variant, "--stage", "video", "--init-from", start, "--video-steps",
                       steps, "--seed", seed)
    counts = evaluate.prompt_accuracy(model, options)["counts"]["held-out captions"]
    with open(folder / "log.csv", newline="") as file:
        *_, last = csv.DictReader(file)
    return {"held-out loss": float(last["held_out_loss"]),
            **{label: counts[key][0] / counts[key][1] for key, label in LABELS.items()}}


def main(arguments: list[str] | None = None) -> None:
    """Measure all variants of a claim with all seeds, and print their means."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant (3)")
    parser.add_argument("--image-steps", type=int, default=150, help="of stage image (150)")
    parser.add_argument("--steps", type=int, default=150, help="of the stage that differs (150)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, seeds=(1, 1000), image_steps=(1, 10**9), steps=(1, 10**9))
    out = Path(flags.out) / f"{flags.image_steps}-{flags.steps}"  # other lengths are other runs
    rows = []
    for variant in CLAIMS[flags.claim]:
        measured = [measure(variant, seed, out, flags) for seed in range(flags.seeds)]
        means = {name: sum(m[name] for m in measured) / len(measured) for name in measured[0]}
        for seed, found in [*enumerate(measured), ("mean", means)]:
            rows.append({flags.claim: variant, "seed": seed, **found})
    report(out / f"{flags.claim}.json", flags, {"rows": rows})


if __name__ == "__main__":
    run_command("lab.ablation", main)
