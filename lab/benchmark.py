"""Count what MagicVideo costs, and time it beside diffusers' video U-Nets of like size (all ours).

Parameters and floating-point operations are counted on torch's "meta" device, where tensors have
shapes but no numbers. A multiply-add counts as 2; sums, norms, activations and adaptors (two
operations a value) are left out, and so is what a mask saves.
"""

import argparse
import re
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

from lab.results import check_ranges, report, run_command  # before torch: sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import train
from clip_text import CLIPTextEncoder
from data import ShapesDataset
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from runs import pick_device
from stages import STAGES
from unet3d import UNet3D
from vae import VideoVAE


def parameters(module: nn.Module, part: str = "") -> int:
    """Count the parameters whose names contain `part`."""
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


def flops(module: nn.Module, inputs: tuple, part: str = "", attention: bool = False) -> int:
    """Count the operations of a call: of modules of a name, or those of Q K^T and A V alone."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs)
    pattern = rf"\.{part}(\.\d+)?$" if part else "^Global$"
    return sum(n for name, operations in counter.get_flop_counts().items()
               for kind, n in operations.items() if re.search(pattern, name)
               and (not attention or "bmm" in str(kind) or "dot_product" in str(kind)))


def unet_inputs(config: MagicVideoConfig, clips: int, side: int) -> tuple[Tensor, ...]:
    """Make random inputs of the U-Net: z (b, f, c, side, side), t (b,), context (b, l, d), fps."""
    return (torch.randn(clips, config.unet.frames, config.unet.in_channels, side, side),
            torch.randint(1000, (clips,)),
            torch.randn(clips, config.text.context_length, config.unet.context_width),
            torch.full((clips,), 8.0))


def count(config: MagicVideoConfig) -> list[dict]:
    """Count parameters, and GFLOP of a clip: of all its frames, and of one step of the U-Net."""
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    with torch.device("meta"):
        unet = UNet3D(config.unet)
        vae = VideoVAE(config.vae)
        inputs = unet_inputs(config, 1, side)
        tokens = torch.zeros(1, config.text.context_length, dtype=torch.long)
        frames = torch.zeros(config.unet.frames, 3, config.size, config.size)
        calls = (("text encoder", CLIPTextEncoder(config.text), (tokens,)),
                 ("VAE encoder", vae.encoder, (frames,)), ("3D U-Net", unet, inputs),
                 ("VAE decoder", vae.decoder, (inputs[0][0], config.unet.frames)))
        return [{config.preset: f"{name} {part}", "parameters": parameters(module, part),
                 "GFLOP": flops(module, inputs, part) / 1e9}
                for name, module, inputs in calls
                for part in ("", "adaptor", "temporal_attentions", "fps_embedding")
                if parameters(module, part)]


def ratio_to_pixels() -> list[dict]:
    """Count "around 64x fewer computations" (paper, abstract): GFLOP on pixels and on latents.

    The same image U-Net on 256 x 256 pixels and on 32 x 32 latents. 64 = (256 / 32)^2 positions is
    the ratio of layers that see one position at a time; self-attention sees pairs: 64^2.
    """
    rows = []
    for name, channels, side in (("256 x 256 pixels", 3, 256), ("32 x 32 latents", 4, 32)):
        unet = replace(PRESETS["paper"].unet, in_channels=channels, out_channels=channels, frames=1)
        with torch.device("meta"):
            network = UNet3D(unet)
            inputs = unet_inputs(replace(PRESETS["paper"], unet=unet), 1, side)[:3]
            whole = flops(network, inputs) / 1e9
            attention = flops(network, inputs, attention=True) / 1e9
        rows.append({"image U-Net on": name, "layers": whole - attention, "attention": attention,
                     "GFLOP": whole})
    ratios = {key: rows[0][key] / rows[1][key] for key in ("layers", "attention", "GFLOP")}
    return [*rows, {"image U-Net on": "ratio", **ratios}]


class DiffusersUNet(nn.Module):
    """A video U-Net of diffusers, about as large as a preset's and called as ours; no FPS."""

    SIZES = {
        "tiny": {"UNet3DConditionModel": {"block_out_channels": (32, 48), "attention_head_dim": 16},
                 "UNetMotionModel": {"block_out_channels": (48, 56), "num_attention_heads": 2,
                                     "motion_num_attention_heads": 2}},
        "paper": {"UNetMotionModel": {"cross_attention_dim": 768}},  # Stable Diffusion 1.5's
    }

    def __init__(self, preset: str, kind: str):
        super().__init__()
        import diffusers

        self.is_motion = kind == "UNetMotionModel"
        block = "BlockMotion" if self.is_motion else "Block3D"
        sizes = self.SIZES[preset][kind]
        if preset == "tiny":
            sizes = {"in_channels": 4, "layers_per_block": 1, "norm_num_groups": 8,
                     "cross_attention_dim": 96, "down_block_types": (f"CrossAttnDown{block}",) * 2,
                     "up_block_types": (f"CrossAttnUp{block}",) * 2, **sizes}
        self.unet = getattr(diffusers, kind)(**sizes)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        if self.is_motion:  # reads a text for each frame
            context = context.repeat_interleave(z.shape[1], 0)
        return self.unet(z.transpose(1, 2), t, context).sample.transpose(1, 2)


def compare(config: MagicVideoConfig, clips: int, rounds: int, device: torch.device) -> list[dict]:
    """Time steps of training on `clips` clips, and of sampling one with and without its text.

    Networks take turns, so that a noisy machine is noisy for each; medians of `rounds`. Preset
    paper trains under autocast to bfloat16, and samples with weights of bfloat16.
    """
    networks = {"MagicVideo": UNet3D(config.unet).to(device)}
    for kind in DiffusersUNet.SIZES.get(config.preset, {}):
        networks[f"diffusers {kind}"] = DiffusersUNet(config.preset, kind).to(device)
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    use_bf16 = config.preset == "paper"
    with torch.device("meta"):
        operations = flops(UNet3D(config.unet), unet_inputs(config, 1, side)) / 1e12
    rows = []
    for step, batch in (("training", clips), ("sampling", 2)):
        inputs = [x.to(device) for x in unet_inputs(config, batch, side)]
        if use_bf16 and step == "sampling":
            inputs = [x.bfloat16() if x.is_floating_point() else x for x in inputs]
            networks = {name: network.bfloat16() for name, network in networks.items()}
        seconds = {name: [] for name in networks}
        for i in tqdm(range(-2, rounds), step, disable=None):  # the first two do not count
            for name, network in networks.items():
                started = time.perf_counter()
                with (torch.set_grad_enabled(step == "training"),
                      torch.autocast(device.type, torch.bfloat16, use_bf16)):
                    loss = F.mse_loss(network(*inputs), inputs[0])
                if step == "training":
                    loss.backward()
                    network.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds[name] += [time.perf_counter() - started] if i >= 0 else []
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        rows += [{"network": name, "parameters": parameters(networks[name]), "step": step,
                  "seconds": median, "ratio": median / medians["MagicVideo"]}
                 for name, median in medians.items()]
        # a backward pass costs two forward passes
        rate = batch * operations * (3 if step == "training" else 1) / medians["MagicVideo"]
        print(f"MagicVideo, {step}, {batch} clips: {rate:.1f} TFLOP/s")
    return rows


def time_sampling(config: MagicVideoConfig, rounds: int, device: torch.device) -> float:
    """Time `MagicVideo.sample`, 50 steps with decoding, as sample.py runs it; median seconds."""
    model = MagicVideo.from_preset(config.preset).to(device).eval()
    if device.type == "cuda":
        model.unet.bfloat16()
    seconds = []
    for _ in range(rounds + 1):  # the first does not count
        started = time.perf_counter()
        model.sample("a red circle moving left").cpu()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def training_step(frames: int, size: int, batch_size: int) -> dict:
    """Take two steps of stage video of preset laptop, by one process of its own, on a CPU."""
    config = replace(PRESETS["laptop"], size=size)
    config.unet = replace(config.unet, frames=frames)
    model = MagicVideo(config, MagicVideo.from_preset("laptop").tokenizer).train()
    settings = {**train.PRESET_SETTINGS["laptop"], "batch_size": batch_size, "video_steps": 2}
    stage = STAGES["video"](model, train.Settings(**settings))
    clips = ShapesDataset("train", frames, size)
    estimate = train.estimate_memory(stage, clips)
    optimizers, average = train.make_optimizers_and_average(stage, None)
    for step in range(2):  # the last counts
        started = time.perf_counter()
        batch, draw = stage.read([clips], step, batch_size, frames, slice(None))
        stage(batch, draw)[0].mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average.update()
    return {"frames": frames, "side": size, "seconds a step": time.perf_counter() - started,
            "GB": most_memory(), "estimated": estimate}


def most_memory() -> float:
    """Return the most memory that this process has had, in GB."""
    import resource  # not on Windows
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def grow(batch_size: int) -> list[dict]:
    """Measure time and memory of training steps as clips become longer and larger."""
    sizes = [(frames, size) for size in (64, 96, 128) for frames in (8, 16, 32)]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return [pool.apply(training_step, (*size, batch_size))
                for size in tqdm(sizes, disable=None)]


def main(arguments: list[str] | None = None) -> None:
    """Print the counts of every preset and the times of one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=12, help="of timing; 0 = counts alone (12)")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="to be timed (tiny)")
    parser.add_argument("--grow", action="store_true", help="instead: time and memory of training "
                        "on 8 to 32 frames of 64 to 128 pixels, preset laptop")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a training step (16)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    parser.add_argument("--out", default="evaluation", help="folder of the numbers (evaluation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, rounds=(0, 10**6), batch_size=(1, 10**6))
    device = pick_device(flags.device)
    if flags.grow:
        report(Path(flags.out) / "grow.json", flags, {"rows": grow(flags.batch_size)})
        return
    found = {name: count(config) for name, config in PRESETS.items()}
    found["ratio"] = ratio_to_pixels()
    if flags.rounds:
        config = PRESETS[flags.preset]
        found["times"] = compare(config, flags.batch_size, flags.rounds, device)
        found["seconds of a sample"] = time_sampling(config, min(flags.rounds, 3), device)
    report(Path(flags.out) / "benchmark.json", flags, found)


if __name__ == "__main__":
    run_command("lab.benchmark", main)
