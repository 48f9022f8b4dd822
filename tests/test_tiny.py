"""What the small model needs beyond the paper: v, pure noise at the last step, a lag, Muon."""

import pytest
import torch
from torch import nn

from conftest import close, randn, seeded
from diffusion import Diffusion
from tiny import Muon, StaggeredDiffusion, VDiffusion

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
    # divided by its weight the loss is the error of a frame at every timestep
    assert close(loss / process.loss_weight(t, 4), torch.ones(1000).double(), 1e-6)


def test_single_frames_are_not_staggered():
    def model(z, t, context, fps):
        return (z + t.view(-1, 1, 1, 1, 1)).sin()

    results = []
    for process in (VDiffusion(), StaggeredDiffusion()):
        loss = process.loss(model, randn(3, 1, 2, 4, 4), CONTEXT, None,
                            torch.tensor([0, 500, 999]), randn(3, 1, 2, 4, 4, seed=1))
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
