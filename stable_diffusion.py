"""Reads Stable Diffusion 1.x from a folder in diffusers' layout (paper §3: MagicVideo starts from an image model).

Names, shapes and numbers of our image parts are Stable Diffusion's, so that reading it is checking: every weight has
its place, with the shape that the folder's config.json says, or the folder is refused.
"""

import json
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from clip_text import CLIPTextConfig, Tokenizer
from config import MagicVideoConfig
from data import InputError
from unet3d import UNetConfig
from vae import VAEConfig

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
            upscale=replace(MagicVideoConfig().upscale, context_width=text["hidden_size"]),
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
