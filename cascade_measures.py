"""How good is what follows the key frames? Against true frames of clips that were never trained on (all ours).

`python evaluate.py --interpolation` and `--upscaling`. Each stands beside what needs no network: a cross-fade and the
nearest key frame; bicubic enlargement.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cascade import BETWEEN, FACTOR, enlarge, shrink
from data import ShapesDataset, strip, write_image
from judge import TRENDS, count, decibels, judge, look, prompts_of, table
from magicvideo import MagicVideo

EVEN = 0.35  # how far a step may be from the mean of all, in parts of it


@torch.no_grad()
def interpolation(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """Frames between true key frames against the true ones; how even motion is; whether prompts are obeyed as before.

    True clips have held-out captions and four times --fps, every fourth frame is a key.
    """
    rate, length = BETWEEN + 1, (BETWEEN + 1) * (model.config.unet.frames - 1) + 1
    dataset = ShapesDataset("test", length, model.config.size, flags.seed, rate * flags.fps, flags.clips, BETWEEN)
    errors, even, pictures = [], [], []
    for i in tqdm(range(len(dataset)), desc="true key frames", unit="clip"):
        clip = dataset[i]
        true = clip["video"].to(model.device)
        keys = model.config.vae.scaling_factor * model.vae.encode(true[None, ::rate])[0]
        found = model.decode(model.interpolate(keys, [clip["caption"]], clip["fps"] / rate, seed=flags.seed + i))[0]
        part = (torch.arange(length, device=model.device) % rate / rate).view(-1, 1, 1, 1)
        before = true[::rate].repeat_interleave(rate, 0)[:length]
        after = torch.cat([true[rate::rate].repeat_interleave(rate, 0), true[-1:]])
        arms = {"interpolated": found, "cross-fade": before.lerp(after, part),
                "nearest": torch.where(part < 0.5, before, after), "decoded, all true": decoded(model, true)}
        new = torch.arange(length) % rate > 0
        errors.append({name: (frames - true)[new].square().mean() for name, frames in arms.items()})
        even.append(one_way_and_even(found.cpu(), clip["caption"]))
        if i < 4:
            pictures += [true[: 2 * rate + 1], found[: 2 * rate + 1], arms["cross-fade"][: 2 * rate + 1]]
    write_image(out / "interpolation.png", strip(torch.stack(pictures).cpu()))
    psnr = {name: decibels(torch.stack([error[name] for error in errors]).mean()) for name in errors[0]}
    for name, value in psnr.items():
        print(f"{name:20} {len(errors)} clips: PSNR of the frames between {value:.2f} dB")

    prompts, verdicts, of_samples = prompts_of("test") * flags.seeds, {"key frames": [], "interpolated": []}, []
    for i in tqdm(range(0, len(prompts), flags.batch_size), desc="sampled key frames", unit="batch"):
        batch = prompts[i : i + flags.batch_size]
        keys = model.sample_latents(batch, flags.fps, flags.steps, flags.guidance, flags.sampler, flags.seed + i)
        clips = model.decode(model.interpolate(keys, batch, flags.fps, seed=flags.seed + i)).cpu()
        verdicts["key frames"] += [judge(clip, flags.fps) for clip in model.decode(keys).cpu()]
        verdicts["interpolated"] += [judge(clip, flags.fps) for clip in clips]
        of_samples += [one_way_and_even(clip, prompt) for clip, prompt in zip(clips, batch)]
    rows = [count(name, prompts, said) for name, said in verdicts.items()]
    print(table(rows))
    found = {"psnr": psnr, "clips": len(errors), "rows": rows}
    for name, those in (("true key frames", even), ("sampled key frames", of_samples)):
        moving = [x for x in those if x is not None]
        found[name] = {"moving": len(moving), "monotonic": sum(x[0] for x in moving), "even": sum(x[1] for x in moving)}
        print(f"{name}: of {len(moving)} clips of moving objects {found[name]['monotonic']} go one way all the time, "
              f"{found[name]['even']} with steps within {EVEN:.0%} of their mean")
    return found


def decoded(model: MagicVideo, true: Tensor) -> Tensor:
    """A clip (f, 3, h, w) through the VideoVAE: the best that latents can show."""
    return model.decode(model.config.vae.scaling_factor * model.vae.encode(true[None])[0])[0]


def one_way_and_even(video: Tensor, caption: str) -> tuple[bool, bool] | None:
    """Whether a moving object goes one way in every step, and whether all steps are within EVEN of their mean.

    None for captions of growing and shrinking, (False, False) where nothing is seen.
    """
    motion = caption.split(" ", 3)[3]
    if "moving" not in motion:
        return None
    seen = look(video)
    if seen is None or len(seen[2]) < len(video):
        return False, False
    coverage, way = seen[1], next(i for i, words in enumerate(TRENDS) if motion in words)
    profile = coverage.sum(1 if way == 0 else 2)  # (f, n)
    places = profile @ torch.arange(float(profile.shape[1])) / profile.sum(1)  # (f,)
    moved = places.diff() * (1 if motion == TRENDS[way][1] else -1)
    return bool((moved > 0).all()), bool(((moved / moved.mean() - 1).abs() <= EVEN).all() and moved.mean() > 0)


@torch.no_grad()
def upscaling(model: MagicVideo, flags: argparse.Namespace, out: Path) -> dict:
    """Frames four times the size against the true ones: made of true small frames, and of what the VideoVAE decodes."""
    dataset = ShapesDataset("test", 2, FACTOR * model.config.size, flags.seed, flags.fps, flags.clips)
    errors, edges, pictures = [], [], []
    for i in tqdm(range(len(dataset)), desc="upscale", unit="clip"):
        clip = dataset[i]
        true = clip["video"][:1].to(model.device)
        small = shrink(true[None])[0]
        seen = decoded(model, small)

        def larger(frames: Tensor, **settings) -> Tensor:
            return model.upscale(frames[None], [clip["caption"]], flags.upscale_steps, flags.seed + i, **settings)[0]

        arms = {"upscaled": larger(small), "bicubic": enlarge(small[None])[0].clamp(-1, 1),
                "in tiles": larger(small, tile=true.shape[-1] // 2),
                "decoded, upscaled": larger(seen), "decoded, bicubic": enlarge(seen[None])[0].clamp(-1, 1)}
        errors.append({name: (frames - true).square().mean() for name, frames in arms.items()})
        edges.append({name: steepness(frames) / steepness(true) for name, frames in arms.items()})
        if i < 4:
            pictures.append(torch.cat([arms["bicubic"], arms["upscaled"], arms["in tiles"], true,
                                       arms["decoded, bicubic"], arms["decoded, upscaled"]]))
    write_image(out / "upscaling.png", strip(torch.stack(pictures).cpu()))
    rows = [{"name": name, "frames": len(errors), "psnr": decibels(torch.stack([e[name] for e in errors]).mean()),
             "edges": float(torch.tensor([e[name] for e in edges]).mean())} for name in errors[0]]
    for row in rows:
        print(f"{row['name']:20} {row['frames']} frames: PSNR {row['psnr']:.2f} dB, "
              f"edges {row['edges']:.0%} as steep as the true ones")
    return {"upscaling": rows}


def steepness(frames: Tensor) -> float:
    """How steep the steepest 1 % of the steps between neighbouring pixels are, on average."""
    rises = frames.diff(dim=-1).abs().amax(-3).flatten()
    return float(rises.topk(max(1, math.ceil(len(rises) / 100))).values.mean())
