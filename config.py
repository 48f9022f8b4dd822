"""The sizes of MagicVideo: one dataclass that joins those of its parts, three presets of it, and its JSON form."""

from dataclasses import asdict, dataclass, field, replace

from clip_text import CLIPTextConfig
from diffusion import DiffusionConfig
from unet3d import UNetConfig
from vae import VAEConfig


@dataclass
class MagicVideoConfig:
    """Sizes of all parts; the defaults are the paper's: Stable Diffusion 1.x on 16 frames of 256 x 256."""

    size: int = 256  # height and width of a frame, in pixels
    pretrained: bool = False  # started from Stable Diffusion: text encoder and VAE encoder stay as they are
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    # super-resolution, in pixels: what the enlarged small frame lacks, noisy, and beside it that frame (sizes ours)
    upscale: UNetConfig = field(default_factory=lambda: UNetConfig(
        in_channels=6, out_channels=3, channels=(64, 128, 256, 512), attention=(False,) * 4, frames=0,
        noise_level=True))
    later: tuple[str, ...] = ()  # the networks after the key frames that it has: "interpolate", "upscale"


PRESETS = {
    # the shapes demo: 8 frames of 64 x 64, trained from nothing on two CPU cores (sizes measured: docs/measurements.md)
    "tiny": MagicVideoConfig(
        size=64,
        text=CLIPTextConfig(vocab_size=640, context_length=16, width=96, layers=2, heads=4),
        vae=VAEConfig(channels=(16, 16, 32, 64), layers=1, groups=8),
        unet=UNetConfig(channels=(48, 64), attention=(True, True), layers=1, heads=2, groups=8, context_width=96,
                        frames=8),
        diffusion=DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction", frame_lag=100,
                                  guidance_power=5.0, guidance_rescale=1.0),
        upscale=UNetConfig(in_channels=6, out_channels=3, channels=(16, 32, 64), attention=(False,) * 3, layers=1,
                           heads=2, groups=8, context_width=96, frames=0, noise_level=True),
    ),
    # one GPU, from scratch on people's own clips: 16 frames of 128 x 128
    "small": MagicVideoConfig(
        size=128,
        text=CLIPTextConfig(vocab_size=8192, width=512, layers=6, heads=8),
        vae=VAEConfig(channels=(64, 128, 256, 256)),
        unet=UNetConfig(channels=(128, 256, 384, 384), context_width=512),
        upscale=UNetConfig(in_channels=6, out_channels=3, channels=(32, 64, 128, 256), attention=(False,) * 4,
                           context_width=512, frames=0, noise_level=True),
    ),
    "paper": MagicVideoConfig(),
}


def config_from_dict(values: dict) -> MagicVideoConfig:
    """The inverse of `dataclasses.asdict` after a round trip through JSON, which turns tuples into lists."""
    parts = {"text": CLIPTextConfig, "vae": VAEConfig, "unet": UNetConfig, "diffusion": DiffusionConfig,
             "upscale": UNetConfig}
    # models written before there was super-resolution do not say its sizes
    small = {**asdict(PRESETS["tiny"].upscale), "context_width": values["unet"]["context_width"]}
    values = {"upscale": small, **values}
    made = {name: part(**{key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()})
            for name, part in parts.items()}
    return replace(MagicVideoConfig(**made), size=values["size"], pretrained=values.get("pretrained", False),
                   later=tuple(values.get("later", ())))
