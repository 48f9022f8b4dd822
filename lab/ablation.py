"""Test the paper's claims at small scale, by trainings that differ in one thing (ours).

    pictures    looks from pictures, motion from clips                       (paper §3, image start)
    objective   the paper's: noise predicted, frames equally noisy; or ours  (§3.2, tiny.py)
    masks       strict, literal, bidirectional                               (§3.2.2, unet3d.py)
    adaptors    with, without; and without anything that tells frames apart  (paper §3.2.1)
    branches    spatial and temporal; spatial alone; temporal alone          (ablation figure)
    start       stage image, then video; or stage video for as many steps    (paper §3)
    flicker     VideoVAE with and without its temporal layers                (paper, VideoVAE)

Every variant starts from the same new model with the VideoVAE of the shipped one; those of flicker
from --checkpoint, with new temporal layers in its VideoVAE. A part that is not trained stays at
its start, where it has no effect. Runs are those of train.py and are kept, and so is what was
measured of them: a command that was stopped goes on with the run that it was at, and several
commands with other --seeds or --variants can share the work.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

# before torch: sets how threads wait
from lab.results import check_ranges, mean_interval, report, run_command

import torch

import train
from clip_files import write_film_strip
from data import COLORS, MOTIONS, SHAPES, shape_captions
from diffusion import Diffusion
from lab import evaluate
from lab.judge import LABELS, balanced_prompts, count, judge
from magicvideo import MagicVideo
from runs import InputError, read_log
from sample import SHIPPED
from tiny import StaggeredDiffusion
from vae import VideoVAE

FOUR_COLORS = "red|green|blue|white"
UNSHARED = ("pictures", "flicker")  # claims with other data, or another stage


def literal(model: MagicVideo) -> None:
    """Mask as the paper writes it, after the softmax."""
    model.config.unet.mask = "literal"


def bidirectional(model: MagicVideo) -> None:
    """Let every frame see all others."""
    model.config.unet.mask = "bidirectional"


def equal_noise(model: MagicVideo) -> None:
    """Train and sample by the paper's objective and Stable Diffusion's schedule."""
    model.config.staggered = False


def equal_noise_v(model: MagicVideo) -> None:
    """Predict v, all frames equally noisy, on Stable Diffusion's schedule."""
    model.config.staggered, model.config.v_prediction = False, True


STAGGERED_EPS = {name: vars(Diffusion)[name] for name in ("__init__", "target", "predict_z0_eps")}


def no_spatial_effect(model: MagicVideo) -> None:
    """Take the effect of the spatial branch away, which must not be trained then."""
    for name, p in model.unet.named_parameters():
        if ".proj_out." in name:
            torch.nn.init.zeros_(p)


class Variant(NamedTuple):
    """How one training differs from the others of its claim."""

    alter: tuple[Callable[[MagicVideo], None], ...] = ()  # the new model
    alter_video: tuple[Callable[[MagicVideo], None], ...] = ()  # the model that stage image made
    has_image_stage: bool = True  # else stage video has its steps too
    video: tuple[str, ...] = ()  # flags of stage video
    objective: dict = {}  # what StaggeredDiffusion has otherwise
    moving: str = FOUR_COLORS  # of claim "pictures": what the clips show, any of these words


def frozen(names: str) -> tuple[str, str]:
    """Return the flags that train all weights but those whose names match."""
    return "--trainable", f"^(?!.*({names}))"


CLAIMS = {
    "pictures": {
        "stills in every 10th step": Variant(video=("--picture-every", "10")),
        "stills in every 4th step": Variant(video=("--picture-every", "4")),
        "no stills in stage video": Variant(video=("--picture-every", "0")),
        "no stills, text encoder frozen": Variant(
            video=("--picture-every", "0", *frozen("text_encoder"))),
        "every 10th step, text encoder frozen": Variant(video=frozen("text_encoder")),
        "no stills, new parts alone": Variant(
            video=("--picture-every", "0", "--trainable", "adaptor|temporal|fps")),
        "no stage image, every 10th step": Variant(
            has_image_stage=False, video=("--picture-every", "10")),
        "no stage image, every 10th step, muon-lr 0.006": Variant(
            has_image_stage=False, video=("--picture-every", "10", "--muon-lr", "0.006")),
        "no stage image, every 20th step, muon-lr 0.006": Variant(
            has_image_stage=False, video=("--picture-every", "20", "--muon-lr", "0.006")),
        "stage video alone": Variant(has_image_stage=False, video=("--picture-every", "0")),
        "two colors move": Variant(video=("--picture-every", "10"), moving="red|blue"),
        "two shapes move": Variant(video=("--picture-every", "10"), moving="circle|square"),
    },
    "objective": {
        "the paper's": Variant(alter=(equal_noise,)),
        "v, equally noisy": Variant(alter=(equal_noise_v,)),
        "v, equally noisy, until no signal is left": Variant(objective={"frame_lag": 0}),
        "noise, staggered": Variant(objective=STAGGERED_EPS),
        "v, staggered (tiny.py)": Variant(),
    },
    "masks": {
        "strict": Variant(), "literal": Variant(alter_video=(literal,)),
        "bidirectional": Variant(alter_video=(bidirectional,)),
        "strict, paper's objective": Variant(alter=(equal_noise,)),
        "literal, paper's objective": Variant(alter=(equal_noise,), alter_video=(literal,)),
        "bidirectional, paper's objective": Variant(alter=(equal_noise,),
                                                    alter_video=(bidirectional,)),
    },
    "adaptors": {
        "with": Variant(), "without": Variant(video=frozen("adaptor")),
        "without, nothing tells frames apart": Variant(
            alter=(equal_noise,), alter_video=(bidirectional,), video=frozen("adaptor")),
    },
    "branches": {
        "both": Variant(), "spatial alone": Variant(video=frozen("temporal")),
        "temporal alone": Variant(alter_video=(no_spatial_effect,),
                                  video=frozen(r"\.attentions\.")),
    },
    "start": {"stage image, then video": Variant(),
              "stage video alone": Variant(has_image_stage=False)},
    "flicker": {  # stage vae of the decoder alone: the latents stay
        "without temporal layers": Variant(
            video=("--trainable", "^(?!.*temporal)(decoder|post_quant)")),
        "with": Variant(video=("--trainable", "^(decoder|post_quant)")),
    },
}


def train_once(folder: Path, *flags) -> MagicVideo:
    """Train in `folder` with flags of train.py, or go on, or take what is there."""
    if not (folder / "done").exists():
        flags = [*map(str, flags), "--sample-every", str(10**9)]
        is_stopped = (folder / "checkpoint.pt").exists()
        train.main(["--out", str(folder), *(["--resume"] if is_stopped else flags)])
        (folder / "done").touch()
    return MagicVideo.load(folder)


def new_model(seed: int, variant: Variant) -> MagicVideo:
    """Build a model with the VideoVAE of the shipped one and all other weights new."""
    trained = MagicVideo.load(SHIPPED)
    torch.manual_seed(seed)
    model = MagicVideo(trained.config, trained.tokenizer)
    model.vae = trained.vae
    for alter in variant.alter:
        alter(model)
    return model


def run_folder(claim: str, name: str, seed: int, out: Path) -> Path:
    """Name the folder of a run, by the first of the claims' variants that are the same."""
    if claim not in UNSHARED:
        name = next(other for kind, variants in CLAIMS.items() for other in variants
                    if kind not in UNSHARED and variants[other] == CLAIMS[claim][name])
    return out / f"{name}-{seed}".replace(" ", "-")


def train_variant(variant: Variant, folder: Path, seed: int, data: list[str],
                  flags: argparse.Namespace) -> MagicVideo:
    """Train a variant by stages image and video; variants share what they have in common."""
    out = folder.parent
    start = Path(f"{folder}.pt")
    common = [*data, "--seed", seed, "--precision", flags.precision, "--cache", flags.cache]
    steps = flags.steps
    if variant.has_image_stage:
        moving = [variant.moving.replace("|", "-")] if variant.moving != FOUR_COLORS else []
        kind = "-".join(["image", *(alter.__name__ for alter in variant.alter),
                         *variant.objective, *moving, str(seed)])
        image_start = out / f"{kind}.pt"
        image_start.parent.mkdir(parents=True, exist_ok=True)
        if not image_start.exists():
            new_model(seed, variant).save(image_start)
        model = train_once(out / kind, "--stage", "image", "--init-from", image_start,
                           "--image-steps", flags.image_steps, *common)
    else:
        model = new_model(seed, variant)
        steps += flags.image_steps  # a step of stage image sees as many frames
    if not (folder / "done").exists():
        for alter in variant.alter_video:
            alter(model)
        model.save(start)
    return train_once(folder, "--stage", "video", "--init-from", start, "--video-steps", steps,
                      *variant.video, *common)


def train_decoder(variant: Variant, folder: Path, seed: int,
                  flags: argparse.Namespace) -> MagicVideo:
    """Train the decoder of --checkpoint on clips, with new temporal layers or without."""
    start = Path(f"{folder}.pt")
    start.parent.mkdir(parents=True, exist_ok=True)
    if not start.exists():
        model = MagicVideo.load(flags.checkpoint)
        torch.manual_seed(seed)
        new = VideoVAE(model.config.vae)
        model.vae.decoder.temporal_attentions = new.decoder.temporal_attentions
        model.save(start)
    held_out = ["--held-out", *flags.held_out] if flags.held_out else []
    return train_once(folder, "--stage", "vae", "--init-from", start, "--vae-steps", flags.steps,
                      "--seed", seed, "--precision", flags.precision, "--data", flags.data,
                      *held_out, *variant.video)


@torch.no_grad()
def measure_flicker(model: MagicVideo, flags: argparse.Namespace) -> dict[str, float]:
    """Measure how true decoded clips are, and how much flickers (paper: pixel dithering).

    Flicker is in steps of 255: the frame differences of posterior samples where the real clip
    stands still, and of sampled clips their second differences, in which motion counts little.
    """
    options = argparse.Namespace(data=flags.data, held_out=flags.held_out, clips=240, seed=0,
                                 fps=8.0, frame_store="runs/frames")
    measured = evaluate.reconstruction(model, options)["rows"]
    found = {f"PSNR of {row['name']}": row["PSNR"] for row in measured}
    generator = torch.Generator().manual_seed(0)
    squares = pixels = 0
    clips = evaluate.real_clips(model, options)
    for clip in clips:
        mean, logvar = model.vae.encode(clip["video"][None])
        eps = torch.randn(mean.shape, generator=generator)
        video = model.vae.decode(model.vae.sample_latents(mean, logvar, eps))[0]
        still = (clip["video"] == clip["video"][:1]).all(0)  # (3, h, w)
        differences = video.diff(dim=0)[:, still]
        squares, pixels = squares + differences.square().sum(), pixels + differences.numel()
    found["flicker of posterior samples"] = 127.5 * float((squares / pixels).sqrt())
    options = argparse.Namespace(steps=flags.sampling_steps, guidance=flags.guidance, seed=0)
    captions = balanced_prompts("test") * 3 if flags.data == "shapes" else [
        clip["caption"] for clip in clips[:: max(1, len(clips) // 72)]]
    videos = evaluate.sample_prompts(model, captions, options, 8.0)
    second = videos.diff(dim=1).diff(dim=1)
    found["flicker of sampled clips"] = 127.5 * float(second.square().mean().sqrt())
    return found


def judge_captions(model: MagicVideo, captions: list[str], folder: Path, name: str,
                   flags: argparse.Namespace) -> dict:
    """Sample a clip of each caption, and count which words are right."""
    options = argparse.Namespace(steps=flags.sampling_steps, guidance=flags.guidance, seed=0)
    videos = evaluate.sample_prompts(model, captions, options, 8.0)
    write_film_strip(folder / f"{name}.png", videos[:24])
    return count(captions, [judge(video) for video in videos])


def measure(claim: str, name: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Measure a variant, or take what is kept beside its run."""
    kept = run_folder(claim, name, seed, out) / f"{flags.sampling_steps}-{flags.guidance}.json"
    if not kept.exists():
        found = measure_anew(claim, name, seed, out, flags)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found))
    return json.loads(kept.read_text())


def measure_anew(claim: str, name: str, seed: int, out: Path, flags: argparse.Namespace) -> dict:
    """Train a variant, or take its run; count for each group of captions which words are right."""
    variant = CLAIMS[claim][name]
    folder = run_folder(claim, name, seed, out)
    if claim == "flicker":
        return measure_flicker(train_decoder(variant, folder, seed, flags), flags)
    if claim != "pictures":
        model = train_variant(variant, folder, seed, [], flags)
        loss = float(read_log(folder / "log.csv")[-1]["held_out_loss"])
        prompts = balanced_prompts("test") * 3
        return {"held-out captions": judge_captions(model, prompts, folder, "held-out", flags),
                "held-out loss": loss}
    captions = {"what clips showed": [], "what only pictures showed": []}
    for words in product(COLORS, SHAPES, MOTIONS):
        caption = "a {} {} {}".format(*words)
        is_moving = re.search(variant.moving, caption)
        group = "what clips showed" if is_moving else "what only pictures showed"
        captions[group].append(caption)
    out.mkdir(parents=True, exist_ok=True)
    held_out = [*captions["what only pictures showed"],
                *(c for c in shape_captions("test") if re.search(variant.moving, c))]
    names = out / f"held_out-{variant.moving.replace('|', '-')}.txt"
    names.write_text("\n".join(held_out))
    data = ["--images", "shapes", "--data", "shapes", "--held-out", names]
    model = train_variant(variant, folder, seed, data, flags)
    return {group: judge_captions(model, prompts, folder, group.replace(" ", "-"), flags)
            for group, prompts in captions.items()}


def tables(measured: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """Make a table for each group of captions: means over the seeds, in %, with 95 % intervals.

    The last column is the difference to the first variant, paired by seed: of "all three", where
    words are counted.
    """
    made = defaultdict(list)
    first = next(iter(measured.values()))
    for group in first[0]:
        is_counted = isinstance(first[0][group], dict)
        digits = 0 if is_counted else 4
        base = None
        for name, of_seeds in measured.items():
            row = {group: name}
            values = [found[group] for found in of_seeds]
            if is_counted:
                percent = {key: [100 * counts[key][0] / counts[key][1] for counts in values]
                           for key in LABELS}
                row |= {key: describe_mean(percent[key]) for key in LABELS}
                values = percent["all three"]
            else:
                row["mean"] = describe_mean(values, digits)
            base = base or values
            row["by seed"] = " ".join(f"{value:.{digits}f}" for value in values)
            row["to the first"] = describe_mean([a - b for a, b in zip(values, base)], digits)
            made[group].append(row)
    return made


def describe_mean(values: list[float], digits: int = 0) -> str:
    """Write a mean with its 95 % interval, where there are values enough for one."""
    mean, low, high = mean_interval(values)
    return f"{mean:.{digits}f}" + (f" [{low:.{digits}f}, {high:.{digits}f}]" if high > low else "")


def main(arguments: list[str] | None = None) -> None:
    """Measure variants of a claim with several seeds, and print their counts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("claim", choices=CLAIMS)
    parser.add_argument("--variants", nargs="+", help="some of the claim's (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--image-steps", type=int, default=100, help="of stage image (100)")
    parser.add_argument("--steps", type=int, default=900, help="of the stage that differs (900)")
    parser.add_argument("--sampling-steps", type=int, default=20, help="of sampling (20)")
    parser.add_argument("--guidance", type=float, help="weight of the text (the model's)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32",
                        help="of training: fp32 or bf16 (fp32)")
    parser.add_argument("--cache", type=int, default=7200,
                        help="cuts of clips that are trained on (7200)")
    parser.add_argument("--checkpoint", default=str(SHIPPED), help="of flicker: whose decoder "
                        "is trained on (the shipped shapes)")
    parser.add_argument("--data", default="shapes", help="of flicker: a folder of clips (shapes)")
    parser.add_argument("--held-out", nargs=1, default=[], metavar="FILE",
                        help="of flicker: names the clips of --data that are held out")
    parser.add_argument("--out", default="runs/ablation", help="folder of the runs (runs/ablation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, image_steps=(1, 10**9), steps=(1, 10**9), sampling_steps=(1, 1000),
                 cache=(1, 10**9))
    is_own = (flags.data, flags.checkpoint) != ("shapes", str(SHIPPED))
    if is_own and flags.claim != "flicker":
        raise InputError(f"--data, --checkpoint: are for flicker; {flags.claim} takes the shapes")
    variants = flags.variants or [*CLAIMS[flags.claim]]
    for name in variants:
        if name not in CLAIMS[flags.claim]:
            known = ", ".join(f'"{variant}"' for variant in CLAIMS[flags.claim])
            raise InputError(f'--variants "{name}": use some of {known}')
    kind = "pictures-" if flags.claim == "pictures" else ""
    if is_own:
        kind = re.sub(r"\W+", "-", f"{flags.data}-{flags.checkpoint}-")
    bf16 = "-bf16" if flags.precision == "bf16" else ""
    cuts = f"-{flags.cache}" if flags.cache != parser.get_default("cache") else ""
    # runs of another length, precision or number of cuts are others
    out = Path(flags.out) / f"{kind}{flags.image_steps}-{flags.steps}{bf16}{cuts}"
    measured = {}
    for name in variants:
        with ExitStack() as changes:
            for key, value in CLAIMS[flags.claim][name].objective.items():
                changes.enter_context(mock.patch.object(StaggeredDiffusion, key, value))
            measured[name] = [measure(flags.claim, name, seed, out, flags) for seed in flags.seeds]
    numbers = out / f"{flags.claim}-{'-'.join(map(str, flags.seeds))}.json"
    report(numbers, flags, {**tables(measured), "measured": measured})


if __name__ == "__main__":
    run_command("lab.ablation", main)
