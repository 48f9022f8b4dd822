"""The paper's claims at home: short trainings on the shapes that differ in one thing each (ours).

    start       the image stage first, or from scratch for as long      (paper §3: "image start")
    adaptors    with and without                                        (paper §3.2.1)
    branches    spatial and temporal, spatial alone, temporal alone     (paper, ablation figure)
    masks       strict, literal, bidirectional                          (paper §3.2.2, and see unet3d.py)
    flicker     VideoVAE with and without its temporal layers           (paper, VideoVAE)

Every arm is a run of train.py and one of evaluate.py, as anyone could type them. A part that is frozen at its start,
where it has no effect, is a part left out. Arms are kept: what is there is not run again, so that a stop costs one arm.
"""

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import torch

from batches import encode
from data import InputError, ShapesDataset
from magicvideo import MagicVideo
from unet3d import DirectedTemporalAttention, SpatialTransformer

CLAIMS = {
    "start": ("whole", "from scratch"),
    "adaptors": ("whole", "without adaptors"),
    "branches": ("whole", "spatial alone", "temporal alone"),
    "masks": ("whole", "literal", "bidirectional"),
    "flicker": ("temporal layers", "without temporal layers"),
}
FREEZE = {"without adaptors": "adaptor", "spatial alone": "temporal", "temporal alone": ".attentions."}
WORDS = ("color", "shape", "motion", "all three")
HERE = Path(__file__).parent


def run(*command) -> None:
    """A script beside this one; raises InputError where it ends with an error, which it has named itself."""
    print("python", *command, flush=True)
    if subprocess.run([sys.executable, HERE / command[0], *map(str, command[1:])]).returncode:
        raise InputError(f"{command[0]} ended with an error, above; the arms before it are kept")


def train(folder: Path, *flags) -> Path:
    """The model of a run in `folder`, trained unless it is there; a run that was stopped goes on."""
    if not (folder / "done").exists():
        stopped = (folder / "checkpoint.pt").exists()
        run("train.py", "--out", folder, *(["--resume"] if stopped else [*flags, "--sample-every", 0]))
        (folder / "done").touch()
    return folder / "model.pt"


def seconds(folder: Path) -> float:
    """How long the run in `folder` trained."""
    with open(folder / "log.csv", newline="") as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])


def start_of(arm: str, model_path: Path, path: Path) -> Path:
    """What an arm starts from: `model_path`'s model, its mask another or one branch mute (paper, ablation figure)."""
    model = MagicVideo.load(model_path)
    for module in model.unet.modules():
        if isinstance(module, DirectedTemporalAttention) and arm in ("literal", "bidirectional"):
            module.mask = model.config.unet.mask = arm
        if isinstance(module, SpatialTransformer) and arm == "temporal alone":
            torch.nn.init.zeros_(module.proj_out.weight)
            torch.nn.init.zeros_(module.proj_out.bias)
    model.save(path)
    return path


def fresh(vae_path: Path, path: Path, seed: int) -> Path:
    """A model whose VideoVAE is trained and whose other weights are those of `seed`."""
    trained = MagicVideo.load(vae_path)
    torch.manual_seed(seed)
    contents = MagicVideo(trained.config, trained.tokenizer).contents()
    contents["weights"].update({f"vae.{name}": weight for name, weight in trained.vae.state_dict().items()})
    MagicVideo.from_contents(contents, vae_path).save(path)
    return path


@torch.no_grad()
def held_out_error(path: Path, clips: int = 120) -> float:
    """The training loss of a model on clips of held-out captions, with the same noise for every model."""
    model, generator = MagicVideo.load(path), torch.Generator().manual_seed(0)
    dataset, errors, steps = ShapesDataset("test", model.config.unet.frames, model.config.size, 1, length=clips), [], []
    for i in range(0, clips, 24):
        batch = [encode(model, dataset[k]) for k in range(i, min(i + 24, clips))]
        z0 = model.config.vae.scaling_factor * torch.stack([item["mean"] for item in batch])  # (b, f, 4, h/8, w/8)
        context, fps = model.encode_text([b["caption"] for b in batch]), torch.tensor([b["fps"] for b in batch])
        for _ in range(4):
            error, t = model.diffusion.errors(model.unet, z0, context, fps, generator)  # (b, f) each
            errors.append(error)
            steps.append(t)
    return float(torch.cat(errors)[torch.cat(steps) >= 0].mean())


def follows(arm: str, seed: int, flags: argparse.Namespace) -> dict:
    """Trains an arm with a seed and asks it for held-out captions: rates of the words, steps and seconds."""
    out, image = Path(flags.out), Path(flags.out) / f"image-{seed}"
    folder, steps, time = out / f"{arm.replace(' ', '-')}-{seed}", flags.video_steps, 0.0
    start = fresh(train(out / "vae", "--stage", "vae"), out / f"fresh-{seed}.pt", seed)
    if arm == "from scratch":
        whole = follows("whole", seed, flags)  # for as long as this one's two stages
        steps = round(steps * whole["seconds"] / seconds(out / f"whole-{seed}"))
    else:
        start = train(image, "--stage", "image", "--init-from", start, "--seed", seed,
                      "--image-steps", flags.image_steps, "--cache", flags.cache)
        start, time = start_of(arm, start, out / f"start-{arm.replace(' ', '-')}-{seed}.pt"), seconds(image)
    model = train(folder, "--stage", "video", "--init-from", start, "--seed", seed, "--video-steps", steps,
                  "--cache", flags.cache, *(["--freeze", FREEZE[arm]] if arm in FREEZE else []))
    if not (folder / "results.json").exists():
        run("evaluate.py", "--checkpoint", model, "--split", "test", "--seeds", 1, "--steps", 25, "--out", folder)
    held_out = json.loads((folder / "results.json").read_text())["rows"][0]
    return {**{word: held_out[word]["rate"] for word in WORDS}, "error": held_out_error(model), "video steps": steps,
            "seconds": time + seconds(folder)}


def flickers(arm: str, seed: int, flags: argparse.Namespace) -> dict:
    """Trains a VideoVAE with a seed: PSNR of its clips and of their frame-to-frame differences."""
    folder = Path(flags.out) / f"vae-{arm.replace(' ', '-')}-{seed}"
    frozen = ["--freeze", "temporal"] if arm == "without temporal layers" else []
    model = train(folder, "--stage", "vae", "--seed", seed, *frozen)
    if not (folder / "results.json").exists():
        run("evaluate.py", "--checkpoint", model, "--reconstruction", "--out", folder)
    row = json.loads((folder / "results.json").read_text())["reconstruction"][0]
    return {"PSNR": row["psnr"], "of differences": row["flicker_psnr"], "seconds": seconds(folder)}


def main(arguments: list[str] | None = None) -> None:
    """A claim's arms, all seeds; prints a table of means and ranges, writes it to OUT/CLAIM.json."""
    parser = argparse.ArgumentParser(description="The paper's claims at home, each a set of short trainings.")
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--seeds", type=int, default=3, help="runs of every arm")
    parser.add_argument("--image-steps", type=int, default=150, help="of the image stage that arms start from")
    parser.add_argument("--video-steps", type=int, default=150, help="of every arm")
    parser.add_argument("--cache", type=int, default=400, help="clips encoded once, as in train.py")
    parser.add_argument("--out", default="runs/ablation", help="folder of all runs; what is in it is not run again")
    flags = parser.parse_args(arguments)
    if flags.seeds < 1:
        raise InputError(f"--seeds {flags.seeds}: choose 1 or more")
    measure = flickers if flags.claim == "flicker" else follows
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    arms = {arm: [measure(arm, seed, flags) for seed in range(flags.seeds)] for arm in CLAIMS[flags.claim]}
    for arm, of_seeds in arms.items():
        print(arm)
        for name in of_seeds[0]:
            values = [row[name] for row in of_seeds]
            print(f"    {name:16}{sum(values) / len(values):9.3g}   [{min(values):.3g}, {max(values):.3g}]")
    path = Path(flags.out) / f"{flags.claim}.json"
    path.write_text(json.dumps({"settings": vars(flags), "arms": arms}, indent=1))
    print(f"mean [least, most] of {flags.seeds} seeds; numbers: {path}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, OSError) as error:
        print(f"ablation.py: {error}", file=sys.stderr)
        sys.exit(2)
