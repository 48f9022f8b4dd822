"""What MagicVideo costs: parameters and floating-point operations of every part, counted without computing anything.

`python benchmark.py --count` builds each preset on torch's "meta" device, where tensors have shapes but no numbers. A
multiply-add counts as 2; sums, norms and activations are left out; attention is counted without what its mask saves.
`python benchmark.py --time` measures, beside other people's video U-Nets: see `timing.py`.
Read `unet3d.py` for the parts.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from cascade import BETWEEN, FACTOR, interpolation_config
from clip_text import CLIPTextEncoder
from data import InputError
from magicvideo import PRESETS, MagicVideoConfig, choose_device
from timing import measure, parameters
from unet3d import DirectedTemporalAttention, FrameAdaptor, UNet3D, UNetConfig
from vae import VideoVAE


def flops(run: Callable, attention: bool = False) -> int:
    """Operations of `run()`; with `attention` those of Q K^T and A V alone."""
    with FlopCounterMode(display=False) as counter:
        run()
    by_kind = counter.get_flop_counts()["Global"]
    return sum(n for kind, n in by_kind.items() if not attention or "bmm" in str(kind) or "dot_product" in str(kind))


def unet_run(unet: UNet3D, frames: int, side: int, tokens: int, video: bool) -> Callable:
    """One call of the U-Net on a clip of latents or pixels (1, frames, c, side, side) and as many tokens of text."""
    z, t = torch.empty(1, frames, unet.config.in_channels, side, side), torch.empty(1, dtype=torch.long)
    context, fps = torch.empty(1, tokens, unet.config.context_width), torch.empty(1) if video else None
    return lambda: unet(z, t, context, fps)


def adaptor_flops(unet: UNet3D, run: Callable) -> int:
    """Operations of all adaptors in `run()`, a product and a sum for each value, which torch's counter leaves out."""
    sizes = []
    hooks = [module.register_forward_hook(lambda _, inputs, z: sizes.append(z.numel()))
             for module in unet.modules() if isinstance(module, FrameAdaptor)]
    run()
    for hook in hooks:
        hook.remove()
    return 2 * sum(sizes)


def count(config: MagicVideoConfig) -> list[tuple[str, str, int, int]]:
    """The rows of a preset's table: (part, what one call of it is for, parameters, operations of that call)."""
    f, side = config.unet.frames, config.size // 2 ** (len(config.vae.channels) - 1)
    with torch.device("meta"):
        text, unet, vae = CLIPTextEncoder(config.text), UNet3D(config.unet), VideoVAE(config.vae)
        image_vae = VideoVAE(replace(config.vae, temporal_attention=False, temporal_conv=False))
        length, frame = config.text.context_length, torch.empty(1, 1, 3, config.size, config.size)
        tokens, clip = torch.empty(1, length, dtype=torch.long), unet_run(unet, f, side, length, video=True)
        z = torch.empty(1, f, config.vae.latent_channels, side, side)
        image, picture = (flops(unet_run(unet, n, side, length, video=False)) for n in (f, 1))
        fps, decode = flops(lambda: unet.fps_embedding(torch.empty(1))), flops(lambda: image_vae.decode(z))
        size = {kind: sum(parameters(module) for module in unet.modules() if isinstance(module, kind))
                for kind in (FrameAdaptor, DirectedTemporalAttention)}
        # what follows the key frames: both see the text and a step, interpolation also FPS, super-resolution a level
        between, upscaler = UNet3D(interpolation_config(config.unet)), UNet3D(config.upscale)
        large = torch.empty(1, 1, config.upscale.in_channels, FACTOR * config.size, FACTOR * config.size)
        words, one = torch.empty(1, length, config.unet.context_width), torch.empty(1, dtype=torch.long)
        return [
            ("text encoder", "caption", parameters(text), flops(lambda: text(tokens))),
            ("VAE encoder", "frame", parameters(vae.encoder) + parameters(vae.quant_conv),
             flops(lambda: vae.encode(frame))),
            ("U-Net, image parts", "frame", parameters(unet, new=False), picture),
            ("U-Net, image parts", "clip", parameters(unet, new=False), image),
            ("  + adaptors", "clip", size[FrameAdaptor], adaptor_flops(unet, clip)),
            ("  + temporal attention", "clip", size[DirectedTemporalAttention], flops(clip) - image - fps),
            ("  + FPS embedding", "clip", parameters(unet.fps_embedding), fps),
            ("VAE decoder, image parts", "frame", parameters(image_vae.decoder) + parameters(vae.post_quant_conv),
             decode // f),
            ("  + temporal attention", "frame", parameters(vae, new=True),
             (flops(lambda: vae.decode(z)) - decode) // f),
            ("interpolation U-Net", "gap", parameters(between),
             flops(unet_run(between, BETWEEN, side, length, video=True))),
            ("super-resolution U-Net", "frame", parameters(upscaler),
             flops(lambda: upscaler(large, one, words, None, one))),
        ]


def show_counts(name: str) -> None:
    """Prints the table of a preset: new parts also in percent of the image parts above them."""
    config = PRESETS[name]
    print(f"{name}: {config.unet.frames} frames of {config.size} x {config.size} pixels\n"
          f"  {'part':26}{'parameters':>13}{'GFLOP':>12} per")
    whole = 0, 0  # of the image parts above
    for part, per, size, operations in count(config):
        share = ""
        if part.startswith("  +"):
            share = f"  +{100 * size / whole[0]:.2f} % parameters, +{100 * operations / whole[1]:.2f} % operations"
        else:
            whole = size, operations
        print(f"  {part:26}{size:13,}{operations / 1e9:12,.3f} {per}{share}")
    print()


def show_64_times(config: UNetConfig) -> None:
    """Prints "64x" (paper, abstract): the same image U-Net on 256 x 256 pixels and on 32 x 32 latents."""
    with torch.device("meta"):
        runs = [unet_run(UNet3D(replace(config, in_channels=c, out_channels=c)), 1, side, 77, video=False)
                for c, side in ((3, 256), (config.in_channels, 32))]
        whole, attention = [flops(run) for run in runs], [flops(run, attention=True) for run in runs]
    rest = [a - b for a, b in zip(whole, attention)]
    print('the paper\'s "64x": the U-Net of preset paper on one frame, GFLOP')
    print(f"  {'':34}{'256 x 256 x 3':>15}{'32 x 32 x 4':>13}{'ratio':>8}")
    rows = {"convolutions and linear layers": rest, "attention's Q K^T and A V": attention, "all": whole}
    for part, (pixels, latents) in rows.items():
        print(f"  {part:34}{pixels / 1e9:15,.1f}{latents / 1e9:13,.1f}{pixels / latents:8,.1f}")
    print("  64 = (256 / 32)^2 positions: the ratio of every layer that sees one position at a time (a little less\n"
          "  here, as the text and 3 channels for 4 do not grow). Self-attention sees pairs of positions: 64^2. This\n"
          "  is no measured time and no comparison with VDM's own network; it leaves out the VAE, whose decoder\n"
          "  works once a clip while the U-Net works twice a step.")


def main(arguments: list[str] | None = None) -> None:
    """`--count` for one preset or all, or `--time` for one."""
    parser = argparse.ArgumentParser(description="Counts or measures what MagicVideo costs.")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--count", action="store_true", help="parameters and operations of every part")
    kind.add_argument("--time", action="store_true", help="time and memory of training and sampling, beside peers")
    parser.add_argument("--preset", help=f"one of {', '.join(PRESETS)} (default: all; of --time: tiny)")
    parser.add_argument("--rounds", type=int, default=12, help="of --time: how often each is measured, in turn")
    parser.add_argument("--batch-size", type=int, help="of --time: clips (default: the preset's)")
    parser.add_argument("--levers", action="store_true", help="of --time: also what flags of train.py buy")
    parser.add_argument("--device", help="of --time: cuda, mps or cpu (default: the first of them that is there)")
    parser.add_argument("--out", help="of --time: a JSON file for the numbers")
    flags = parser.parse_args(arguments)
    if flags.preset not in (None, *PRESETS):
        raise InputError(f'--preset "{flags.preset}": there is no such preset; use {", ".join(PRESETS)}')
    for flag, value in (("--rounds", flags.rounds), ("--batch-size", flags.batch_size)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: choose 1 or more")
    if flags.time:
        device = choose_device(flags.device)
        return measure(flags.preset or "tiny", flags.rounds, flags.batch_size, device, flags.levers, flags.out)
    for name in [flags.preset] if flags.preset else PRESETS:
        show_counts(name)
    show_64_times(PRESETS["paper"].unet)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        sys.exit(2)
