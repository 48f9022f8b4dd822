"""MagicVideo, the whole as one object: prompts -> text encoder -> 3D U-Net under diffusion -> VideoVAE -> clips.

The five files it joins are one idea each: `clip_text.py`, `vae.py`, `unet3d.py`, `diffusion.py`, and `data.py` for the
captions that the smallest tokenizer is learned from. Read `train.py` and `sample.py` next: how it is made and used.
"""

import copy
import json
import os
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
    pretrained: bool = False  # started from Stable Diffusion: text encoder and VAE encoder stay as they are
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
        unet=UNetConfig(channels=(48, 64), attention=(True, True), layers=1, heads=2, groups=8, context_width=96,
                        frames=8),
        diffusion=DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction", frame_lag=100,
                                  guidance_power=5.0, guidance_rescale=1.0),
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
               sampler: str = "ddim", seed: int = 0, eta: float = 0.0, frames: int | None = None,
               progress: Callable = lambda steps: steps) -> Tensor:
        """Prompts -> clips (b, f, 3, h, w) in [-1, 1] (paper §3; sampler, steps and guidance are SD's).

        Clip i is drawn with seed + i, so it is the same alone or in a batch. Without fps the image model draws single
        pictures (b, 1, 3, h, w). `progress` wraps the list of steps.
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
        latents = self.diffusion.sample(
            self.unet, shape, context, uncond, rate, sampler, steps, guidance, eta, generators, progress)
        # clip by clip: at 16 x 256 x 256 the decoder needs gigabytes for each
        return torch.cat([self.vae.decode(z).clamp(-1, 1) for z in latents.split(1)])

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


def config_from_dict(values: dict) -> MagicVideoConfig:
    """The inverse of `dataclasses.asdict` after a round trip through JSON, which turns tuples into lists."""
    parts = {"text": CLIPTextConfig, "vae": VAEConfig, "unet": UNetConfig, "diffusion": DiffusionConfig}
    made = {name: part(**{key: tuple(v) if isinstance(v, list) else v for key, v in values[name].items()})
            for name, part in parts.items()}
    return replace(MagicVideoConfig(**made), size=values["size"], pretrained=values.get("pretrained", False))


# ----------------------------------------------------------------------------------------------------------------------
# Stable Diffusion's folders (the layout of diffusers)

SD_PARTS = ("text_encoder", "vae", "unet")  # folders there, attributes here
SD_SOURCE = "get a diffusers-layout Stable Diffusion 1.x folder, stable-diffusion-v1-5 for example"
# what our modules are written for, where a config.json can say otherwise
SD_FIXED = {
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "out_channels": 4,
             "in_channels": 4, "use_linear_projection": False, "dual_cross_attention": False, "downsample_padding": 1,
             "only_cross_attention": False, "class_embed_type": None, "addition_embed_type": None},
    "vae": {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
# names of the VAE's attention in files written before May 2023
SD_OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def is_new_part(name: str) -> bool:
    """Whether a parameter of that name is MagicVideo's own, one that Stable Diffusion does not have."""
    return any(part in name for part in ("adaptor", "temporal", "fps_embedding"))


def read_stable_diffusion(folder: Path, frames: int) -> tuple[MagicVideoConfig, Tokenizer]:
    """Sizes and tokenizer of a Stable Diffusion 1.x folder; InputError, with what to get instead, for another one."""
    if not folder.is_dir():
        what = "one file; this reads folders" if folder.is_file() else "there is no such folder"
        raise InputError(f"{folder}: {what}; {SD_SOURCE} (diffusers' from_single_file and save_pretrained make one of "
                         f"a single file)")
    if (folder / "text_encoder_2").is_dir():
        raise InputError(f"{folder}: two text encoders, so SDXL or later; {SD_SOURCE}")
    read = {part: read_json(folder / part / "config.json") for part in SD_PARTS}
    for part, fixed in SD_FIXED.items():
        for key, value in fixed.items():
            if read[part].get(key, value) != value:
                raise InputError(f"{folder}/{part}/config.json: {key} is {read[part][key]!r}, in Stable Diffusion 1.x "
                                 f"it is {value!r}; {SD_SOURCE}")
    unet, vae, text = read["unet"], read["vae"], read["text_encoder"]
    try:
        heads, channels = unet["attention_head_dim"], tuple(vae["block_out_channels"])
        if not isinstance(heads, int) or unet["cross_attention_dim"] != text["hidden_size"]:
            raise InputError(f"{folder}: its U-Net is of another generation (attention_head_dim {heads}, text width "
                             f"{unet['cross_attention_dim']}); {SD_SOURCE}")
        config = MagicVideoConfig(
            size=min(256, unet["sample_size"] * 2 ** (len(channels) - 1)), pretrained=True,
            text=CLIPTextConfig(text["vocab_size"], text["max_position_embeddings"], text["hidden_size"],
                                text["num_hidden_layers"], text["num_attention_heads"]),
            vae=VAEConfig(channels, vae["latent_channels"], vae["layers_per_block"], vae["norm_num_groups"],
                          vae.get("scaling_factor", 0.18215)),
            unet=UNetConfig(unet["in_channels"], unet["out_channels"], tuple(unet["block_out_channels"]),
                            tuple(kind.startswith("CrossAttn") for kind in unet["down_block_types"]),
                            unet["layers_per_block"], heads, unet["norm_num_groups"], unet["cross_attention_dim"],
                            frames))
        tokenizer = Tokenizer.from_clip(folder / "tokenizer", config.text.context_length)
    except KeyError as error:
        raise InputError(f"{folder}: a config.json has no {error}; {SD_SOURCE}") from error
    except (FileNotFoundError, ValueError) as error:
        raise InputError(str(error)) from error
    if tokenizer.vocab_size != config.text.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} symbols, the text encoder "
                         f"{config.text.vocab_size}; take both from one model")
    return config, tokenizer


def load_part(module: nn.Module, folder: Path) -> int:
    """Fills a module from a folder's weights, strictly, and returns how many parameters: only new parts may be missing.

    Raises InputError for a weight that is missing, left over or of another shape.
    """
    given, ours = {}, module.state_dict()
    for name, weight in read_weights(folder).items():
        for old, new in SD_OLD_NAMES.items():
            name = name.replace(old, new)
        if folder.name == "text_encoder" and not name.startswith("text_model."):
            name = "text_model." + name  # as transformers 5 writes it
        if name in ours and weight.shape == (*ours[name].shape, 1, 1):
            weight = weight[..., 0, 0]  # old VAE attentions are 1x1 convolutions
        given[name] = weight
    given.pop("text_model.embeddings.position_ids", None)  # 0 .. 76, in older files
    missing = [name for name in ours if name not in given and not is_new_part(name)]
    over = [name for name in given if name not in ours]
    other = [name for name in given if name in ours and given[name].shape != ours[name].shape]
    if missing or over or other:
        name = (missing + over + other)[0]
        raise InputError(f"{folder}: {len(missing)} weights missing, {len(over)} left over, {len(other)} of another "
                         f"shape than its config.json says, {name} first; {SD_SOURCE}")
    module.load_state_dict(given, strict=False)  # what is not given was checked above
    return sum(weight.numel() for weight in given.values())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a part: one file or shards with their index, .safetensors or .bin, full precision before fp16."""
    stem = "diffusion_pytorch_model", "model", "pytorch_model"
    names = [f"{name}{variant}.{kind}" for variant in ("", ".fp16") for kind in ("safetensors", "bin") for name in stem]
    names += [f"{name}.{kind}.index{variant}.json" for variant in ("", ".fp16") for kind in ("safetensors", "bin")
              for name in stem]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise InputError(f"{folder}: no weights (.safetensors or .bin) here; {SD_SOURCE}")
    if file.suffix != ".json":
        return read_tensors(file)
    shards = sorted(set(read_json(file).get("weight_map", {}).values()))
    return {name: tensor for shard in shards for name, tensor in read_tensors(folder / Path(shard).name).items()}


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one .safetensors or .bin, on the CPU; no code in the file is run. InputError if it is damaged."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise InputError(f"{file}: .safetensors files need a package: pip install safetensors") from error
    except Exception as error:  # safetensors and torch have many for a damaged file
        raise InputError(f"{file}: missing, damaged or cut off ({str(error).splitlines()[0][:80]}); download it "
                         f"again") from error


def read_json(file: Path) -> dict:
    """A JSON object; InputError if the file is missing or holds something else."""
    try:
        contents = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{file}: there is no such file; {SD_SOURCE}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not JSON ({error}); download it again") from error
    if not isinstance(contents, dict):
        raise InputError(f"{file}: not a JSON object; download it again")
    return contents


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
