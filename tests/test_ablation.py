"""The ablations: arms differ in what they say they do, start without effect, and are not run twice."""

import json

import pytest
import torch

import ablation
from clip_text import CLIPTextConfig
from conftest import randn, shaken
from data import InputError
from magicvideo import PRESETS, MagicVideo, MagicVideoConfig
from unet3d import UNetConfig
from vae import VAEConfig


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The path of a model with all weights random, its sizes the least there are."""
    monkeypatch.setitem(PRESETS, "tiny", MagicVideoConfig(
        size=32, text=CLIPTextConfig(vocab_size=560, context_length=12, width=32, layers=1, heads=2),
        vae=VAEConfig(channels=(8, 8, 8, 16), layers=1, groups=4),
        unet=UNetConfig(channels=(16, 32), attention=(True, True), layers=1, heads=2, groups=4, context_width=32,
                        frames=4)))
    shaken(MagicVideo.from_preset("tiny")).float().save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def unet_output(path):
    model = MagicVideo.load(path)
    z, context = randn(1, 4, 4, 4, 4).float(), randn(1, 5, 32, seed=1).float()
    with torch.no_grad():
        return model, model.unet(z, torch.tensor([500]), context, torch.tensor([8.0]))


def test_an_arms_start_differs_from_the_model_in_what_the_arm_is_about_alone(trained, tmp_path):
    _, whole = unet_output(trained)
    for arm in ("whole", "without adaptors", "spatial alone"):
        assert torch.equal(unet_output(ablation.start_of(arm, trained, tmp_path / "start.pt"))[1], whole)
    for arm in ("literal", "bidirectional"):
        model, output = unet_output(ablation.start_of(arm, trained, tmp_path / "start.pt"))
        assert model.config.unet.mask == arm and not torch.equal(output, whole)
    model, _ = unet_output(ablation.start_of("temporal alone", trained, tmp_path / "start.pt"))
    z, context = randn(1, 4, 16, 4, 4).float(), randn(1, 5, 32).float()
    assert torch.equal(model.unet.down_blocks[0].attentions[0](z, context, None), z)


def test_a_fresh_model_has_the_trained_vae_and_weights_of_its_seed(trained, tmp_path):
    trained_weights = MagicVideo.load(trained).state_dict()
    of = {seed: MagicVideo.load(ablation.fresh(trained, tmp_path / "fresh.pt", seed)).state_dict() for seed in (0, 1)}
    for name in trained_weights:
        if name.startswith("vae."):
            assert torch.equal(of[0][name], trained_weights[name])
    name = "unet.conv_in.weight"
    assert not torch.equal(of[0][name], of[1][name]) and not torch.equal(of[0][name], trained_weights[name])


def test_every_arm_runs_the_commands_of_its_claim_and_none_twice(trained, tmp_path, monkeypatch, capsys):
    commands = []

    def run(script, *flags):
        commands.append([script, *map(str, flags)])
        out = tmp_path / flags[flags.index("--out") + 1]
        if script == "train.py":
            out.mkdir(parents=True)
            (out / "model.pt").write_bytes(trained.read_bytes())
            (out / "log.csv").write_text("stage,step,seconds\nx,1,10\nx,2,20\n")
        else:
            words = {word: {"rate": 0.5} for word in ablation.WORDS}
            (out / "results.json").write_text(json.dumps({"rows": [words], "reconstruction": [
                {"psnr": 30, "flicker_psnr": 28}]}))

    monkeypatch.setattr(ablation, "run", run)
    for claim in ablation.CLAIMS:
        ablation.main([claim, "--seeds", "2", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    for arms in ablation.CLAIMS.values():
        assert all(arm in printed for arm in arms)
    outs = [command[command.index("--out") + 1] for command in commands if command[0] == "train.py"]
    assert len(outs) == len(set(outs)) == 1 + 2 + 2 * 7 + 2 * 2  # the VAE, images, arms, VAEs of "flicker"
    scratch = next(c for c in commands if "from-scratch-0" in c[c.index("--out") + 1] and c[0] == "train.py")
    assert scratch[scratch.index("--video-steps") + 1] == "300"  # 20 s of image stage and 20 s of 150 steps
    results = json.loads((tmp_path / "out" / "start.json").read_text())
    assert results["arms"]["whole"][1]["seconds"] == 40 and len(results["arms"]["from scratch"]) == 2
    errors = [row["error"] for row in results["arms"]["whole"]]
    assert errors[0] == errors[1] > 0  # stand-ins are one model, and the noise is the same for all


def test_a_script_that_fails_stops_the_ablation():
    with pytest.raises(InputError, match="evaluate.py ended with an error"):
        ablation.run("evaluate.py", "--checkpoint", "nowhere.pt")
