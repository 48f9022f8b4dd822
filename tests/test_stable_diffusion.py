"""Stable Diffusion 1.x folders: what diffusers wrote is read, to the ninth digit, others refused.

All tests skip with a reason where the packages that write such a folder are not installed.
"""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from clip_text import Tokenizer
from conftest import close, randn, seeded, shaken
from runs import InputError
from magicvideo import MagicVideo
from stable_diffusion import is_video_parameter

diffusers = pytest.importorskip("diffusers", reason="no diffusers to write such a folder with")
transformers = pytest.importorskip("transformers", reason="no transformers for a text encoder")
safetensors = pytest.importorskip("safetensors.torch", reason="no safetensors to read the folder")

PROMPT = "a photo of the moon"


@pytest.fixture(scope="module")
def pipe():
    """A Stable Diffusion pipeline of a few thousand weights, all random, in float32."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        pytest.skip("openai-clip is not installed: no vocabulary for a tokenizer")
    packed = Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
    merges = [tuple(line.split()) for line in gzip.open(packed, "rt").read().split("\n")[1:301]]
    ids = Tokenizer(merges)._id_of
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=77, hidden_act="quick_gelu",
        bos_token_id=len(ids) - 2, eos_token_id=len(ids) - 1))
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
        latent_channels=4, block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8,
        sample_size=32, scaling_factor=0.2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        cross_attention_dim=32, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    for part in (text, vae, unet):
        shaken(part).float()
    tokenizer = transformers.CLIPTokenizer(vocab=ids, merges=merges, pad_token="<|endoftext|>",
                                           model_max_length=77)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
        clip_sample=False, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                             requires_safety_checker=False)


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def original(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def image_weights(folder):
    weights = MagicVideo.from_stable_diffusion(folder, frames=2).state_dict()
    return {name: p for name, p in weights.items() if not is_video_parameter(name)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_weight_is_loaded_and_the_video_parts_start_with_zero_effect(original, pipe, capsys):
    model = MagicVideo.load(original)
    counts = [part.num_parameters() for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
    assert f"{sum(counts):,} parameters of Stable Diffusion" in capsys.readouterr().out
    config = model.config
    assert (config.size, config.unet.frames, config.vae.scaling_factor) == (32, 16, 0.2)
    assert config.pretrained and not config.staggered
    model = MagicVideo.from_stable_diffusion(original, frames=3)
    unet = model.unet.double()
    z = randn(2, 3, 4, 8, 8)
    t = torch.tensor([5, 700])
    text = randn(2, 7, 32)
    assert torch.equal(unet(z, t, text, torch.tensor([8.0, 24.0])), unet(z, t, text))


@pytest.mark.parametrize("schedule", [
    {}, {"prediction_type": "v_prediction", "beta_start": 0.001, "beta_end": 0.02}])
def test_a_guided_sample_from_prompt_to_pixels_equals_diffusers(folder, monkeypatch, schedule):
    from diffusers.schedulers import scheduling_ddim
    edit(folder / "scheduler/scheduler_config.json", **schedule)
    model = MagicVideo.from_stable_diffusion(folder).double()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float64)
    # diffusers' own schedule, its arithmetic in float64
    pipe.scheduler.alphas_cumprod = model.diffusion.alphas_cumprod
    pipe.scheduler.final_alpha_cumprod = model.diffusion.alphas_cumprod[0]
    pipe.set_progress_bar_config(disable=True)
    noise = seeded(3)
    start = torch.randn(1, 4, 8, 8, generator=noise).double()
    monkeypatch.setattr(scheduling_ddim, "randn_tensor", lambda shape, **_: torch.randn(
        shape, generator=noise).double())
    theirs = pipe(PROMPT, height=32, width=32, num_inference_steps=10, guidance_scale=7.5,
                  latents=start, output_type="pt").images
    ours = model.sample(PROMPT, fps=None, steps=10, seed=3)[:, 0]
    assert theirs.std() > 0.01 and close((ours + 1) / 2, theirs, 1e-9)


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}])
def test_bin_files_and_those_of_a_variant_are_read(original, folder, pipe, options):
    for name in ("unet", "vae"):
        shutil.rmtree(folder / name)
        getattr(pipe, name).float().save_pretrained(folder / name, **options)
    assert same(image_weights(folder), image_weights(original))


def rewrite(file, change):
    """Change the weights of a part: {name: tensor} -> {name: tensor}."""
    weights = change(safetensors.load_file(file))
    safetensors.save_file({name: p.contiguous() for name, p in weights.items()}, file)


def test_old_names_of_the_vae_and_of_the_text_encoder_are_read(original, folder):
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def aged(weights):
        made = {}
        for name, p in weights.items():
            if "attentions" in name:
                for new, old in old_names.items():
                    name = name.replace(f".{new}.", f".{old}.")
                p = p[..., None, None] if p.ndim == 2 else p
            made[name] = p
        return made

    expected = image_weights(original)
    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", aged)
    for prefix in ("text_model.", ""):
        rewrite(folder / "text_encoder" / "model.safetensors", lambda weights: {
            **{prefix + name.removeprefix("text_model."): p for name, p in weights.items()
               if "position_ids" not in name},
            prefix + "embeddings.position_ids": torch.arange(77)[None]})
        assert same(image_weights(folder), expected)


@pytest.mark.parametrize("size", [None, [8, 8], 999])
def test_sizes_that_are_null_or_lists_are_stable_diffusions_own_and_none_is_above_the_papers(
        original, folder, size):
    edit(folder / "unet/config.json", sample_size=size)
    edit(folder / "vae/config.json", scaling_factor=None)
    config = MagicVideo.from_stable_diffusion(folder).config
    assert (config.size, config.vae.scaling_factor) == (256, 0.18215)


UNET = "unet/diffusion_pytorch_model.safetensors"
BROKEN = {
    "a missing folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "an SD 2.x U-Net": (
        lambda f: edit(f / "unet/config.json", use_linear_projection=True), "use_linear_"),
    "heads by level": (
        lambda f: edit(f / "unet/config.json", attention_head_dim=[5, 10]), "another generation"),
    "another activation": (
        lambda f: edit(f / "text_encoder/config.json", hidden_act="gelu"), "hidden_act"),
    "SDXL": (lambda f: (f / "text_encoder_2").mkdir(), "two text encoders"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: there is no such file"),
    "no weights": (lambda f: (f / UNET).unlink(), "no weights"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer here"),
    "another tokenizer": (
        lambda f: edit(f / "text_encoder/config.json", vocab_size=900), "814 symbols"),
    "NaN": (lambda f: rewrite(
        f / UNET, lambda w: {**w, "conv_in.bias": w["conv_in.bias"] * torch.nan}), "holds NaN"),
    "no averaged weights": (
        lambda f: (f / UNET).rename(f / UNET.replace(".saf", ".non_ema.saf")), "non_ema"),
    "another noise schedule": (
        lambda f: edit(f / "scheduler/scheduler_config.json", beta_schedule="linear"), "'linear'"),
    "another prediction": (lambda f: edit(
        f / "scheduler/scheduler_config.json", prediction_type="sample"), "'sample'"),
    "not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "not JSON"),
    "a size missing": (lambda f: (f / "vae/config.json").write_text("{}"), "block_out_channels"),
    "weights cut off": (lambda f: (f / UNET).write_bytes(b"123"), "cut off"),
    "a weight left over": (
        lambda f: rewrite(f / UNET, lambda w: {**w, "new.bias": torch.zeros(5)}), "1 left over"),
    "a weight missing": (lambda f: rewrite(
        f / UNET, lambda w: {n: w[n] for n in w if n != "conv_in.bias"}), "1 weights missing"),
    "another shape": (lambda f: rewrite(
        f / UNET, lambda w: {**w, "conv_in.bias": torch.zeros(5)}), "1 of another shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_stable_diffusion_1_is_refused_in_one_line(folder, name):
    damage, words = BROKEN[name]
    damage(folder)
    with pytest.raises(InputError) as error:
        MagicVideo.from_stable_diffusion(folder)
    assert words in str(error.value) and "\n" not in str(error.value)
