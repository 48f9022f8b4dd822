"""What the small model needs beyond the paper: v, staggered frames, Muon, starts, latents kept."""

import pytest
import torch
from torch import nn

from conftest import close, randn, seeded, small_model
from data import ShapesDataset
from diffusion import Diffusion
from tiny import (EMA, Muon, StaggeredDiffusion, VDiffusion, build_optimizers, encode_clips,
                  set_learning_rates)

SHAPE = (3, 5, 2, 4, 4)  # b, f, c, h, w
CONTEXT = torch.zeros(3, 1, 1, dtype=torch.float64)
FPS = torch.tensor([8.0, 12.0, 24.0])


def oracle(process, z0, seen=None):
    """A perfect model of v, t (b,) or (b, f), that notes z and t."""
    def model(z, t, context, fps):
        if seen is not None:
            seen.append((z.clone(), t))
        signal = process.alpha_bar(t).sqrt()
        noise = (1 - process.alpha_bar(t)).sqrt()
        return signal * (z - signal * z0) / noise - noise * z0
    return model


def test_the_last_timestep_of_v_diffusion_is_pure_noise_and_the_first_is_sds():
    of_v = VDiffusion().alphas_cumprod
    assert of_v[-1] == 0 and (of_v.diff() < 0).all()
    assert abs(of_v[0] - Diffusion().alphas_cumprod[0]) < 1e-12
    eps = randn(*SHAPE, seed=1)
    assert torch.equal(VDiffusion().add_noise(randn(*SHAPE), eps, torch.full((3,), 999)), eps)


def test_each_staggered_frame_is_100_timesteps_noisier_than_the_one_before():
    t = StaggeredDiffusion().frame_timesteps(torch.arange(1000), 4)  # (1000, 4)
    assert (t.diff(dim=1) == 100).all() and (t.diff(dim=0) >= 1).all()
    # the first frame begins where the last ends
    assert t[-1].tolist() == [999, 1099, 1199, 1299] and t[0].tolist() == [-300, -200, -100, 0]
    assert ((t >= 0) & (t <= 999)).any(1).all()


def test_the_staggered_loss_leaves_out_clean_frames_and_pure_noise_and_averages_to_the_error():
    process = StaggeredDiffusion()
    z0 = randn(1000, 4, 1, 1, 1)
    eps = randn(1000, 4, 1, 1, 1, seed=1)
    t = torch.arange(1000)  # every timestep once
    unclamped = process.frame_timesteps(t, 4)
    outside = (unclamped < 0) | (unclamped > 999)

    def off_by_one(z, t, context, fps):
        assert torch.equal(t, unclamped.clamp(0, 999))
        absurd = 1e6 * outside[..., None, None, None]
        return process.target(z0, eps, t) + 1 + absurd

    loss = process.loss(off_by_one, z0, torch.zeros(1000, 1, 1), torch.ones(1000), t, eps)
    assert abs(loss.mean().item() - 1) < 1e-6  # the error of every frame that counts is 1
    counted = (~outside).sum(1)
    assert close(loss / loss[0], counted.double() / counted[0], 1e-6)


def test_single_frames_are_not_staggered():
    def model(z, t, context, fps):
        return (z + t.view(-1, 1, 1, 1, 1)).sin()

    results = []
    for process in (VDiffusion(), StaggeredDiffusion()):
        loss = process.loss(model, randn(3, 1, 2, 4, 4), CONTEXT, generator=seeded())
        z = process.sample(model, (3, 1, 2, 4, 4), CONTEXT, CONTEXT, None, steps=3,
                           generator=seeded())
        results.append((loss, z))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_an_oracle_is_followed_from_pure_noise_frame_after_frame(sampler, eta, steps):
    process = StaggeredDiffusion()
    z0 = randn(*SHAPE)
    seen = []
    end = process.sample(oracle(process, z0, seen), SHAPE, CONTEXT, CONTEXT, FPS, sampler, steps,
                         guidance=1, eta=eta, generator=seeded())
    # DDIM ends at timestep 0, where a thousandth of the variance is still noise (matches SD)
    assert close(end, z0, 1e-9 if sampler == "ddpm" else 0.2) and (end - z0).std() < 0.05
    for (z, t), (z_next, t_next) in zip(seen, seen[1:]):
        waits = ((t == t_next) & (t > 0))[..., None, None, None].expand_as(z)
        moves = (t != t_next)[..., None, None, None].expand_as(z)
        assert torch.equal(z[waits], z_next[waits]) and (z[moves] != z_next[moves]).all()
    z, t = seen[-1]
    clean = (t == 0) & (seen[-2][1] == 0)  # some timesteps before the end
    assert torch.equal(z[clean], end[clean]) and clean.any()


@pytest.mark.parametrize("shape", [(8, 8), (8, 50), (50, 8), (16, 4, 3, 3), (4, 16, 3, 3)])
def test_a_step_of_muon_moves_every_direction_of_a_matrix_alike(shape):
    slopes = torch.linspace(0.3, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    p = nn.Parameter(randn(*shape).float())
    p.grad = randn(*shape, seed=1).float() * slopes
    before = p.detach().clone()
    Muon([p], lr=0.1).step()
    moved = (before - p.detach()).flatten(1)
    sizes = torch.linalg.svdvals(moved) / 0.1 / max(1, moved.shape[0] / moved.shape[1]) ** 0.5
    assert 0.6 < sizes.min() and sizes.max() < 1.3
    assert (moved * p.grad.flatten(1)).sum() > 0  # downhill
    slopes = torch.linalg.svdvals(p.grad.flatten(1))
    assert slopes.min() / slopes.max() < 0.7


def test_muon_equals_torchs_on_linear_layers_also_many_of_one_shape():
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("torch.optim.Muon came with torch 2.9")
    shapes = [(12, 30), (30, 12), (12, 30)]
    ours = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    theirs = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    optimizers = [Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)]
    for step in range(3):
        for i, shape in enumerate(shapes):
            ours[i].grad = randn(*shape, seed=10 * step + i).float()
            theirs[i].grad = ours[i].grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        assert (a - 1).norm() > 0.05
        assert (a - b).norm() < 0.02 * (a - 1).norm()  # torch's works in bfloat16


def test_hidden_matrices_are_muons_and_all_else_is_adamws():
    model = small_model()
    names = {p: name for name, p in model.named_parameters()}
    groups = [{"params": [*model.unet.parameters(), *model.text_encoder.parameters()]}]
    adamw, muon = build_optimizers([model.unet, model.text_encoder], groups, muon=True)
    of_adamw, of_muon = ([names[p] for p in optimizer.param_groups[0]["params"]]
                         for optimizer in (adamw, muon))
    assert sorted(of_adamw + of_muon) == sorted(names[p] for p in groups[0]["params"])
    for name in of_muon:
        others = ("norm", "token_embedding", "position_embedding", "adaptor", "conv_in", "conv_out")
        assert name.endswith("weight") and not any(part in name for part in others)
    assert {"unet.mid_block.resnets.0.conv1.weight", "unet.mid_block.attentions.0.proj_in.weight",
            "unet.mid_block.temporal_attentions.0.to_q.weight"} <= {*of_muon}
    (alone,) = build_optimizers([model.unet], groups, muon=False)
    assert [*map(len, (g["params"] for g in alone.param_groups))] == [len(groups[0]["params"])]


def test_learning_rates_rise_from_the_start_of_each_group_and_fall_to_zero():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "start": start}
                                 for start in (0, 80)])
    rates = []
    for step in range(100):
        set_learning_rates([optimizer], (2.0,), step, 100, 10)
        rates.append([group["lr"] for group in optimizer.param_groups])
    first, second = zip(*rates)
    assert first[0] == pytest.approx(0.2) and 1.9 < max(first) < 2 and first[-1] < 0.001
    assert first.index(max(first)) == 9 and second.index(max(second)) == 88
    assert second[80] == pytest.approx(0.2) and second[-1] < 0.02


def test_the_moving_average_forgets_the_start_and_changes_places_with_the_weights():
    weight = nn.Parameter(torch.zeros(1))
    ema = EMA([weight], 0.999)
    weight.data.fill_(1)
    ema.update()
    assert ema.shadow[0].item() == pytest.approx(1 - 2 / 11)  # not 0.001
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert weight.item() == pytest.approx(9 / 11)
        raise KeyboardInterrupt
    assert weight.item() == 1 and ema.shadow[0].item() == pytest.approx(9 / 11)
    ema.shadow = [torch.zeros(1)]
    ema.count = 10**6
    ema.update()
    assert ema.shadow[0].item() == pytest.approx(0.001, rel=1e-3)


def test_latents_kept_are_the_scaled_means_of_the_clips_each_epoch_cut_anew():
    model = small_model()
    clips = ShapesDataset(frames=4, size=16, length=3)
    cache = encode_clips(model, clips, 7, rank=0, world=1)
    assert len(cache) == 7 and not torch.equal(cache[0]["z0"], cache[3]["z0"])
    for n in range(7):
        clips.set_epoch(n // 3)
        item = clips[n % 3]
        assert (cache[n]["caption"], cache[n]["fps"]) == (item["caption"], item["fps"])
        mean, _ = model.vae.encode(item["video"][None])
        assert torch.equal(cache[n]["z0"], 0.18215 * mean[0])
