"""MagicVideo, the whole as one object: prompts -> text encoder -> 3D U-Net under diffusion -> VideoVAE -> clips.

The five files it joins are one idea each: `clip_text.py`, `vae.py`, `unet3d.py`, `diffusion.py`, and `data.py` for the
captions that the smallest tokenizer is learned from; `cascade.py` has what follows the key frames, `config.py` all
sizes. Read `cascade.py` next: what follows the key frames.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from cascade import FACTOR, interpolate, interpolation_config, later_diffusion, start_interpolation, upscale
from clip_text import CLIPTextEncoder, Tokenizer
from config import PRESETS, MagicVideoConfig, config_from_dict
from data import InputError, shape_captions
from diffusion import SAMPLERS, Diffusion
from stable_diffusion import SD_PARTS, is_new_part, load_part, read_stable_diffusion
from unet3d import UNet3D
from vae import VideoVAE


class MagicVideo(nn.Module):
    """Text to video by latent diffusion (paper §3): `.tokenizer .text_encoder .vae .unet .diffusion`.

    What follows the key frames is None until it is trained: `.interpolator .upscaler` (see `cascade.py`).
    """

    def __init__(self, config: MagicVideoConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextEncoder(config.text)
        self.vae = VideoVAE(config.vae)
        self.unet = UNet3D(config.unet)
        self.diffusion = Diffusion(config.diffusion)
        self.later_diffusion = later_diffusion(config.diffusion)
        later = config.later
        self.interpolator = UNet3D(interpolation_config(config.unet)) if "interpolate" in later else None
        self.upscaler = UNet3D(config.upscale) if "upscale" in later else None

    def add_later(self, stage: str) -> None:
        """Gives the model the network of a later stage, "interpolate" or "upscale", untrained, if it has none."""
        if stage in self.config.later:
            return
        self.config.later = (*self.config.later, stage)
        if stage == "interpolate":
            self.interpolator = start_interpolation(self.unet)
        else:
            self.upscaler = UNet3D(self.config.upscale).to(self.device)

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

    def sample(self, prompts: str | list[str], fps: float | None = 8, steps: int = 50, guidance: float = 7.5,
               sampler: str = "ddim", seed: int = 0, eta: float = 0.0, frames: int | None = None,
               progress: Callable = lambda steps: steps) -> Tensor:
        """Prompts -> clips (b, f, 3, h, w) in [-1, 1] (paper §3; sampler, steps and guidance are SD's).

        Settings: `sample_latents` (fps, seed, frames), `Diffusion.sample` (sampler, steps, guidance, eta).
        """
        return self.decode(self.sample_latents(prompts, fps, steps, guidance, sampler, seed, eta, frames, progress))

    @torch.no_grad()
    def sample_latents(self, prompts: str | list[str], fps: float | None = 8, steps: int = 50, guidance: float = 7.5,
                       sampler: str = "ddim", seed: int = 0, eta: float = 0.0, frames: int | None = None,
                       progress: Callable = lambda steps: steps) -> Tensor:
        """Prompts -> the latents of clips (b, f, 4, h/8, w/8), the key frames.

        Clip i is drawn with seed + i, so it is the same alone or in a batch. Without fps the image model draws single
        pictures (b, 1, 4, h/8, w/8). `progress` wraps the list of steps.
        Raises InputError for values out of range, and for a number of frames that the adaptors were not trained for.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        trained = self.config.unet.frames
        if frames not in (None, trained):
            raise InputError(f"--frames {frames}: this model makes {trained} frames, since its adaptors hold one scale "
                             f"and shift for each frame (paper §3.2.1); leave it out, or train with --frames {frames}")
        most = self.config.diffusion.steps
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
        return self.diffusion.sample(
            self.unet, shape, context, uncond, rate, sampler, steps, guidance, eta, generators, progress)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (b, f, 4, h/8, w/8) -> clips (b, f, 3, h, w) in [-1, 1]."""
        # clip by clip: at 16 x 256 x 256 the decoder needs gigabytes for each
        return torch.cat([self.vae.decode(z).clamp(-1, 1) for z in latents.split(1)])

    @torch.no_grad()
    def interpolate(self, keys: Tensor, prompts: list[str], fps: float, steps: int = 20, seed: int = 0,
                    progress: Callable = lambda steps: steps) -> Tensor:
        """Key latents (b, f, ...) at `fps` -> latents (b, 4f-3, ...) at four times the rate (paper: interpolation).

        Raises InputError for a model without that stage, and for a single key frame.
        """
        self.needs("interpolate", steps)
        if keys.shape[1] < 2:
            raise InputError("--interpolate: one key frame has none beside it; use a model of two frames or more")
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        rate = torch.full((len(prompts),), float(fps), device=self.device)
        return interpolate(self.interpolator, self.later_diffusion, keys, self.encode_text(prompts), rate, steps,
                           generators, progress)

    @torch.no_grad()
    def upscale(self, videos: Tensor, prompts: list[str], steps: int = 4, seed: int = 0, same_noise: bool = False,
                tile: int = 0, progress: Callable = lambda steps: steps) -> Tensor:
        """Clips (b, f, 3, h, w) in [-1, 1] -> (b, f, 3, 4h, 4w), see `cascade.upscale` (paper: super-resolution).

        Raises InputError for a model without that stage, for tiles it cannot halve, and where memory is too small.
        """
        self.needs("upscale", steps, tile)
        clips = []
        for i, (video, context) in enumerate(zip(videos, self.encode_text(prompts).split(1))):
            try:
                clips.append(upscale(self.upscaler, self.later_diffusion, video, context, steps, seed + i, same_noise,
                                     tile, progress))
            except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, "can't allocate memory" on a CPU
                if "memory" not in str(error):
                    raise
                smaller = max(tile // 2, 64) if tile else 256
                raise InputError(f"--upscale: {FACTOR * video.shape[-1]} x {FACTOR * video.shape[-2]} pixels do not "
                                 f"fit the memory; add --tile {smaller}") from error
        return torch.stack(clips)

    def needs(self, stage: str, steps: int, tile: int = 0) -> None:
        """Raises InputError if the model has no such later stage, or for settings of it that are out of range."""
        if stage not in self.config.later:
            raise InputError(f"--{stage}: this model has no such stage; train it: python train.py --stage {stage} "
                             f"--init-from MODEL.pt")
        if not 1 <= steps <= self.config.diffusion.steps:
            raise InputError(f"--{stage}-steps {steps}: give a number from 1 to {self.config.diffusion.steps}")
        factor = 2 ** (len(self.config.upscale.channels) - 1)  # the network halves a tile so often
        if tile % factor or tile < 0:
            raise InputError(f"--tile {tile}: give a multiple of {factor}")

    def save(self, path: str | Path, dtype: torch.dtype | None = None, made_by: str = "") -> None:
        """Writes weights, sizes and tokenizer to one file; the old file stays whole until the new one is.

        float16 as `dtype` halves the file, and `load` makes float32 of it again; `made_by` says how the model came to
        be and is kept beside it.
        """
        contents = self.contents()
        if dtype:
            contents["weights"] = {name: weight.to(dtype) for name, weight in contents["weights"].items()}
        write_checkpoint(path, {"format": "magicvideo", "made_by": made_by, "model": contents})

    @classmethod
    def from_stable_diffusion(cls, folder: str | Path, frames: int = 16) -> "MagicVideo":
        """The image model in a diffusers-layout SD 1.x folder, ready for clips of `frames` (paper §3: image start).

        Sizes come from its config.json files, frames are 256 x 256 as in the paper, or the folder's own size where that
        is less. The new parts start without effect: each frame is SD's. Raises InputError for what is not such a
        folder, and for a weight that is missing, left over or of another shape.
        """
        folder = Path(folder)
        model = cls(*read_stable_diffusion(folder, frames))
        loaded = sum(load_part(getattr(model, part), folder / part) for part in SD_PARTS)
        new = sum(p.numel() for name, p in model.named_parameters() if is_new_part(name))
        print(f"{folder}: {loaded:,} parameters of Stable Diffusion loaded; {new:,} new ones (adaptors, temporal "
              f"attention, FPS) start with zero effect")
        return model.eval()

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "MagicVideo":
        """The model that `save` wrote, or in a Stable Diffusion folder, on `device`.

        Raises InputError for a file or folder that is not one, or not whole.
        """
        if Path(path).is_dir() or Path(path).suffix in (".safetensors", ".ckpt"):  # the latter are refused in words
            return cls.from_stable_diffusion(path).to(device)
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
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise InputError(f"{path}: its weights are of another size or version than this code "
                             f"({str(error).splitlines()[0]}); train again or use the code that wrote it") from error
        return model.eval()


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the best there is: cuda, mps, cpu. Raises InputError for one that is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name and name.split(":")[0] not in there:
        raise InputError(f"--device {name}: not on this machine; use {' or '.join(there)}")
    return torch.device(name or there[0])


# ----------------------------------------------------------------------------------------------------------------------
# Files


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


def read_checkpoint(path: str | Path, kind: str, mmap: bool = False) -> dict:
    """What `write_checkpoint` wrote, on the CPU; runs no code from the file (weights_only).

    With `mmap` the numbers stay in the file until they are asked for.

    Raises InputError for a file that is missing, truncated, or not of this kind.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: there is no such file; give a model.pt that train.py wrote")
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch has many for a damaged file
        raise InputError(f"{path}: not a checkpoint, or cut off; give a model.pt that train.py wrote") from error
    if not isinstance(contents, dict) or contents.get("format") != kind:
        raise InputError(f'{path}: not a "{kind}" file; sample.py reads model.pt, --resume reads checkpoint.pt')
    return contents
