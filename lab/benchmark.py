"""Count what MagicVideo costs, and time it beside diffusers' video U-Nets of like size (all ours).

Parameters and floating-point operations are counted on torch's "meta" device, where tensors have
shapes but no numbers. A multiply-add counts as 2; sums, norms and activations are left out, and so
is what a mask saves. Times are medians of steps that take turns, so that a noisy machine is noisy
for each network alike.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from clip_text import CLIPTextEncoder
from data import InputError
from lab.results import check_ranges, run_command, write_results
from magicvideo import PRESETS, MagicVideoConfig, pick_device
from stable_diffusion import is_video_parameter
from unet3d import DirectedTemporalAttention, FrameAdaptor, UNet3D
from vae import VideoVAE

# --------------------------------------------------------------------------------------------------
# Counting


def flops(run: Callable, attention: bool = False) -> int:
    """Count the operations of `run()`; with `attention` those of Q K^T and A V alone."""
    with FlopCounterMode(display=False) as counter:
        run()
    return sum(n for kind, n in counter.get_flop_counts()["Global"].items()
               if not attention or "bmm" in str(kind) or "dot_product" in str(kind))


def parameters(module: nn.Module, video: bool | None = None) -> int:
    """Count parameters: all, those that MagicVideo adds (True), or the image model's (False)."""
    return sum(p.numel() for name, p in module.named_parameters()
               if video is None or is_video_parameter(name) == video)


def adaptor_flops(unet: UNet3D, run: Callable) -> int:
    """Count a product and a sum for each value that leaves an adaptor; torch leaves them out."""
    sizes = []
    hooks = [module.register_forward_hook(lambda _, inputs, z: sizes.append(z.numel()))
             for module in unet.modules() if isinstance(module, FrameAdaptor)]
    run()
    for hook in hooks:
        hook.remove()
    return 2 * sum(sizes)


def unet_run(unet: UNet3D, frames: int, side: int, tokens: int, video: bool) -> Callable:
    """Make a call of the U-Net on a clip (1, frames, c, side, side) and a text of `tokens`."""
    z = torch.empty(1, frames, unet.config.in_channels, side, side)
    t = torch.empty(1, dtype=torch.long)
    context = torch.empty(1, tokens, unet.config.context_width)
    fps = torch.empty(1) if video else None
    return lambda: unet(z, t, context, fps)


def count(config: MagicVideoConfig) -> list[tuple[str, str, int, int]]:
    """List (part, what one call of it is for, its parameters, operations of that call)."""
    frames = config.unet.frames
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    length = config.text.context_length
    with torch.device("meta"):
        text = CLIPTextEncoder(config.text)
        unet = UNet3D(config.unet)
        vae = VideoVAE(config.vae)
        tokens = torch.empty(1, length, dtype=torch.long)
        frame = torch.empty(1, 1, 3, config.size, config.size)
        z = torch.empty(1, frames, config.vae.latent_channels, side, side)
        clip = unet_run(unet, frames, side, length, video=True)
        image = flops(unet_run(unet, 1, side, length, video=False))
        images = flops(unet_run(unet, frames, side, length, video=False))
        fps = flops(lambda: unet.fps_embedding(torch.empty(1)))
        decode = flops(lambda: vae.decode(z[:, :1]))
        adaptors, attentions = (sum(parameters(m) for m in unet.modules() if isinstance(m, kind))
                                for kind in (FrameAdaptor, DirectedTemporalAttention))
        encoder = parameters(vae.encoder) + parameters(vae.quant_conv)
        return [
            ("text encoder", "caption", parameters(text), flops(lambda: text(tokens))),
            ("VAE encoder", "frame", encoder, flops(lambda: vae.encode(frame))),
            ("U-Net, image parts", "frame", parameters(unet, video=False), image),
            ("U-Net, image parts", "clip", parameters(unet, video=False), images),
            ("  + adaptors", "clip", adaptors, adaptor_flops(unet, clip)),
            ("  + temporal attention", "clip", attentions, flops(clip) - images - fps),
            ("  + FPS embedding", "clip", parameters(unet.fps_embedding), fps),
            ("VAE decoder, image parts", "frame", parameters(vae, video=False) - encoder, decode),
            ("  + temporal attention", "frame", parameters(vae, video=True),
             flops(lambda: vae.decode(z)) // frames - decode),
        ]


def ratio_to_pixels() -> dict[str, tuple[int, int]]:
    """Count "around 64x fewer computations" (paper, abstract): {part: (pixels, latents)}.

    The same image U-Net on 256 x 256 pixels and on 32 x 32 latents. 64 = (256 / 32)^2 positions is
    the ratio of layers that see one position at a time; self-attention sees pairs: 64^2.
    """
    config = PRESETS["paper"].unet
    pairs = []
    for channels, side in ((3, 256), (config.in_channels, 32)):
        with torch.device("meta"):
            unet = UNet3D(replace(config, in_channels=channels, out_channels=channels))
            run = unet_run(unet, 1, side, 77, video=False)
            pairs.append((flops(run), flops(run, attention=True)))
    (pixels, attention), (latents, latent_attention) = pairs
    return {"layers": (pixels - attention, latents - latent_attention),
            "attention": (attention, latent_attention), "whole U-Net": (pixels, latents)}


# --------------------------------------------------------------------------------------------------
# Timing

PEERS = {"UNet3DConditionModel": ("Block3D", ""), "UNetMotionModel": ("Block", "Motion")}


class DiffusersUNet(nn.Module):
    """A video U-Net of diffusers, called as ours: z (b, f, c, h, w), t (b,), context, fps unused."""

    def __init__(self, kind: str, config: MagicVideoConfig, width: int):
        super().__init__()
        import diffusers

        u = config.unet
        block, motion = PEERS[kind]
        down = [("CrossAttnDown" if has else "Down") + block + motion for has in u.attention]
        up = [("CrossAttnUp" if has else "Up") + block + motion for has in u.attention[::-1]]
        channels = [round(c * width / u.channels[0] / u.groups) * u.groups for c in u.channels]
        heads = {"attention_head_dim": max(8, channels[0] // u.heads)}
        if motion:
            heads = {"num_attention_heads": u.heads, "motion_num_attention_heads": u.heads}
        self.is_motion = bool(motion)
        self.unet = getattr(diffusers, kind)(
            in_channels=u.in_channels, out_channels=u.out_channels, down_block_types=tuple(down),
            up_block_types=tuple(up), block_out_channels=tuple(channels), norm_num_groups=u.groups,
            layers_per_block=u.layers, cross_attention_dim=u.context_width, **heads)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        if self.is_motion:  # reads a text for each frame
            context = context.repeat_interleave(z.shape[1], 0)
        return self.unet(z.transpose(1, 2), t, context).sample.transpose(1, 2)


def matched(kind: str, config: MagicVideoConfig, target: int) -> nn.Module:
    """Build a peer as wide as comes nearest to `target` parameters."""
    sizes = {}
    for width in range(8, 2 * config.unet.channels[0] + 1, 4 if config.unet.groups < 32 else 32):
        with torch.device("meta"):
            try:
                sizes[width] = parameters(DiffusersUNet(kind, config, width))
            except ValueError:  # a width that its groups or heads do not divide
                continue
    return DiffusersUNet(kind, config, min(sizes, key=lambda width: abs(sizes[width] - target)))


def training_step(unet: nn.Module, batch: tuple[Tensor, ...]) -> Callable:
    """Make a step of training: the loss, its gradients, AdamW."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
    target = torch.randn_like(batch[0])

    def step() -> None:
        F.mse_loss(unet(*batch), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_step(unet: nn.Module, batch: tuple[Tensor, ...]) -> Callable:
    """Make a step of sampling under guidance: one clip with text and without."""
    @torch.no_grad()
    def step() -> None:
        unet(*(x[:1].repeat_interleave(2, 0) for x in batch))

    return step


def medians(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Time all steps once in every round, after two that are not counted: seconds, medians."""
    seconds = {name: [] for name in steps}
    for i in tqdm(range(-2, rounds), "rounds", disable=None):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare(config: MagicVideoConfig, clips: int, rounds: int, device: torch.device) -> list[dict]:
    """Time a training step of `clips` clips and a sampling step of one, ours and the peers'."""
    u = config.unet
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    with device:
        batch = (torch.randn(clips, u.frames, u.in_channels, side, side),
                 torch.randint(1000, (clips,)),
                 torch.randn(clips, config.text.context_length, u.context_width),
                 torch.full((clips,), 8.0))
    networks = {"MagicVideo": UNet3D(u).to(device)}
    try:
        for kind in PEERS:
            peer = matched(kind, config, parameters(networks["MagicVideo"]))
            networks[f"diffusers {kind}"] = peer.to(device)
    except ImportError:
        print("diffusers is left out; pip install diffusers to compare with it")
    rows = []
    for kind, make in (("training", training_step), ("sampling", sampling_step)):
        steps = {name: make(network, batch) for name, network in networks.items()}
        seconds = medians(steps, rounds, device)
        rows += [{"step": kind, "network": name, "parameters": parameters(networks[name]),
                  "seconds": value, "ratio": value / seconds["MagicVideo"]}
                 for name, value in seconds.items()]
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Print the counts of presets and the times of one."""
    parser = argparse.ArgumentParser(description="Counts what MagicVideo costs, and times a "
                                     "training and a sampling step beside diffusers' U-Nets.")
    parser.add_argument("--preset", choices=PRESETS, help="(counts: all; times: tiny)")
    parser.add_argument("--rounds", type=int, default=12, help="of timing; 0 = counts alone (12)")
    parser.add_argument("--batch-size", type=int, default=16, help="clips of a training step (16)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    parser.add_argument("--out", help="JSON file for the numbers")
    flags = parser.parse_args(arguments)
    check_ranges(flags, rounds=(0, 1e6), batch_size=(1, 1e6))
    device = pick_device(flags.device)
    if flags.preset == "paper" and flags.rounds and device.type == "cpu":
        raise InputError("--preset paper: a step takes minutes on a CPU; add --rounds 0")
    found = {"counts": {name: count(PRESETS[name])
                        for name in ([flags.preset] if flags.preset else PRESETS)}}
    for name, rows in found["counts"].items():
        config = PRESETS[name]
        print(f"{name}: {config.unet.frames} frames of {config.size} x {config.size} pixels\n"
              f"  {'part':26}{'parameters':>13}{'GFLOP':>12} per")
        for part, per, size, operations in rows:
            print(f"  {part:26}{size:13,}{operations / 1e9:12,.3f} {per}")
    found["ratio"] = ratio_to_pixels()
    print(f"the paper's image U-Net, GFLOP{'256^2 pixels':>16}{'32^2 latents':>14}{'ratio':>8}")
    for part, (pixels, latents) in found["ratio"].items():
        print(f"  {part:28}{pixels / 1e9:15,.1f}{latents / 1e9:14,.1f}{pixels / latents:8,.1f}")
    if flags.rounds:
        torch.set_flush_denormal(True)
        config = PRESETS[flags.preset or "tiny"]
        found["times"] = compare(config, flags.batch_size, flags.rounds, device)
        print(f"{config.preset} on {device}, {torch.get_num_threads()} threads, float32: a training "
              f"step of {flags.batch_size} clips, a guided sampling step of one")
        print(f"  {'step':10}{'network':34}{'parameters':>12}{'seconds':>10}{'ratio':>8}")
        for row in found["times"]:
            print("  {step:10}{network:34}{parameters:12,}{seconds:10.4f}{ratio:8.2f}".format(**row))
    if flags.out:
        write_results(flags.out, flags, found)


if __name__ == "__main__":
    run_command(main)
