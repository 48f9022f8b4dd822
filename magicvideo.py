"""MagicVideo, the whole as one object: prompts -> text encoder -> 3D U-Net under diffusion -> VideoVAE -> clips.

The five files it joins are one idea each: `clip_text.py`, `vae.py`, `unet3d.py`, `diffusion.py`, and `data.py` for the
captions that the smallest tokenizer is learned from. Read `train.py` and `sample.py` next: how it is made and used.
"""

import copy
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from data import InputError, shape_captions
from diffusion import SAMPLERS, Diffusion, DiffusionConfig
from unet3d import UNet3D, UNetConfig
from vae import VAEConfig, VideoVAE


@dataclass
class MagicVideoConfig:
    """Sizes of all parts; the defaults are the paper's: Stable Diffusion 1.x on 16 frames of 256 x 256."""

    size: int = 256  # height and width of a frame, in pixels
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


PRESETS = {
    # the shapes demo: 8 frames of 64 x 64, trained from nothing on two CPU cores (sizes measured, see README)
    "tiny": MagicVideoConfig(
        size=64,
        text=CLIPTextConfig(vocab_size=640, context_length=16, width=96, layers=2, heads=4),
        vae=VAEConfig(channels=(16, 16, 32, 64), layers=1, groups=8),
        unet=UNetConfig(channels=(48, 64), attention=(True, True), layers=1, heads=4, groups=8, context_width=96,
                        frames=8),
        diffusion=DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction", time_shift=2.0, eta=1.0,
                                  guidance_rescale=0.8),
    ),
    # one GPU, from scratch on people's own clips: 16 frames of 128 x 128
    "small": MagicVideoConfig(
        size=128,
        text=CLIPTextConfig(vocab_size=8192, width=512, layers=6, heads=8),
        vae=VAEConfig(channels=(64, 128, 256, 256)),
        unet=UNetConfig(channels=(128, 256, 384, 384), context_width=512),
    ),
    "paper": MagicVideoConfig(),
}


class MagicVideo(nn.Module):
    """Text to video by latent diffusion (paper §3): `.tokenizer .text_encoder .vae .unet .diffusion`."""

    def __init__(self, config: MagicVideoConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextEncoder(config.text)
        self.vae = VideoVAE(config.vae)
        self.unet = UNet3D(config.unet)
        self.diffusion = Diffusion(config.diffusion)

    @classmethod
    def from_preset(cls, name: str, frames: int | None = None, captions: list[str] | None = None) -> "MagicVideo":
        """An untrained model of preset "tiny", "small" or "paper", with the preset's number of frames unless given.

        Its tokenizer learns its merges from `captions`, by default those of the shapes data set. Raises InputError for
        a preset that does not exist.
        """
        if name not in PRESETS:
            raise InputError(f'there is no preset "{name}": use {", ".join(PRESETS)}')
        config = copy.deepcopy(PRESETS[name])
        if frames:
            config.unet.frames = frames
        captions = captions or shape_captions("train")
        return cls(config, Tokenizer.train(captions, config.text.vocab_size, config.text.context_length))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.conv_in.weight.device

    def encode_text(self, captions: list[str]) -> Tensor:
        """Captions -> what the U-Net's cross-attention reads, (b, l, d); "" is the unconditional branch of guidance."""
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    @torch.no_grad()
    def sample(self, prompts: str | list[str], fps: float | None = 8, steps: int = 50, guidance: float = 7.5,
               sampler: str = "ddim", seed: int = 0, eta: float | None = None, frames: int | None = None,
               progress: Callable = lambda steps: steps) -> Tensor:
        """Prompts -> clips (b, f, 3, h, w) in [-1, 1] (paper §3; sampler, steps and guidance are SD's).

        Clip i is drawn with seed + i, so it is the same alone or in a batch. Without fps the image model draws single
        pictures (b, 1, 3, h, w); without eta the preset's own is taken. `progress` wraps the list of steps.
        Raises InputError for values out of range, and for a number of frames that the adaptors were not trained for.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        trained = self.config.unet.frames
        if frames not in (None, trained):
            raise InputError(f"--frames {frames}: this model makes {trained} frames, since its adaptors hold one scale "
                             f"and shift for each frame (paper §3.2.1); leave it out, or train with --frames {frames}")
        eta, most = self.config.diffusion.eta if eta is None else eta, self.config.diffusion.steps
        ranges = {"--fps": (8 if fps is None else fps, 0.1, 1000), "--steps": (steps, 1, most),
                  "--guidance": (guidance, -1000, 1000), "--eta": (eta, 0, 1), "--seed": (seed, 0, 2**62)}
        for flag, (value, low, high) in ranges.items():
            if not low <= value <= high:
                raise InputError(f"{flag} {value}: give a number from {low} to {high}")
        if sampler not in SAMPLERS:
            raise InputError(f'--sampler "{sampler}": use {" or ".join(SAMPLERS)}')
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        side = self.config.size // 2 ** (len(self.config.vae.channels) - 1)
        shape = (len(prompts), 1 if fps is None else trained, self.config.vae.latent_channels, side, side)
        context, uncond = self.encode_text(prompts), self.encode_text([""] * len(prompts))
        rate = None if fps is None else torch.full((len(prompts),), float(fps), device=self.device)
        latents = self.diffusion.sample(
            self.unet, shape, context, uncond, rate, sampler, steps, guidance, eta, generators, progress)
        return self.vae.decode(latents).clamp(-1, 1)

    def save(self, path: str | Path) -> None:
        """Writes weights, sizes and tokenizer to one file; the old file stays whole until the new one is."""
        write_checkpoint(path, {"format": "magicvideo", "model": self.contents()})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "MagicVideo":
        """The model that `save` wrote, on `device`. Raises InputError for a file that is not one, or not whole."""
        return cls.from_contents(read_checkpoint(path, "magicvideo")["model"], path).to(device)

    def contents(self) -> dict:
        """Everything `from_contents` needs: plain tensors, strings and lists, so that loading runs no code."""
        return {"config": json.dumps(asdict(self.config)), "merges": [" ".join(pair) for pair in self.tokenizer.merges],
                "weights": self.state_dict()}

    @classmethod
    def from_contents(cls, contents: dict, path: str | Path) -> "MagicVideo":
        """The model of `contents`; `path` names the file in errors. Raises InputError if sizes and weights differ."""
        try:
            config = config_from_dict(json.loads(contents["config"]))
            tokenizer = Tokenizer([tuple(pair.split(" ")) for pair in contents["merges"]], config.text.context_length)
            model = cls(config, tokenizer)
            model.load_state_dict(contents["weights"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path}: its weights are of another size or version than this code "
                             f"({str(error).splitlines()[0]}); train again or use the code that wrote it") from error
        return model.eval()


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is: cuda, mps, cpu. Raises InputError for one that is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name and name.split(":")[0] not in there:
        raise InputError(f"--device {name}: not on this machine; use {' or '.join(there)}")
    return torch.device(name or there[0])


def config_from_dict(values: dict) -> MagicVideoConfig:
    """The inverse of `dataclasses.asdict` after a round trip through JSON, which turns tuples into lists."""
    parts = {"text": CLIPTextConfig, "vae": VAEConfig, "unet": UNetConfig, "diffusion": DiffusionConfig}
    made = {name: part(**{key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()})
            for name, part in parts.items()}
    return replace(MagicVideoConfig(**made), size=values["size"])


def write_checkpoint(path: str | Path, contents: dict) -> None:
    """Saves to a temporary name, flushes, renames: whatever happens, `path` is the old file or the new one, whole.

    Raises InputError where it cannot be written, a full disk for example.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(contents, temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path} could not be written ({str(error).splitlines()[0]}); what was saved before is whole: "
                         f"make room on the disk or choose another --out") from error


def read_checkpoint(path: str | Path, kind: str) -> dict:
    """What `write_checkpoint` wrote, on the CPU; runs no code from the file (weights_only).

    Raises InputError for a file that is missing, truncated, or not of this kind.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file; give a model.pt that train.py wrote")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: not a checkpoint, or cut off; give a model.pt that train.py wrote") from error
    if not isinstance(contents, dict) or contents.get("format") != kind:
        raise InputError(f'{path}: not a "{kind}" file; sample.py reads model.pt, --resume reads checkpoint.pt')
    return contents
