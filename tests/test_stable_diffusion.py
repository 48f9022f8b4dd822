"""Stable Diffusion 1.x folders: what diffusers wrote is read, to the ninth digit; anything else is refused in words."""

import gzip
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

from conftest import close, randn, shaken
from data import InputError
from magicvideo import MagicVideo
from stable_diffusion import is_new_part

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to write such a folder with")
transformers = pytest.importorskip("transformers", reason="transformers is not installed: no text encoder to write")
pytest.importorskip("safetensors", reason="safetensors is not installed: the folder could not be read")

PROMPT = "a photo of the moon"


def small_pipeline():
    """A Stable Diffusion pipeline of a few thousand weights, all random, in float32."""
    spec = importlib.util.find_spec("clip")
    if spec is None:
        pytest.skip("openai-clip is not installed: no vocabulary for a tokenizer")
    merges = gzip.open(Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz").read().decode().split("\n")[1:301]
    from clip_text import Tokenizer
    ids = Tokenizer([tuple(merge.split()) for merge in merges])._id_of
    torch.manual_seed(0)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(ids), hidden_size=32, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, hidden_act="quick_gelu", bos_token_id=len(ids) - 2, eos_token_id=len(ids) - 1))
    vae = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3, latent_channels=4,
        block_out_channels=(16, 16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32, scaling_factor=0.2)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=4)
    for part in (text, vae, unet):
        shaken(part).float()
    tokenizer = transformers.CLIPTokenizer(
        vocab=ids, merges=[tuple(merge.split()) for merge in merges], pad_token="<|endoftext|>", model_max_length=77)
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    return diffusers.StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None,
                                             requires_safety_checker=False)


@pytest.fixture(scope="module")
def pipe():
    return small_pipeline()


@pytest.fixture(scope="module")
def original(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "model"
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def weights(model):
    return {name: p for name, p in model.state_dict().items() if not is_new_part(name)}


def same(model, other):
    ours, theirs = weights(model), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_weight_is_loaded_and_the_new_parts_start_with_zero_effect(original, pipe, capsys):
    model = MagicVideo.from_stable_diffusion(original, frames=3)
    line, = capsys.readouterr().out.splitlines()
    counts = [sum(p.numel() for p in part.parameters()) for part in (pipe.unet, pipe.vae, pipe.text_encoder)]
    assert f"{sum(counts):,} parameters" in line and "zero effect" in line
    assert model.config.size == 32 and model.config.unet.frames == 3 and model.config.vae.scaling_factor == 0.2
    assert model.config.pretrained
    z, t, context, fps = randn(2, 3, 4, 8, 8), torch.tensor([5, 700]), randn(2, 7, 32), torch.tensor([8.0, 24.0])
    unet = model.unet.double()
    with torch.no_grad():
        alone = torch.stack([unet(z[:, i : i + 1], t, context)[:, 0] for i in range(3)], dim=1)
        assert close(unet(z, t, context, fps), alone, 1e-12)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_guided_sample_from_prompt_to_pixels_equals_diffusers(original, pipe, eta):
    model = MagicVideo.from_stable_diffusion(original).double()
    for part in (pipe.text_encoder, pipe.vae, pipe.unet):
        part.double()
    pipe.scheduler.alphas_cumprod = model.diffusion.alphas_cumprod  # diffusers' own, its arithmetic in float64
    pipe.scheduler.final_alpha_cumprod = model.diffusion.alphas_cumprod[0]
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(3)
    start = torch.randn(1, 1, 4, 8, 8, generator=noise)[:, 0]
    if eta:
        from diffusers.schedulers import scheduling_ddim
        step = scheduling_ddim.randn_tensor
        scheduling_ddim.randn_tensor = lambda shape, **_: torch.randn(shape, generator=noise).double()
    try:
        theirs = pipe(PROMPT, height=32, width=32, num_inference_steps=10, guidance_scale=7.5, latents=start.double(),
                      output_type="pt", eta=eta).images
    finally:
        if eta:
            scheduling_ddim.randn_tensor = step
    ours = model.sample(PROMPT, fps=None, steps=10, guidance=7.5, seed=3, eta=eta)[:, 0]
    assert theirs.std() > 0.01
    assert close((ours + 1) / 2, theirs, 1e-9)


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "20kB"},
                                     {"safe_serialization": False, "max_shard_size": "20kB"}],
                         ids=["bin", "fp16", "sharded", "sharded bin"])
def test_every_way_of_storing_is_read(original, pipe, tmp_path, options):
    wanted = MagicVideo.from_stable_diffusion(original)
    for name in ("unet", "vae"):
        shutil.rmtree(shutil.copytree(original, tmp_path / "model", dirs_exist_ok=True) / name)
        getattr(pipe, name).float().save_pretrained(tmp_path / "model" / name, **options)
    assert same(MagicVideo.from_stable_diffusion(tmp_path / "model"), wanted)


def rewrite(file, change):
    """Changes a part's weights: {name: tensor} -> {name: tensor}."""
    from safetensors.torch import load_file, save_file
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(file)).items()}, file)


def test_old_names_of_the_vae_and_of_the_text_encoder_are_read(original, folder):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def aged(given):
        made = {}
        for name, tensor in given.items():
            if "attentions" in name:
                for new, before in old.items():
                    name = name.replace(f".{new}.", f".{before}.")
                tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
            made[name] = tensor
        return made

    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", aged)
    text = folder / "text_encoder" / "model.safetensors"
    for prefixed in (True, False):
        rewrite(text, lambda given: {
            ("text_model." if prefixed else "") + name.removeprefix("text_model."): tensor
            for name, tensor in given.items() if "position_ids" not in name
        } | {("text_model." if prefixed else "") + "embeddings.position_ids": torch.arange(77)[None]})
        assert same(MagicVideo.from_stable_diffusion(folder), MagicVideo.from_stable_diffusion(original))


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


BROKEN = {
    "an SD 2.x U-Net": (lambda f: edit(f / "unet/config.json", use_linear_projection=True), "use_linear_projection"),
    "heads by level": (lambda f: edit(f / "unet/config.json", attention_head_dim=[5, 10]), "another generation"),
    "another text width": (lambda f: edit(f / "unet/config.json", cross_attention_dim=1024), "another generation"),
    "an inpainting U-Net": (lambda f: edit(f / "unet/config.json", in_channels=9), "in_channels is 9"),
    "another activation": (lambda f: edit(f / "text_encoder/config.json", hidden_act="gelu"), "hidden_act"),
    "SDXL": (lambda f: (f / "text_encoder_2").mkdir(), "two text encoders"),
    "no U-Net": (lambda f: shutil.rmtree(f / "unet"), "unet/config.json: there is no such file"),
    "no weights": (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), "no weights"),
    "no tokenizer": (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer file"),
    "another tokenizer": (lambda f: edit(f / "text_encoder/config.json", vocab_size=900), "814 symbols"),
    "not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "not JSON"),
    "a size missing": (lambda f: (f / "vae/config.json").write_text("{}"), "block_out_channels"),
    "weights cut off": (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").write_bytes(b"123"), "cut off"),
    "a weight left over": (lambda f: rewrite(f / "unet/diffusion_pytorch_model.safetensors",
                                             lambda w: {**w, "add_embedding.bias": torch.zeros(5)}), "1 left over"),
    "a weight missing": (lambda f: rewrite(f / "unet/diffusion_pytorch_model.safetensors",
                                           lambda w: {n: w[n] for n in w if n != "conv_in.bias"}), "1 weights missing"),
    "another shape": (lambda f: rewrite(f / "unet/diffusion_pytorch_model.safetensors",
                                        lambda w: {**w, "conv_in.bias": torch.zeros(5)}), "1 of another shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_not_stable_diffusion_1_is_refused_in_one_line(folder, name):
    damage, words = BROKEN[name]
    damage(folder)
    with pytest.raises(InputError) as error:
        MagicVideo.from_stable_diffusion(folder)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_single_file_and_a_missing_folder_are_refused(tmp_path):
    (tmp_path / "v1-5.safetensors").write_bytes(b"")
    for path, words in ((tmp_path / "v1-5.safetensors", "one file"), (tmp_path / "nothing", "no such folder")):
        with pytest.raises(InputError, match=words):
            MagicVideo.from_stable_diffusion(path)
    with pytest.raises(InputError, match="one file"):
        MagicVideo.load(tmp_path / "v1-5.safetensors")


def test_new_parts_alone_are_trained_and_the_optimizer_holds_nothing_else(original, tmp_path):
    import train
    out = tmp_path / "run"
    train.main(["--init-from", str(original), "--stage", "video", "--train", "new", "--video-steps", "2", "--frames",
                "8", "--batch-size", "1", "--out", str(out), "--cache", "0"])
    trained, before = MagicVideo.load(out / "model.pt"), MagicVideo.from_stable_diffusion(original, 8)
    assert same(trained, before)
    new = [name for name, _ in before.unet.named_parameters() if is_new_part(name)]
    assert any((trained.unet.state_dict()[name] != before.unet.state_dict()[name]).any() for name in new)
    state = torch.load(out / "checkpoint.pt", weights_only=True)["optimizers"][0]["state"]
    assert 0 < len(state) <= len(new)
