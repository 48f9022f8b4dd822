"""Count what MagicVideo costs, and time it beside diffusers' video U-Nets of like size (all ours).

Parameters and floating-point operations are counted on torch's "meta" device, where tensors have
shapes but no numbers. A multiply-add counts as 2; sums, norms, activations and adaptors (two
operations a value) are left out, and so is what a mask saves.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read by torch: waiting threads do not spin

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from clip_text import CLIPTextEncoder
from lab.results import check_ranges, print_table, run_command, write_results
from magicvideo import PRESETS, MagicVideoConfig, pick_device
from unet3d import UNet3D
from vae import VideoVAE


def flops(run: Callable, attention: bool = False) -> int:
    """Count the operations of `run()`; with `attention` those of Q K^T and A V alone."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(n for kind, n in counter.get_flop_counts()["Global"].items()
               if not attention or "bmm" in str(kind) or "dot_product" in str(kind))


def parameters(module: nn.Module, part: str = "") -> int:
    """Count the parameters whose names contain `part`."""
    return sum(p.numel() for name, p in module.named_parameters() if part in name)


def unet_inputs(config: MagicVideoConfig, clips: int, side: int) -> tuple[Tensor, ...]:
    """Make random inputs of the U-Net: z (b, f, c, side, side), t (b,), context (b, l, d), fps."""
    return (torch.randn(clips, config.unet.frames, config.unet.in_channels, side, side),
            torch.randint(1000, (clips,)),
            torch.randn(clips, config.text.context_length, config.unet.context_width),
            torch.full((clips,), 8.0))


def count(config: MagicVideoConfig) -> list[dict]:
    """Count each part: its parameters, its GFLOP for one clip and, of the U-Net, one step."""
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    with torch.device("meta"):
        text = CLIPTextEncoder(config.text)
        unet = UNet3D(config.unet)
        vae = VideoVAE(config.vae)
        z, t, context, fps = unet_inputs(config, 1, side)
        tokens = torch.empty(1, config.text.context_length, dtype=torch.long)
        pixels = torch.empty(1, config.unet.frames, 3, config.size, config.size)
        image = flops(lambda: unet(z, t, context))
        embed = flops(lambda: unet.fps_embedding(fps))
        video = flops(lambda: unet(z, t, context, fps))
        decode_frames = flops(lambda: vae.decode(z.transpose(0, 1)))
        decode = flops(lambda: vae.decode(z))
        encode = flops(lambda: vae.encode(pixels))
        encode_text = flops(lambda: text(tokens))
    added = [parameters(unet, part) for part in ("adaptor", "temporal", "fps_embedding")]
    encoder = parameters(vae.encoder) + parameters(vae.quant_conv)
    temporal = parameters(vae, "temporal")
    parts = [("text encoder", parameters(text), encode_text),
             ("VAE encoder", encoder, encode),
             ("U-Net, image parts", parameters(unet) - sum(added), image),
             ("  + adaptors", added[0], 0),
             ("  + temporal attention", added[1], video - image - embed),
             ("  + FPS embedding", added[2], embed),
             ("VAE decoder, image parts", parameters(vae) - encoder - temporal, decode_frames),
             ("  + temporal attention", temporal, decode - decode_frames)]
    return [{config.preset: part, "parameters": size, "GFLOP per clip": operations / 1e9}
            for part, size, operations in parts]


def ratio_to_pixels() -> list[dict]:
    """Count "around 64x fewer computations" (paper, abstract): GFLOP on pixels and on latents.

    The same image U-Net on 256 x 256 pixels and on 32 x 32 latents. 64 = (256 / 32)^2 positions is
    the ratio of layers that see one position at a time; self-attention sees pairs: 64^2.
    """
    counts = []
    for channels, side in ((3, 256), (4, 32)):
        unet = replace(PRESETS["paper"].unet, in_channels=channels, out_channels=channels, frames=1)
        with torch.device("meta"):
            network = UNet3D(unet)
            inputs = unet_inputs(replace(PRESETS["paper"], unet=unet), 1, side)[:3]
            whole = flops(lambda: network(*inputs)) / 1e9
            attention = flops(lambda: network(*inputs), attention=True) / 1e9
        counts.append((whole - attention, attention, whole))
    return [{"paper's image U-Net": part, "256^2 pixels": pixels, "32^2 latents": latents,
             "ratio": pixels / latents}
            for part, pixels, latents in zip(("layers", "attention", "whole"), *counts)]


class DiffusersUNet(nn.Module):
    """A video U-Net of diffusers, about as large as preset tiny's and called as ours; no FPS."""

    SIZES = {"UNet3DConditionModel": {"block_out_channels": (32, 48), "attention_head_dim": 16},
             "UNetMotionModel": {"block_out_channels": (48, 56), "num_attention_heads": 2,
                                 "motion_num_attention_heads": 2}}

    def __init__(self, kind: str):
        super().__init__()
        import diffusers

        self.is_motion = kind == "UNetMotionModel"
        block = "BlockMotion" if self.is_motion else "Block3D"
        self.unet = getattr(diffusers, kind)(
            in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=96, down_block_types=(f"CrossAttnDown{block}",) * 2,
            up_block_types=(f"CrossAttnUp{block}",) * 2, **self.SIZES[kind])

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        if self.is_motion:  # reads a text for each frame
            context = context.repeat_interleave(z.shape[1], 0)
        return self.unet(z.transpose(1, 2), t, context).sample.transpose(1, 2)


def training_step(unet: nn.Module, inputs: list[Tensor]) -> Callable:
    """Make a step of training: the loss, its gradients, AdamW."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)

    def step() -> None:
        F.mse_loss(unet(*inputs), inputs[0]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_step(unet: nn.Module, inputs: list[Tensor]) -> Callable:
    """Make a step of sampling under guidance: one clip with text and without."""
    return torch.no_grad()(lambda: unet(*(x[:1].repeat_interleave(2, 0) for x in inputs)))


def medians(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Time steps in turn, so that a noisy machine is noisy for each: median seconds of `rounds`."""
    seconds = {name: [] for name in steps}
    for i in tqdm(range(-2, rounds), "rounds", disable=None):  # the first two are not counted
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(clips: int, rounds: int, device: torch.device) -> list[dict]:
    """Time training steps of `clips` clips and sampling steps of one: preset tiny and diffusers'."""
    torch.set_flush_denormal(True)
    inputs = [x.to(device) for x in unet_inputs(PRESETS["tiny"], clips, side=8)]
    networks = {"MagicVideo": UNet3D(PRESETS["tiny"].unet).to(device)}
    try:
        networks |= {f"diffusers {kind}": DiffusersUNet(kind).to(device)
                     for kind in DiffusersUNet.SIZES}
    except ImportError:
        print("diffusers is left out; pip install diffusers to compare with it")
    rows = []
    for kind, make in (("training", training_step), ("sampling", sampling_step)):
        steps = {name: make(network, inputs) for name, network in networks.items()}
        seconds = medians(steps, rounds, device)
        rows += [{"step": kind, "network": name, "parameters": parameters(networks[name]),
                  "seconds": value, "ratio": value / seconds["MagicVideo"]}
                 for name, value in seconds.items()]
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the counts of every preset and the times of preset tiny."""
    parser = argparse.ArgumentParser(description="Counts what MagicVideo costs, and times a "
                                     "training and a sampling step beside diffusers' U-Nets.")
    parser.add_argument("--rounds", type=int, default=12, help="of timing; 0 = counts alone (12)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a training step (16)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--out", default="evaluation", help="folder of the numbers (evaluation)")
    flags = parser.parse_args(arguments)
    check_ranges(flags, rounds=(0, 1e6), batch_size=(1, 1e6))
    device = pick_device(flags.device)
    tables = {**{name: count(config) for name, config in PRESETS.items()},
              "ratio": ratio_to_pixels()}
    if flags.rounds:
        tables["times"] = compare(flags.batch_size, flags.rounds, device)
    for rows in tables.values():
        print_table(rows)
    write_results(Path(flags.out) / "benchmark.json", flags, tables)


if __name__ == "__main__":
    run_command(main)
