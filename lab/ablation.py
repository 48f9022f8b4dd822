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
from lab.results import check_ranges, run_command, write_results
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
        flags = [*map(str, flags), "--sample-every", "0"]
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


def measure_unet(variant: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Train a U-Net and sample held-out captions: its error, and how much is right."""
    start = out / f"start-{seed}.pt"
    fresh_model(seed).save(start)
    common = ("--seed", seed, "--cache", flags.cache, "--init-from")
    steps = flags.image_steps + flags.video_steps  # a step of stage image sees as many frames
    if variant != "from scratch":
        image = train_once(out / f"image-{seed}", "", "--stage", "image", "--image-steps",
                           flags.image_steps, *common, start)
        alter(MagicVideo.load(image), variant).save(start)
        steps = flags.video_steps
    folder = out / f"{variant} {seed}".replace(" ", "-")
    path = train_once(folder, variant, "--stage", "video", "--video-steps", steps, *common, start)
    evaluate.main(["--checkpoint", path, "--split", "test", "--seeds", "1", "--steps", "25",
                   "--out", str(folder)])
    row = json.loads((folder / "results.json").read_text())["rows"][0]
    return {"held-out error": held_out_error(MagicVideo.load(path)),
            **{label: row[key]["rate"] for key, label in LABELS.items()}}


def measure_vae(variant: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Train a VideoVAE: PSNR in dB of held-out clips and of their frame differences."""
    folder = out / f"{variant} {seed}".replace(" ", "-")
    path = train_once(folder, variant, "--stage", "vae", "--seed", seed, "--vae-steps",
                      flags.vae_steps)
    evaluate.main(["--checkpoint", path, "--reconstruction", "--out", str(folder)])
    psnr = json.loads((folder / "results.json").read_text())["psnr"]
    return {name: psnr[f"{name}, with temporal layers"] for name in ("clips", "differences")}


def main(arguments: list[str] | None = None) -> None:
    """Measure all variants of a claim with all seeds; print means and ranges."""
    parser = argparse.ArgumentParser(description="Tests a claim of the paper at small scale, by "
                                     "short trainings that differ in one thing.")
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every variant (3)")
    parser.add_argument("--vae-steps", type=int, default=800, help="of flicker (800)")
    parser.add_argument("--image-steps", type=int, default=150, help="of the others (150)")
    parser.add_argument("--video-steps", type=int, default=150, help="after these (150)")
    parser.add_argument("--cache", type=int, default=400, help="as of train.py (400)")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (%(default)s)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, seeds=(1, 1000), vae_steps=(1, 1e9), image_steps=(1, 1e9),
                 video_steps=(1, 1e9), cache=(1, 1e9))
    measure = measure_vae if flags.claim == "flicker" else measure_unet
    steps = (flags.vae_steps, flags.image_steps, flags.video_steps, flags.cache)
    out = Path(flags.out) / "-".join(map(str, steps))  # runs of other lengths are others
    found = {variant: [measure(variant, seed, out, flags) for seed in range(flags.seeds)]
             for variant in CLAIMS[flags.claim]}
    print(f"{flags.claim}: mean [least, most] of {flags.seeds} seeds")
    for variant, rows in found.items():
        print(f"  {variant}")
        for name in rows[0]:
            values = [row[name] for row in rows]
            mean = sum(values) / len(values)
            print(f"    {name:28}{mean:8.3f} [{min(values):.3f}, {max(values):.3f}]")
    write_results(out / f"{flags.claim}.json", flags, {"variants": found})


if __name__ == "__main__":
    run_command(main)
