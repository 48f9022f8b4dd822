"""The whole model: from prompts to clips, and to a file and back."""

import inspect
import os
from functools import partial

import pytest
import torch

from conftest import close, small_model
from runs import InputError
from magicvideo import PRESETS, MagicVideo
from runs import load_checkpoint
from runs import save_checkpoint

PROMPT = "a red circle moving left"


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_a_sample_is_a_clip_of_the_models_size_in_minus_one_to_one_and_its_latents_decoded(model):
    clips = model.sample([PROMPT, "a blue square growing"], steps=2)
    assert clips.shape == (2, 4, 3, 16, 16)
    assert clips.min() >= -1 and clips.max() <= 1 and clips.std() > 0.1
    latents = model.sample([PROMPT, "a blue square growing"], steps=2, decode=False)
    assert latents.shape == (2, 4, 4, 4, 4)
    assert torch.equal(model.vae.decode(latents[:1]).clamp(-1, 1), clips[:1])
    assert model.sample([PROMPT], fps=None, steps=2).shape == (1, 1, 3, 16, 16)  # the image model


def test_a_u_net_in_bfloat16_samples_nearly_the_same_clip_in_float32(model):
    expected = model.sample(PROMPT, steps=3, decode=False)
    model.unet.bfloat16()
    found = model.sample(PROMPT, steps=3, decode=False)
    model.unet.float()
    assert found.dtype == torch.float32 and 0 < (found - expected).std() < 0.1 * expected.std()


def test_encoding_gives_scaled_means_in_the_type_of_the_vae_whatever_the_u_nets(model):
    videos = torch.rand(1, 4, 3, 16, 16) * 2 - 1
    mean, _ = model.vae.encode(videos)
    model.unet.bfloat16()
    found = model.encode(videos.double())
    model.unet.float()
    assert model.config.vae.scaling_factor != 1
    assert torch.equal(found, model.config.vae.scaling_factor * mean)


@pytest.mark.parametrize("options", [{}, {"sampler": "ddpm"}])
def test_a_seed_gives_one_clip_bit_for_bit_whatever_its_neighbours(model, options):
    sample = partial(model.sample, steps=3, **options)
    both = sample([PROMPT, "a blue square growing"], seed=5)
    assert torch.equal(both, sample([PROMPT, "a blue square growing"], seed=5))
    alone = sample("a blue square growing", seed=6)
    assert close(both[1:], alone, 1e-4)  # other batch sizes round differently
    assert not close(alone, sample("a blue square growing", seed=5), 0.01)


@pytest.mark.parametrize("changes", [
    {"fps": 16}, {"guidance": 3.0}, {"sampler": "ddpm"}, {"steps": 4},
    {"prompts": "a blue square growing"}, {"prompts": ""}])
def test_every_argument_of_sampling_has_an_effect(model, changes):
    plain = model.sample(PROMPT, steps=3)
    assert not close(plain, model.sample(**{"prompts": PROMPT, "steps": 3, **changes}), 1e-3)


def test_steps_are_the_models_own_unless_given(model, monkeypatch):
    monkeypatch.setattr(model.config, "steps", 3)
    assert torch.equal(model.sample(PROMPT), model.sample(PROMPT, steps=3))


def test_guidance_is_the_models_own_unless_given_and_changes_nothing_without_text(model):
    own = model.sample(PROMPT, steps=3)
    assert torch.equal(own, model.sample(PROMPT, steps=3, guidance=model.config.guidance))
    empty = model.sample("", steps=3, guidance=7.5)
    assert close(empty, model.sample("", steps=3, guidance=1.0), 1e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_the_sizes_of_every_preset_fit_together(name):
    config = PRESETS[name]
    side = config.size // 8
    assert side % 2 ** (len(config.unet.channels) - 1) == 0
    with torch.device("meta"):
        model = MagicVideo.from_preset(name)
        z = torch.zeros(1, config.unet.frames, 4, side, side)
        context = model.text_encoder(torch.zeros(1, config.text.context_length, dtype=torch.long))
        assert model.unet(z, torch.zeros(1), context, torch.zeros(1)).shape == z.shape
        video = model.vae.decode(z)
    assert video.shape == (1, config.unet.frames, 3, config.size, config.size)


def test_defaults_are_the_papers_and_stable_diffusions():
    parameters = inspect.signature(MagicVideo.sample).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    asked = {"fps": 8, "steps": None, "guidance": None, "sampler": "ddim", "seed": 0}
    assert asked.items() <= defaults.items()
    assert (PRESETS["paper"].guidance, PRESETS["paper"].steps) == (7.5, 50)
    assert PRESETS["paper"].unet.frames == 16
    assert [name for name, config in PRESETS.items() if config.staggered] == ["tiny", "laptop"]


def test_a_saved_model_comes_back_whole_from_its_file_and_from_the_folder_of_its_run(tmp_path):
    model = small_model()
    model.config.vae.scaling_factor = 0.77
    model.cascade["upscale"] = {"weight": torch.ones(3)}
    model.save(tmp_path / "model.pt")
    for path in (tmp_path / "model.pt", str(tmp_path)):
        loaded = MagicVideo.load(path)
        assert loaded.config == model.config and loaded.vae.config.scaling_factor == 0.77
        assert loaded.tokenizer.merges == model.tokenizer.merges
        assert torch.equal(loaded.cascade["upscale"]["weight"], torch.ones(3))
        assert torch.equal(loaded.sample(PROMPT, steps=2), model.sample(PROMPT, steps=2))
    with pytest.raises(InputError, match="--frames 8: .*model.pt makes 4"):
        MagicVideo.load(tmp_path, frames=8)


def edit(path, change):
    contents = load_checkpoint(path, "magicvideo")
    change(contents["model"])
    save_checkpoint(path, contents)


BROKEN = {
    "missing": lambda path: path.unlink(),
    "text": lambda path: path.write_text("not a checkpoint"),
    "empty": lambda path: path.write_bytes(b""),
    "a tensor": lambda path: torch.save(torch.ones(3), path),
    "foreign": lambda path: torch.save({"weights": torch.ones(3)}, path),
    "a training": lambda path: torch.save({"format": "magicvideo-training"}, path),
    "no model": lambda path: torch.save({"format": "magicvideo"}, path),
    "no dictionary": lambda path: torch.save({"format": "magicvideo", "model": [1]}, path),
    "its end cut off": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "another size": lambda path: edit(path, lambda state: state.update(
        config=state["config"].replace('"width": ', '"width": 1'))),
    "an older field": lambda path: edit(path, lambda state: state.update(
        config=state["config"].replace('"groups"', '"crews"'))),
    "no levels": lambda path: edit(path, lambda state: state.update(
        config=state["config"].replace('"channels": [8, 16]', '"channels": []'))),
    "another format": lambda path: edit(path, lambda state: state.update(version=2)),
    "no merges": lambda path: edit(path, lambda state: state.update(merges=["x", "y z q"])),
    "without adaptors": lambda path: edit(path, lambda state: state.update(
        weights={name: p for name, p in state["weights"].items() if "adaptor" not in name})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_is_no_whole_model_is_one_line_that_names_it(model, tmp_path, name):
    path = tmp_path / "model.pt"
    model.save(path)
    BROKEN[name](path)
    with pytest.raises(InputError) as error:
        MagicVideo.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(tmp_path):
    class Attack:
        def __reduce__(self):
            return open, (str(tmp_path / "attacked"), "w")

    torch.save({"format": "magicvideo", "model": Attack()}, tmp_path / "model.pt")
    with pytest.raises(InputError, match="model.pt"):
        MagicVideo.load(tmp_path / "model.pt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("failed")])
def test_a_full_disk_leaves_the_old_file_whole_and_no_new_one(model, tmp_path, monkeypatch, error):
    path = tmp_path / "model.pt"
    model.save(path)
    old = path.read_bytes()

    def fill_disk(contents, place):
        place.write_bytes(b"half of a")
        raise error

    monkeypatch.setattr(torch, "save", fill_disk)
    with pytest.raises(InputError, match="model.pt: cannot be written.*--out"):
        model.save(path)
    assert path.read_bytes() == old and [*tmp_path.iterdir()] == [path]
