"""The whole model: from prompts to clips, and to a file and back."""

import inspect
import re

import pytest
import torch

import data
from diffusion import Diffusion
from magicvideo import PRESETS, MagicVideo, read_checkpoint, write_checkpoint


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = MagicVideo.from_preset("tiny").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing trivially zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def test_a_sample_is_a_clip_of_the_preset_in_minus_one_to_one(model):
    clips = model.sample(["a red circle moving left", "a blue square growing"], steps=2)
    assert clips.shape == (2, 8, 3, 64, 64)
    assert clips.min() >= -1 and clips.max() <= 1 and clips.std() > 0


def test_same_seed_gives_the_same_clip_bit_for_bit_and_another_seed_another(model):
    first, again, other = (model.sample("a red circle moving left", steps=3, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.01


def test_a_clip_does_not_depend_on_its_neighbours_in_the_batch(model):
    both = model.sample(["a red circle moving left", "a blue square growing"], steps=3, seed=5)
    alone = model.sample("a blue square growing", steps=3, seed=6)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=0)  # other batch sizes round differently


@pytest.mark.parametrize("what", [{"fps": 16}, {"guidance": 1.0}, {"sampler": "ddpm"}, {"eta": 1.0}, {"steps": 4}])
def test_every_sampling_argument_has_an_effect(model, what):
    plain = model.sample("a red circle moving left", steps=3)
    changed = model.sample("a red circle moving left", **{"steps": 3, **what})
    assert (plain - changed).abs().max() > 1e-3


def test_the_prompt_has_an_effect_and_the_empty_prompt_is_valid(model):
    empty, other = (model.sample(prompt, steps=3) for prompt in ("", "a red circle moving left"))
    assert empty.shape == other.shape and (empty - other).abs().max() > 1e-3


def test_guidance_of_the_empty_prompt_is_the_unconditional_model(model):
    guided, plain = (model.sample("", steps=3, guidance=guidance) for guidance in (7.5, 1.0))
    torch.testing.assert_close(guided, plain, atol=1e-4, rtol=0)


def test_without_fps_the_image_model_draws_single_pictures(model):
    assert model.sample(["a red circle moving left"], fps=None, steps=2).shape == (1, 1, 3, 64, 64)


@pytest.mark.parametrize("arguments, words", [
    ({"frames": 16}, "--frames 16.*adaptors.*--frames 16"), ({"fps": 0}, "--fps 0"),
    ({"fps": float("nan")}, "--fps nan"),
    ({"seed": -1}, "--seed -1"), ({"steps": 0}, "--steps 0.*1 to 1000"), ({"steps": 1001}, "--steps 1001.*1 to 1000"),
    ({"sampler": "euler"}, "euler.*ddim"), ({"eta": 2.0}, "--eta 2.0"), ({"guidance": float("inf")}, "--guidance inf"),
])
def test_values_out_of_range_are_one_line_that_names_the_flag_and_the_remedy(model, arguments, words):
    with pytest.raises(data.InputError) as error:
        model.sample("a red circle moving left", **{"steps": 2, **arguments})
    assert re.search(words, str(error.value)) and "\n" not in str(error.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(data.InputError, match='"huge".*tiny, small, paper'):
        MagicVideo.from_preset("huge")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_its_sizes_fit_together(name):
    config = PRESETS[name]
    assert config.text.width == config.unet.context_width
    assert config.vae.latent_channels == config.unet.in_channels == config.unet.out_channels
    side = config.size // 2 ** (len(config.vae.channels) - 1)
    assert side * 8 == config.size and side % 2 ** (len(config.unet.channels) - 1) == 0
    with torch.device("meta"):
        model = MagicVideo.from_preset(name)
        z = torch.zeros(1, config.unet.frames, 4, side, side)
        context = model.text_encoder(torch.zeros(1, config.text.context_length, dtype=torch.long))
        out = model.unet(z, torch.zeros(1), context, torch.zeros(1))
        assert out.shape == z.shape
        assert model.vae.decode(z).shape == (1, config.unet.frames, 3, config.size, config.size)


def test_a_model_saved_in_half_precision_is_half_as_large_says_who_made_it_and_loads_in_float32(model, tmp_path):
    model.save(tmp_path / "whole.pt")
    model.save(tmp_path / "half.pt", torch.float16, made_by="python train.py")
    assert (tmp_path / "half.pt").stat().st_size < 0.55 * (tmp_path / "whole.pt").stat().st_size
    assert read_checkpoint(tmp_path / "half.pt", "magicvideo")["made_by"] == "python train.py"
    loaded = MagicVideo.load(tmp_path / "half.pt")
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(loaded.state_dict()[name], weight, rtol=1e-3, atol=1e-6)


def test_a_saved_model_comes_back_whole(model, tmp_path):
    model.save(tmp_path / "model.pt")
    loaded = MagicVideo.load(tmp_path / "model.pt")
    assert loaded.config == model.config and loaded.tokenizer.merges == model.tokenizer.merges
    weights = loaded.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert torch.equal(loaded.sample("a red circle", steps=2), model.sample("a red circle", steps=2))


def test_every_configured_value_survives_the_file(model, tmp_path):
    model.config.vae.scaling_factor, before = 0.77, model.config.vae.scaling_factor
    model.save(tmp_path / "model.pt")
    model.config.vae.scaling_factor = before
    assert MagicVideo.load(tmp_path / "model.pt").vae.config.scaling_factor == 0.77


def broken(tmp_path, model, how):
    path = tmp_path / "model.pt"
    if how == "missing":
        return path
    if how == "text":
        path.write_text("not a checkpoint")
        return path
    if how == "folder":
        path.mkdir()
        return path
    if how == "other":
        torch.save({"weights": torch.ones(3)}, path)
        return path
    if how == "tensor":
        torch.save(torch.ones(3), path)
        return path
    model.save(path)
    if how == "empty":
        path.write_bytes(b"")
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    if how == "half":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    if how in ("size", "merges", "field"):
        contents = read_checkpoint(path, "magicvideo")
        if how == "size":
            contents["model"]["config"] = contents["model"]["config"].replace('"width": ', '"width": 1')
        if how == "merges":
            contents["model"]["merges"] = ["x", "y z q"]
        if how == "field":
            contents["model"]["config"] = contents["model"]["config"].replace('"groups"', '"crews"')
        write_checkpoint(path, contents)
    return path


@pytest.mark.parametrize(
    "how", ["missing", "text", "folder", "other", "tensor", "empty", "truncated", "half", "size", "merges", "field"])
def test_a_file_that_is_no_whole_model_is_one_line_that_names_it(model, tmp_path, how):
    path = broken(tmp_path, model, how)
    with pytest.raises(data.InputError) as error:
        MagicVideo.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    torch.save({"format": "magicvideo", "model": Attack()}, tmp_path / "model.pt")
    with pytest.raises(data.InputError, match="model.pt"):
        MagicVideo.load(tmp_path / "model.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_the_old_file_whole_and_no_new_one(model, tmp_path, monkeypatch, error):
    path = tmp_path / "model.pt"
    model.save(path)
    old = path.read_bytes()

    def full(contents, place):
        place.write_bytes(b"half of a")
        raise error

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(data.InputError, match="model.pt.*--out"):
        model.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_defaults_are_the_papers_and_stable_diffusions():
    def defaults(function):
        parameters = inspect.signature(function).parameters
        return {name: p.default for name, p in parameters.items() if p.default is not p.empty}

    asked = {"fps": 8, "steps": 50, "guidance": 7.5, "sampler": "ddim", "seed": 0, "eta": 0.0, "frames": None}
    for function in (MagicVideo.sample, MagicVideo.sample_latents):
        assert asked.items() <= defaults(function).items()
    assert {"steps": 50, "guidance": 7.5, "eta": 0.0}.items() <= defaults(Diffusion.sample).items()
    assert defaults(MagicVideo.from_stable_diffusion) == {"frames": 16}


def test_of_many_wrong_weights_the_error_says_what_the_matter_is_in_one_line():
    contents = MagicVideo.from_preset("tiny").contents()
    contents["weights"] = {name: weight for name, weight in contents["weights"].items() if "adaptor" not in name}
    with pytest.raises(data.InputError, match=r"^m.pt: .*\(Error\(s\) in loading state_dict.*\); train again"):
        MagicVideo.from_contents(contents, "m.pt")
