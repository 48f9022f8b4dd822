"""Reads a Stable Diffusion 1.x folder in diffusers' layout (paper §3: start from an image model).

Names, shapes and numbers of our image parts are Stable Diffusion's, so that reading it is checking:
every weight has its place, with the shape that the folder's config.json says, or it is refused.
"""

import json
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from clip_text import CLIPTextConfig, Tokenizer
from diffusion import DiffusionConfig
from runs import InputError
from unet3d import UNetConfig, is_video_parameter
from vae import VAEConfig

PARTS = ("text_encoder", "vae", "unet")  # folders there, attributes here
REMEDY = "get a diffusers-layout Stable Diffusion 1.x folder, stable-diffusion-v1-5 for example"
# what our modules are written for, where a config.json can say otherwise
FIXED = {
    "unet": {"act_fn": "silu", "norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0,
             "out_channels": 4, "in_channels": 4, "use_linear_projection": False,
             "dual_cross_attention": False, "downsample_padding": 1, "only_cross_attention": False,
             "class_embed_type": None, "addition_embed_type": None},
    "vae": {"act_fn": "silu", "in_channels": 3, "out_channels": 3, "use_quant_conv": True},
    "text_encoder": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    "scheduler": {"beta_schedule": "scaled_linear", "trained_betas": None,
                  "rescale_betas_zero_snr": False},
}
# names of the VAE's attention in files written before May 2023
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.",
             ".proj_attn.": ".to_out.0."}


def read_sizes(folder: Path, frames: int) -> tuple[dict, Tokenizer]:
    """Read an SD 1.x folder -> the fields of MagicVideoConfig that it decides, and its tokenizer.

    Raises InputError, with what to get, for what is not such a folder.
    """
    try:
        sizes = read_config(folder, frames)
        tokenizer = Tokenizer.from_clip(folder / "tokenizer", sizes["text"].context_length)
    except InputError:
        raise
    except (FileNotFoundError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder}: {type(error).__name__}: {error}; {REMEDY}") from error
    if tokenizer.vocab_size != sizes["text"].vocab_size:
        raise InputError(f"{folder}: the tokenizer has {tokenizer.vocab_size} symbols, the text "
                         f"encoder {sizes['text'].vocab_size}; take both from one model")
    return sizes, tokenizer


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill the image parts of a MagicVideo from an SD 1.x folder, and say how much that is."""
    loaded = sum(load_part(getattr(model, part), folder / part) for part in PARTS)
    new = sum(p.numel() for name, p in model.named_parameters() if is_video_parameter(name))
    print(f"{folder}: {loaded:,} parameters of Stable Diffusion, {new:,} new ones of zero effect")


def read_config(folder: Path, frames: int) -> dict:
    """Read the sizes in the config.json files of an SD 1.x folder, checked against `FIXED`."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; {REMEDY}")
    if (folder / "text_encoder_2").is_dir():
        raise InputError(f"{folder}: two text encoders, so SDXL or later; {REMEDY}")
    files = {part: folder / part / "config.json" for part in PARTS}
    configs = {part: read_json(file) for part, file in files.items()}
    files["scheduler"] = folder / "scheduler" / "scheduler_config.json"  # none is SD's own
    configs["scheduler"] = read_json(files["scheduler"]) if files["scheduler"].exists() else {}
    for part, fixed in FIXED.items():
        for key, value in fixed.items():
            if configs[part].get(key, value) != value:
                raise InputError(f"{files[part]}: {key} is {configs[part][key]!r}, in Stable "
                                 f"Diffusion 1.x it is {value!r}; {REMEDY}")
    text, vae, unet, scheduler = configs.values()
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise InputError(f"{files['scheduler']}: prediction_type is {prediction!r}, known are "
                         f"'epsilon' and 'v_prediction'; {REMEDY}")
    heads = unet["attention_head_dim"]  # means the number of heads in SD 1.x
    vae_channels = tuple(vae["block_out_channels"])
    if not isinstance(heads, int) or unet["cross_attention_dim"] != text["hidden_size"]:
        raise InputError(f"{folder}: its U-Net is of another generation (attention_head_dim "
                         f"{heads}, text width {unet['cross_attention_dim']}); {REMEDY}")
    side = unet.get("sample_size")
    side = side if isinstance(side, int) else 64  # SD's own, where it is null or a list
    return {
        "size": min(256, side * 2 ** (len(vae_channels) - 1)),
        "v_prediction": prediction == "v_prediction",
        "diffusion": DiffusionConfig(scheduler.get("num_train_timesteps", 1000),
                                     scheduler.get("beta_start", 0.00085),
                                     scheduler.get("beta_end", 0.012)),
        "text": CLIPTextConfig(text["vocab_size"], text["max_position_embeddings"],
                               text["hidden_size"], text["num_hidden_layers"],
                               text["num_attention_heads"]),
        "vae": VAEConfig(vae_channels, vae["latent_channels"], vae["layers_per_block"],
                         vae["norm_num_groups"], vae.get("scaling_factor") or 0.18215),
        "unet": UNetConfig(
            channels=tuple(unet["block_out_channels"]),
            attention=tuple(kind.startswith("CrossAttn") for kind in unet["down_block_types"]),
            layers=unet["layers_per_block"], heads=heads, groups=unet["norm_num_groups"],
            context_width=unet["cross_attention_dim"], frames=frames)}


def load_part(module: nn.Module, folder: Path) -> int:
    """Fill a module from a folder and return how many numbers; only video parts may be missing.

    Raises InputError for a weight that is missing, left over or of another shape.
    """
    weights = {}
    expected = module.state_dict()
    for name, weight in read_weights(folder).items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        if folder.name == "text_encoder" and not name.startswith("text_model."):
            name = "text_model." + name  # as transformers 5 writes it
        if name in expected and weight.shape == (*expected[name].shape, 1, 1):
            weight = weight[..., 0, 0]  # old VAE attentions are 1x1 convolutions
        weights[name] = weight
    weights.pop("text_model.embeddings.position_ids", None)  # 0 .. 76, in older files
    missing = [name for name in expected if name not in weights and not is_video_parameter(name)]
    unknown = [name for name in weights if name not in expected]
    known = weights.keys() & expected.keys()
    shapes = [name for name in known if weights[name].shape != expected[name].shape]
    if missing or unknown or shapes:
        raise InputError(f"{folder}: {len(missing)} weights missing, {len(unknown)} left over, "
                         f"{len(shapes)} of another shape than its config.json says, "
                         f"{(missing + unknown + shapes)[0]} first; {REMEDY}")
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise InputError(f"{folder}: {bad[0]} holds NaN or infinity; get it again")
    module.load_state_dict(weights, strict=False)  # what is missing was checked above
    return sum(weight.numel() for weight in weights.values())


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all tensors of a part to the CPU, running no code: .safetensors or .bin, fp32 first."""
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    files = [folder / f"{stem}{suffix}" for stem in stems
             for suffix in (".safetensors", ".bin", ".fp16.safetensors", ".fp16.bin")]
    files = [file for file in files if file.is_file()]
    if not files:
        other = ", ".join(file.name for file in sorted(folder.glob("*.*")) if "ema" in file.name)
        raise InputError(f"{folder}: no weights (.safetensors or .bin) here"
                         f"{other and f' but {other}, which are not for sampling'}; {REMEDY}")
    try:
        if files[0].suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(files[0])
        return dict(torch.load(files[0], map_location="cpu", weights_only=True))
    except ImportError as error:
        raise InputError(f"{files[0]}: needs a package; pip install safetensors") from error
    except Exception as error:  # safetensors and torch have many for a damaged file
        reason = str(error).splitlines()[0][:80]
        raise InputError(f"{files[0]}: damaged or cut off ({reason}); get it again") from error


def read_json(file: Path) -> dict:
    """Read a JSON object; InputError if the file is missing or holds something else."""
    try:
        fields = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{file}: there is no such file; {REMEDY}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); get it again") from error
    if not isinstance(fields, dict):
        raise InputError(f"{file}: not a JSON object; get it again")
    return fields
