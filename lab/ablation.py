"""Test the paper's claims at small scale: short trainings that differ in one thing (ours).

    start       stage image, then video; or stage video for as many steps    (paper §3)
    adaptors    with and without                                             (paper §3.2.1)
    branches    spatial and temporal; spatial alone; temporal alone          (ablation figure)
    masks       strict, literal, bidirectional                               (§3.2.2, unet3d.py)
    flicker     VideoVAE with and without its temporal layers                (paper, VideoVAE)

Every variant is a run of train.py and one of lab.evaluate. A part that is not trained stays at its
start, where it has no effect. Runs are kept: a stopped command goes on with the run that it was at.
"""

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

import torch

import train
from data import ShapesDataset
from lab import evaluate
from lab.judge import LABELS
from lab.results import check_ranges, print_table, run_command, write_results
from magicvideo import MagicVideo
from sample import SHIPPED
from unet3d import SpatialTransformer

CLAIMS = {
    "start": ("all parts", "from scratch"),
    "adaptors": ("all parts", "without adaptors"),
    "branches": ("all parts", "spatial alone", "temporal alone"),
    "masks": ("all parts", "literal", "bidirectional"),
    "flicker": ("temporal layers", "without temporal layers"),
}
UNTRAINED = {"without adaptors": "adaptor", "spatial alone": "temporal",
             "temporal alone": r"\.attentions\.", "without temporal layers": "temporal"}


def train_once(folder: Path, variant: str, *flags) -> str:
    """Train a variant in `folder` with flags of train.py, or go on, or take what is there."""
    if not (folder / "done").exists():
        flags = [*map(str, flags), "--cache", "400", "--sample-every", "0"]
        if variant in UNTRAINED:
            flags += ["--trainable", f"^(?!.*{UNTRAINED[variant]})"]
        is_stopped = (folder / "checkpoint.pt").exists()
        train.main(["--out", str(folder), *(["--resume"] if is_stopped else flags)])
        (folder / "done").touch()
    return str(folder / "model.pt")


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
    for module in model.unet.modules():
        if isinstance(module, SpatialTransformer) and variant == "temporal alone":
            torch.nn.init.zeros_(module.proj_out.weight)
            torch.nn.init.zeros_(module.proj_out.bias)
    return model


@torch.no_grad()
def held_out_error(model: MagicVideo) -> float:
    """Compute the diffusion loss for held-out captions, with the same noise for every model."""
    clips = ShapesDataset("test", model.config.unet.frames, model.config.size, seed=1)
    generator = torch.Generator().manual_seed(0)
    errors = []
    for i in range(0, 480, 24):
        items = [clips[k] for k in range(i, i + 24)]
        z0 = model.encode(torch.stack([item["video"] for item in items]))
        context = model.encode_text([item["caption"] for item in items])
        fps = torch.tensor([item["fps"] for item in items])
        errors.append(model.diffusion.loss(model.unet, z0, context, fps, generator=generator))
    return float(torch.cat(errors).mean())


def measure(variant: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Train a variant and measure it on held-out captions."""
    folder = out / f"{variant} {seed}".replace(" ", "-")
    if flags.claim == "flicker":
        path = train_once(folder, variant, "--stage", "vae", "--seed", seed, "--vae-steps",
                          flags.steps)
        evaluate.main(["--checkpoint", path, "--reconstruction", "--out", str(folder)])
        rows = json.loads((folder / "results.json").read_text())["rows"]
        return {row["name"]: row["PSNR"] for row in rows}

    start = out / f"start-{seed}.pt"
    fresh_model(seed).save(start)
    steps = flags.image_steps + flags.steps  # a step of stage image sees as many frames
    if variant != "from scratch":
        image = train_once(out / f"image-{seed}", "", "--stage", "image", "--init-from", start,
                           "--image-steps", flags.image_steps, "--seed", seed)
        alter(MagicVideo.load(image), variant).save(start)
        steps = flags.steps
    path = train_once(folder, variant, "--stage", "video", "--init-from", start, "--video-steps",
                      steps, "--seed", seed)
    evaluate.main(["--checkpoint", path, "--split", "test", "--seeds", "1", "--steps", "25",
                   "--out", str(folder)])
    counts = json.loads((folder / "results.json").read_text())["counts"][0]
    return {"held-out error": held_out_error(MagicVideo.load(path)),
            **{label: counts[key]["rate"] for key, label in LABELS.items()}}


def main(arguments: list[str] | None = None) -> None:
    """Measure all variants of a claim with all seeds; print means and ranges."""
    parser = argparse.ArgumentParser(description="Tests a claim of the paper at small scale, by "
                                     "short trainings that differ in one thing.")
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant (3)")
    parser.add_argument("--image-steps", type=int, default=150, help="of stage image (150)")
    parser.add_argument("--steps", type=int, default=150, help="of the stage that differs (150)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, seeds=(1, 1000), image_steps=(1, 1e9), steps=(1, 1e9))
    out = Path(flags.out) / f"{flags.image_steps}-{flags.steps}"  # other lengths are other runs
    found = {variant: [measure(variant, seed, out, flags) for seed in range(flags.seeds)]
             for variant in CLAIMS[flags.claim]}
    rows = []
    for variant, measured in found.items():
        for name in measured[0]:
            values = [of_seed[name] for of_seed in measured]
            rows.append({flags.claim: variant, "": name, "mean": sum(values) / len(values),
                         "least": min(values), "most": max(values)})
    print_table(rows)
    write_results(out / f"{flags.claim}.json", flags, {"rows": rows, "variants": found})


if __name__ == "__main__":
    run_command(main)
