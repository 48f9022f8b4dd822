"""How long MagicVideo takes, beside other people's video U-Nets (all ours): `python benchmark.py --time`.

Peers get the same latents, text of the same size and, by their width, the same number of parameters within 10 %. All
are measured in turn, round after round, so that a noisy machine is noisy for each; medians are printed, and each as a
multiple of ours. Peers are installed by whoever wants them: diffusers, video-diffusion-pytorch.
"""

import json
import platform
import statistics
import sys
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import InputError
from magicvideo import PRESETS, MagicVideoConfig
from parallel import backward, keep_freed_memory
from progress import commit
from settings import PRESET_SETTINGS, Settings
from stable_diffusion import is_new_part
from unet3d import Level, UNet3D

WITHIN = 0.1  # of our parameters


class DiffusersUNet(nn.Module):
    """A video U-Net of diffusers, called as ours is: z (b, f, c, h, w), t (b,), context (b, l, d), fps (b,)."""

    def __init__(self, kind: str, config: MagicVideoConfig, width: int):
        super().__init__()
        import diffusers

        u, self.once_a_frame = config.unet, kind == "UNetMotionModel"
        name, tail = {"UNet3DConditionModel": ("Block3D", ""), "UNetMotionModel": ("Block", "Motion")}[kind]
        blocks = [[("CrossAttn" if has else "") + way + name + tail for has in levels]
                  for way, levels in (("Down", u.attention), ("Up", u.attention[::-1]))]
        channels = [round(c * width / u.channels[0] / u.groups) * u.groups for c in u.channels]
        heads = {"num_attention_heads": u.heads, "motion_num_attention_heads": u.heads} if tail else {
            "attention_head_dim": max(8, channels[0] // u.heads)}
        self.unet = getattr(diffusers, kind)(
            in_channels=u.in_channels, out_channels=u.out_channels, down_block_types=tuple(blocks[0]),
            up_block_types=tuple(blocks[1]), block_out_channels=tuple(channels), layers_per_block=u.layers,
            norm_num_groups=u.groups, cross_attention_dim=u.context_width, **heads)

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        if self.once_a_frame:
            context = context.repeat_interleave(z.shape[1], 0)
        return self.unet(z.transpose(1, 2), t, context).sample.transpose(1, 2)


class Lucidrains(nn.Module):
    """Unet3D of video-diffusion-pytorch, called as ours is; it reads the text as one vector."""

    def __init__(self, config: MagicVideoConfig, width: int):
        super().__init__()
        if "torchvision" not in sys.modules:  # its trainer needs it; the network does not
            stub = sys.modules["torchvision"] = types.ModuleType("torchvision")
            stub.transforms, stub.utils = types.SimpleNamespace(ToTensor=lambda: None), None
        from video_diffusion_pytorch import Unet3D

        u = config.unet
        multiples = tuple(max(1, round(c / u.channels[0])) for c in u.channels)
        multiples = multiples if len(set(multiples)) > 1 else tuple(2**i for i in range(len(multiples)))
        self.unet = Unet3D(width, cond_dim=u.context_width, dim_mults=multiples, channels=u.in_channels,
                           attn_heads=u.heads, attn_dim_head=max(8, u.channels[0] // u.heads))

    def forward(self, z: Tensor, t: Tensor, context: Tensor, fps: Tensor) -> Tensor:
        return self.unet(z.transpose(1, 2), t, cond=context.mean(1)).transpose(1, 2)


PEERS = {
    "diffusers UNet3DConditionModel": partial(DiffusersUNet, "UNet3DConditionModel"),
    "diffusers UNetMotionModel": partial(DiffusersUNet, "UNetMotionModel"),
    "lucidrains Unet3D": Lucidrains,
}


def parameters(module: nn.Module, new: bool | None = None) -> int:
    """How many numbers a module learns: all, the image model's (new=False), or those that MagicVideo adds (True)."""
    return sum(p.numel() for name, p in module.named_parameters() if new is None or is_new_part(name) == new)


def matched(peer: Callable, config: MagicVideoConfig, target: int) -> nn.Module | None:
    """The peer, as wide as `target` parameters ask for; None if no width comes within 10 %."""
    best = None
    for width in range(8, 2 * config.unet.channels[0] + 1, 4 if config.unet.groups < 32 else 32):
        with torch.device("meta"):
            try:
                found = parameters(peer(config, width))
            except ValueError:  # a width that its groups or heads do not divide
                continue
        if best is None or abs(found - target) < abs(best[1] - target):
            best = width, found
    return peer(config, best[0]) if best and abs(best[1] - target) <= WITHIN * target else None


def training_step(unet: nn.Module, batch: tuple, target: Tensor, precision: str, parts: int) -> Callable:
    """What one step of training does to the U-Net: the loss, its gradients (in `parts` as train.py has it), AdamW."""
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5, fused=True)
    autocast = partial(torch.autocast, target.device.type, torch.bfloat16, precision == "bf16", cache_enabled=False)
    pool = ThreadPoolExecutor(parts if target.device.type == "cpu" else 1, "part", torch.set_flush_denormal, (True,))
    used = [p for p in unet.parameters() if p.requires_grad]

    def loss(part: slice) -> tuple[Tensor, list]:
        return F.mse_loss(unet(*(x[part] for x in batch)).float(), target[part]), []

    def step() -> None:
        if parts > 1:
            backward([(1 / parts, partial(loss, slice(k, None, parts))) for k in range(parts)], used, pool, autocast)
        else:
            with autocast():
                value, _ = loss(slice(None))
            value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sampling_step(unet: nn.Module, batch: tuple, precision: str) -> Callable:
    """What one step of sampling asks of the U-Net: one clip with text and without."""
    autocast = torch.autocast(batch[0].device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    @torch.no_grad()
    def step() -> None:
        with autocast:
            unet(*(x[:1].repeat_interleave(2, 0) for x in batch))

    return step


def medians(steps: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, float]:
    """Seconds a call, each called once in every round after two that are not counted."""
    seconds = {name: [] for name in steps}
    for i in tqdm(range(-2, rounds), unit="round", dynamic_ncols=True):
        for name, step in steps.items():
            synchronize(device)
            started = time.perf_counter()
            step()
            synchronize(device)
            if i >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to be done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory(step: Callable, device: torch.device) -> float | None:
    """Most GB of a GPU that a call needs, weights included; None on a CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return torch.cuda.max_memory_allocated(device) / 2**30


def matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large matrix product, what a device can do at best, as measured."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return 2 * n**3 / medians({"product": lambda: a @ a}, 20, device)["product"]


def made_up_batch(config: MagicVideoConfig, clips: int, device: torch.device) -> tuple[Tensor, ...]:
    """Random latents, steps, text and rates of as many clips."""
    u, side = config.unet, config.size // 2 ** (len(config.vae.channels) - 1)
    with device:
        return (torch.randn(clips, u.frames, u.in_channels, side, side), torch.randint(1000, (clips,)),
                torch.randn(clips, config.text.context_length, u.context_width), torch.full((clips,), 8.0))


def held(unet: nn.Module, batch: tuple, precision: str) -> float:
    """MB that the way forward keeps for the way back, weights left out."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autocast(batch[0].device.type, torch.bfloat16, precision == "bf16"):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            unet(*batch)
    return sum(kept.values()) / 2**20


def levers(config: MagicVideoConfig, batch: tuple, rounds: int) -> list[dict]:
    """What flags of train.py buy: seconds of a training step, and MB held for the way back; "plain" is none of them."""
    device, target, steps, nets = batch[0].device, torch.randn_like(batch[0]), {}, {}
    arms = {"plain": ("fp32", 1), "--parts 2": ("fp32", 2), "--precision bf16": ("bf16", 1),
            "--gradient-checkpointing": ("fp32", 1), "--compile": ("fp32", 1)}
    if device.type == "cpu":
        del arms["--compile"]  # it took more than ten minutes to begin, on two cores
    for name, (precision, parts) in arms.items():
        nets[name] = UNet3D(config.unet).to(device)
        for module in nets[name].modules():
            if isinstance(module, Level):
                module.checkpointing = name == "--gradient-checkpointing"
        if name == "--compile":
            nets[name].compile()
        steps[name] = training_step(nets[name], batch, target, precision, parts)
    seconds = medians(steps, rounds, device)
    return [{"kind": "lever", "network": name, "parameters": parameters(nets[name]), "seconds": seconds[name],
             "ratio": seconds[name] / seconds["plain"], "GB": None, "MB held": None if name == "--compile" else held(
                 nets[name], tuple(x[:: arms[name][1]] for x in batch), arms[name][0])} for name in arms]


def compared(config: MagicVideoConfig, batch: tuple, precision: str, parts: int, rounds: int) -> list[dict]:
    """Seconds of a training step and of a sampling step, ours and of every peer that is installed."""
    device, target = batch[0].device, torch.randn_like(batch[0])
    unet = UNet3D(config.unet).to(device)
    networks, size, rows = {"MagicVideo": unet}, parameters(unet), []
    for name, peer in PEERS.items():
        try:
            found = matched(peer, config, size)
        except ImportError as error:
            print(f"{name}: left out, not installed ({error})")
            continue
        if found is None:
            print(f"{name}: left out, no width has as many parameters within {WITHIN:.0%}")
        else:
            networks[name] = found.to(device)
    training = {name: training_step(network, batch, target, precision, parts if network is unet else 1)
                for name, network in networks.items()}
    if parts > 1:
        training["MagicVideo, batch in one part"] = training_step(unet, batch, target, precision, 1)
    sampling = {name: sampling_step(network, batch, precision) for name, network in networks.items()}
    for kind, steps in (("training", training), ("sampling", sampling)):
        seconds = medians(steps, rounds, device)
        rows += [{"kind": kind, "network": name, "parameters": parameters(networks[name.split(",")[0]]),
                  "seconds": value, "ratio": value / seconds["MagicVideo"], "GB": memory(steps[name], device)}
                 for name, value in seconds.items()]
    return rows


def measure(preset: str, rounds: int, batch_size: int | None, device: torch.device, with_levers: bool,
            out: str | None) -> None:
    """Prints the table of a preset, writes its numbers to `out`."""
    if preset == "paper" and device.type == "cpu":
        raise InputError("--preset paper: a step takes minutes on a CPU; use --count, or a GPU")
    torch.set_flush_denormal(True)
    keep_freed_memory()
    torch.manual_seed(0)
    config, s, cores = PRESETS[preset], Settings(**PRESET_SETTINGS[preset]), torch.get_num_threads()
    clips, precision = batch_size or s.batch_size, "bf16" if device.type == "cuda" else "fp32"
    batch = made_up_batch(config, clips, device)
    rows = levers(config, batch, rounds) if with_levers else []
    rows += compared(config, batch, precision, min(s.parts, cores, clips) if device.type == "cpu" else 1, rounds)
    rate = matrix_rate(device, precision)
    _, f, _, h, w = batch[0].shape
    print(f"{preset} on {device}, {precision}, {cores} threads: training step of {clips} clips of {f} x {h} x {w} "
          f"latents, sampling step of one with guidance; medians of {rounds}\n"
          f"  {'':10}{'network':34}{'parameters':>12}{'seconds':>10}{'ratio':>8}{'GB':>8}{'MB held':>9}")
    for row in rows:
        most, kept = ("" if row.get(name) is None else f"{row[name]:.1f}" for name in ("GB", "MB held"))
        print(f"  {row['kind']:10}{row['network']:34}{row['parameters']:12,}{row['seconds']:10.4f}{row['ratio']:8.2f}"
              f"{most:>8}{kept:>9}")
    print(f"  matrix products on this device: {rate / 1e12:.3g} TFLOP a second")
    if out:
        Path(out).write_text(json.dumps({
            "preset": preset, "device": str(device), "machine": platform.processor() or platform.machine(),
            "threads": cores, "torch": str(torch.__version__), "precision": precision, "batch": clips,
            "rounds": rounds, "commit": commit(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "matrix_rate": rate, "rows": rows}, indent=1))
