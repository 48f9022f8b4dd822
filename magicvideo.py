"""MagicVideo (paper §3): all parts assembled into one model.

prompts -> CLIP text encoder -> 3D U-Net under diffusion -> VideoVAE -> clips. Read `cascade.py`
next: what comes after the key frames.
"""

import copy
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from clip_text import CLIPTextConfig, CLIPTextEncoder, Tokenizer
from data import shape_captions
from diffusion import Diffusion, DiffusionConfig
from runs import InputError, load_checkpoint, save_checkpoint
from stable_diffusion import load_weights, read_sizes
from tiny import StaggeredDiffusion, VPrediction
from unet3d import UNet3D, UNetConfig
from vae import VAEConfig, VideoVAE


@dataclass
class MagicVideoConfig:
    """Sizes of all parts; the defaults are the paper's, SD 1.x with 16 frames of 256 x 256."""

    preset: str = "paper"  # the training settings that suit the model, see train.py
    size: int = 256  # height and width of a frame, in pixels
    guidance: float = 7.5  # defaults of sample.py
    steps: int = 50
    pretrained: bool = False  # from SD: its text encoder and its VAE are never trained
    v_prediction: bool = False  # a model from SD whose network predicts v, see tiny.py
    staggered: bool = False  # frames are denoised one after another, see tiny.py
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)


PRESETS = {
    # the shapes demo: 8 frames of 64 x 64, trained from scratch on two CPU cores
    "tiny": MagicVideoConfig(
        preset="tiny", size=64, guidance=2.0, steps=20, staggered=True,
        text=CLIPTextConfig(vocab_size=640, context_length=16, width=96, layers=2, heads=4),
        vae=VAEConfig(channels=(16, 16, 32, 64), layers=1, groups=8),
        unet=UNetConfig(channels=(48, 64), attention=(True, True), layers=1, heads=2, groups=8,
                        context_width=96, frames=8)),
    # own clips on a laptop: 8 frames of 64 x 64 with faces, and more words
    "laptop": MagicVideoConfig(
        preset="laptop", size=64, guidance=2.0, staggered=True,
        text=CLIPTextConfig(vocab_size=4096, context_length=16, width=192, layers=2, heads=6),
        vae=VAEConfig(channels=(16, 32, 64, 64), layers=1, groups=8),
        unet=UNetConfig(channels=(64, 96), attention=(True, True), layers=1, heads=4, groups=8,
                        context_width=192, frames=8)),
    # one GPU, from scratch, on people's own clips: 16 frames of 128 x 128
    "small": MagicVideoConfig(
        preset="small", size=128,
        text=CLIPTextConfig(vocab_size=8192, width=512, layers=6, heads=8),
        vae=VAEConfig(channels=(64, 128, 256, 256)),
        unet=UNetConfig(channels=(128, 256, 384, 384), context_width=512)),
    "paper": MagicVideoConfig(),
}


def config_of(values: dict) -> MagicVideoConfig:
    """Make the config that `asdict` and JSON made these values of."""
    parts = {"text": CLIPTextConfig, "vae": VAEConfig, "unet": UNetConfig,
             "diffusion": DiffusionConfig}
    for name, part in parts.items():
        values[name] = part(**{key: tuple(value) if isinstance(value, list) else value
                               for key, value in values[name].items()})
    return MagicVideoConfig(**values)


VERSION = 1  # of the format of files
# what sizes and weights that do not fit each other make of building a model
DAMAGE = (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError, MemoryError,
          OverflowError, ZeroDivisionError)


class MagicVideo(nn.Module):
    """Text to video (paper §3): `.tokenizer .text_encoder .vae .unet .diffusion`.

    `.cascade` keeps the saved networks of `cascade.py` by stage; they are built when they are used.
    """

    def __init__(self, config: MagicVideoConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextEncoder(config.text)
        self.vae = VideoVAE(config.vae)
        self.unet = UNet3D(config.unet)
        diffusion = VPrediction if config.v_prediction else Diffusion
        diffusion = StaggeredDiffusion if config.staggered else diffusion
        self.diffusion = diffusion(config.diffusion)
        self.cascade: dict[str, dict] = {}

    @classmethod
    def from_preset(cls, name: str, frames: int | None = None,
                    captions: list[str] | None = None) -> "MagicVideo":
        """Build an untrained model; its tokenizer learns from `captions` or the shapes' own.

        The context grows with the longest caption, to 77 tokens at most (CLIP's length).
        """
        config = copy.deepcopy(PRESETS[name])
        config.unet.frames = frames or config.unet.frames
        captions = captions or shape_captions("train")
        tokenizer = Tokenizer.train(captions, config.text.vocab_size)
        longest = max(len(tokenizer.encode(caption)) for caption in captions) + 2
        config.text.context_length = max(config.text.context_length, min(longest, 77))
        tokenizer.context_length = config.text.context_length
        return cls(config, tokenizer)

    @classmethod
    def from_stable_diffusion(cls, folder: str | Path, frames: int = 16) -> "MagicVideo":
        """Load a diffusers-layout SD 1.x folder; video parts start without effect (paper §3).

        Frames are 256 x 256 as in the paper, or smaller where the folder's are. Raises InputError
        for another folder, or a weight missing, left over or of another shape.
        """
        sizes, tokenizer = read_sizes(Path(folder), frames)
        model = cls(MagicVideoConfig(pretrained=True, **sizes), tokenizer)
        load_weights(model, Path(folder))
        return model.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.unet.conv_in.weight.device

    def encode_text(self, captions: list[str]) -> Tensor:
        """Encode captions for cross-attention, (b, l, d); "" is the unconditional branch (§3)."""
        return self.text_encoder(self.tokenizer(captions).to(self.device))

    @torch.no_grad()
    def sample(self, prompts: str | list[str], fps: float | None = 8, steps: int | None = None,
               guidance: float | None = None, sampler: str = "ddim", seed: int = 0,
               decode: bool = True) -> Tensor:
        """Sample a clip (f, 3, h, w) in [-1, 1] for each prompt, or its latents, not decoded (§3).

        Clip i has seed + i, and so is the same alone or in a batch. Without fps the image model
        draws single frames. Steps and guidance are by default the model's own.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        side = self.config.size // 2 ** (len(self.config.vae.channels) - 1)
        frames = 1 if fps is None else self.config.unet.frames
        shape = (len(prompts), frames, self.config.vae.latent_channels, side, side)
        context = self.encode_text(prompts)
        uncond = self.encode_text([""] * len(prompts))
        if fps is not None:
            fps = torch.full((len(prompts),), float(fps), device=self.device)
        steps = self.config.steps if steps is None else steps
        guidance = self.config.guidance if guidance is None else guidance
        weight = self.unet.conv_in.weight

        def network(z: Tensor, t: Tensor, context: Tensor, fps: Tensor | None) -> Tensor:
            """Call the U-Net, whose weights may be bfloat16; latents stay float32."""
            return self.unet(z.to(weight), t, context.to(weight), fps).to(z)

        z = self.diffusion.sample(network, shape, context, uncond, fps, sampler, steps, guidance,
                                  generator=generators)
        return self.decode(z) if decode else z

    @torch.no_grad()
    def encode(self, videos: Tensor) -> Tensor:
        """Encode clips (b, f, 3, h, w) to scaled posterior means (paper §3; SD draws samples)."""
        mean, _ = self.vae.encode(videos.to(self.vae.encoder.conv_in.weight))
        return self.config.vae.scaling_factor * mean

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (b, f, 4, h/8, w/8) to clips (b, f, 3, h, w) in [-1, 1]."""
        # clip by clip: at 16 x 256 x 256 the decoder needs gigabytes for each
        return torch.cat([self.vae.decode(z).clamp(-1, 1) for z in latents.split(1)])

    # ----------------------------------------------------------------------------------------------
    # Files

    def state(self) -> dict:
        """Return what `from_state` needs, tensors and strings alone: loading runs no code."""
        merges = [" ".join(pair) for pair in self.tokenizer.merges]
        return {"version": VERSION, "config": json.dumps(asdict(self.config)), "merges": merges,
                "weights": self.state_dict(), "cascade": self.cascade}

    @classmethod
    def from_state(cls, state: dict, path: str | Path) -> "MagicVideo":
        """Build the model of `state`, read from `path`. Raises InputError if it does not fit."""
        try:
            if state.get("version", 1) != VERSION:
                raise InputError(f"{path}: made by another version of this code (its format is "
                                 f"{state['version']}, this code reads {VERSION}); train again")
            config = config_of(json.loads(state["config"]))
            merges = [tuple(pair.split(" ")) for pair in state["merges"]]
            model = cls(config, Tokenizer(merges, config.text.context_length))
            model.load_state_dict(state["weights"])
            model.cascade = dict(state["cascade"])
        except DAMAGE as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{path}: damaged, its parts do not fit each other ({reason}); train "
                             f"again") from error
        return model.eval()

    def save(self, path: str | Path) -> None:
        """Write weights, sizes and tokenizer to one file."""
        save_checkpoint(path, {"format": "magicvideo", "model": self.state()})

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu",
             frames: int | None = None) -> "MagicVideo":
        """Load a model.pt, the folder of a run, or a Stable Diffusion folder, else InputError."""
        path = Path(path)
        if (path / "model.pt").is_file():
            path = path / "model.pt"
        if path.is_dir():
            return cls.from_stable_diffusion(path, frames or 16).to(device)
        model = cls.from_state(load_checkpoint(path, "magicvideo").get("model"), path).to(device)
        if frames not in (None, model.config.unet.frames):
            raise InputError(f"--frames {frames}: {path} makes {model.config.unet.frames}, and its "
                             f"adaptors hold one scale and shift for each; leave it out")
        return model
