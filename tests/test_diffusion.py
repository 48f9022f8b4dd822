"""Schedule, loss, samplers and guidance: diffusers' steps to the ninth digit, and beyond them.

The models here are formulas: an oracle that knows z_0, a wave of all that it is given. `tiny.py`'s
VDiffusion is tested beside `Diffusion` where the two must behave alike.
"""

import math
from functools import partial

import pytest
import torch

import diffusion
from conftest import NoFloat64, close, randn, recorded, seeded
from diffusion import Diffusion
from tiny import StaggeredDiffusion, VDiffusion
from unet3d import UNet3D, UNetConfig

SHAPE = (3, 2, 4, 2, 3)  # b, f, c, h, w
CONTEXT = randn(3, 5, 6, seed=1)
UNCOND = randn(3, 5, 6, seed=2)
FPS = torch.tensor([8.0, 12.0, 24.0])


@pytest.fixture(params=[Diffusion, VDiffusion])
def process(request):
    return request.param()


def oracle(process, z0):
    """A perfect model: at z_t it returns what leads back to z0, also where no signal is left."""
    def model(z, t, context, fps):
        alpha_bar = process.alpha_bar(t)
        eps = (z - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
        return process.target(z0, eps, t)
    return model


def wavy(z, t, context, fps):
    """A model of everything that it is given, the same for each clip alone or in a batch."""
    wave = (z * 3 + t.view(-1, 1, 1, 1, 1) / 100).sin() + context.mean((1, 2)).view(-1, 1, 1, 1, 1)
    return wave if fps is None else wave + fps.view(-1, 1, 1, 1, 1).to(z) / 24


def test_noisy_latents_are_the_closed_form_with_every_clips_own_timestep():
    z0 = randn(*SHAPE)
    eps = randn(*SHAPE, seed=1)
    t = torch.tensor([0, 500, 999])
    z = Diffusion().add_noise(z0, eps, t)
    for i in range(3):
        betas = [(0.00085**0.5 + n / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2
                 for n in range(int(t[i]) + 1)]
        alpha_bar = math.prod(1 - beta for beta in betas)
        expected = alpha_bar**0.5 * z0[i] + (1 - alpha_bar) ** 0.5 * eps[i]
        assert close(z[i], expected, 1e-5)  # the schedule is float32


def test_a_perfect_output_splits_into_latents_and_noise_and_has_no_loss(process):
    z0 = randn(*SHAPE)
    eps = randn(*SHAPE, seed=1)
    t = torch.tensor([0, 500, 998])
    z = process.add_noise(z0, eps, t)
    z0_hat, eps_hat = process.predict_z0_eps(z, oracle(process, z0)(z, t, None, None), t)
    assert close(z0_hat, z0, 1e-9) and close(eps_hat, eps, 1e-9)
    loss = process.loss(oracle(process, z0), z0, CONTEXT, FPS, t, eps)
    assert loss.shape == (3,) and loss.max() < 1e-12


def test_the_papers_loss_is_the_mean_squared_error_to_the_noise_of_each_clip():
    z0 = randn(*SHAPE)
    eps = randn(*SHAPE, seed=1)
    t = torch.tensor([0, 500, 999])
    calls = []
    loss = Diffusion().loss(recorded(wavy, calls), z0, CONTEXT, FPS, t, eps)
    ((z, given_t, context, fps),) = calls
    assert context is CONTEXT and fps is FPS and torch.equal(given_t, t)
    assert torch.equal(z, Diffusion().add_noise(z0, eps, t))
    errors = wavy(z, t, CONTEXT, FPS) - eps
    assert close(loss, torch.stack([error.square().mean() for error in errors]), 1e-12)


def test_every_clip_weighs_the_same_in_the_papers_loss():
    assert Diffusion().loss_weight(torch.tensor([0, 999]), 8).tolist() == [1, 1]


@pytest.mark.parametrize("kind", [Diffusion, VDiffusion, StaggeredDiffusion])
def test_float64_never_reaches_the_device(kind):
    # meta stands for an Apple GPU: what is computed there is checked, not its values
    with torch.device("meta"):
        unet = UNet3D(UNetConfig(channels=(8,), attention=(True,), layers=1, heads=2, groups=4,
                                 context_width=6, frames=2))
        z0 = torch.zeros(SHAPE)
        text = torch.zeros(3, 5, 6)
        fps = torch.zeros(3)
    t = torch.tensor([0, 500, 999])
    with NoFloat64():
        for rate in (fps, None):
            assert kind().loss(unet, z0, text, rate, t, z0).is_meta
            for sampler in ("ddim", "ddpm"):
                z = kind().sample(unet, SHAPE, text, text, rate, sampler, steps=2, eta=1.0)
                assert z.is_meta and z.dtype == torch.float32


def diffusers_scheduler(process, sampler):
    """Stable Diffusion's scheduler, its table in float64.

    diffusers keeps alphas_cumprod, and so every step, in float32, good for six digits. Only the
    arithmetic after them is made exact, so that steps can be compared to the ninth digit.
    """
    diffusers = pytest.importorskip("diffusers", reason="nothing to compare with: no diffusers")
    is_v = isinstance(process, VDiffusion)
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1,
                  clip_sample=False, timestep_spacing="trailing" if is_v else "leading",
                  prediction_type="v_prediction" if is_v else "epsilon",
                  rescale_betas_zero_snr=is_v)
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**config, set_alpha_to_one=False)
    else:
        scheduler = diffusers.DDPMScheduler(**config, variance_type="fixed_small")
        scheduler.one = scheduler.one.double()
    theirs = scheduler.alphas_cumprod.double()
    if is_v:  # theirs is computed from rounded betas, and so only nearly zero at the end
        assert close(process.alphas_cumprod, theirs, 1e-4)
        assert process.alphas_cumprod[-1] == 0
    else:
        assert torch.equal(process.alphas_cumprod, theirs)
    scheduler.alphas_cumprod = process.alphas_cumprod
    scheduler.final_alpha_cumprod = process.alphas_cumprod[0]
    return scheduler


@pytest.mark.parametrize("steps", [1, 7, 20, 50, 300, 500, 501, 999])
def test_schedule_noisy_latents_and_visited_timesteps_equal_those_of_diffusers(process, steps):
    scheduler = diffusers_scheduler(process, "ddim")
    z0 = randn(*SHAPE)
    eps = randn(*SHAPE, seed=1)
    t = torch.tensor([0, 500, 999])
    assert close(process.add_noise(z0, eps, t), scheduler.add_noise(z0, eps, t), 1e-12)
    scheduler.set_timesteps(steps)
    assert process.timesteps(steps) == scheduler.timesteps.tolist()


SAMPLERS = [("ddim", 0.0), ("ddim", 0.5), ("ddpm", 0.0), ("ddim", 1.0)]
TRAJECTORIES = [(Diffusion, steps, *sampler) for steps in (1, 7, 50, 999) for sampler in SAMPLERS]
# where T is no multiple of the steps, diffusers' trailing steps do not end where the next begins;
# and from pure noise with eta 1 it takes the root of what rounding has made negative
TRAJECTORIES += [(VDiffusion, steps, *sampler) for steps in (1, 50, 1000)
                 for sampler in SAMPLERS[:3]]


@pytest.mark.parametrize("kind, steps, sampler, eta", TRAJECTORIES)
def test_whole_trajectories_equal_those_of_diffusers(kind, steps, sampler, eta, monkeypatch):
    process = kind()
    scheduler = diffusers_scheduler(process, sampler)
    scheduler.set_timesteps(steps)
    step = scheduler.step if sampler == "ddpm" else partial(scheduler.step, eta=eta)
    generator = seeded()
    theirs = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        output = wavy(theirs, t.expand(3), CONTEXT, FPS)
        theirs = step(output, t, theirs, generator=generator).prev_sample

    # ours draws in float32, theirs in the latents' own float64: the same draws for both
    monkeypatch.setattr(diffusion, "seeded_randn", lambda shape, generator: torch.randn(
        shape, generator=generator, dtype=torch.float64))
    ours = process.sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, sampler, steps, guidance=1, eta=eta,
                          generator=seeded())
    assert close(ours, theirs, 1e-9)


def test_more_steps_than_there_are_and_none_are_refused(process):
    sample = partial(process.sample, wavy, SHAPE, CONTEXT, UNCOND, FPS)
    for steps in (-1, 0, 1001):
        with pytest.raises(ValueError, match=f"^{steps} sampling steps.*1 to 1000"):
            sample(steps=steps)
    # diffusers asks for a step 1000 where all 1000 are visited
    assert process.timesteps(1000) == [*range(999, -1, -1)]


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 501, 1000])
def test_an_oracle_is_followed_to_its_latents(steps):
    process = Diffusion()
    z0 = randn(*SHAPE)
    sample = partial(process.sample, oracle(process, z0), SHAPE, CONTEXT, UNCOND, FPS, steps=steps,
                     guidance=1)
    assert close(sample(sampler="ddpm", generator=seeded()), z0, 1e-9)
    # DDIM ends at timestep 0, with its noise (matches SD): the noise that the first latents held
    start = torch.randn(SHAPE, generator=seeded()).double()
    alpha_bar = process.alphas_cumprod[process.timesteps(steps)[0]]
    eps = (start - alpha_bar.sqrt() * z0) / (1 - alpha_bar).sqrt()
    expected = process.add_noise(z0, eps, torch.zeros(3, dtype=torch.int64))
    assert close(sample(sampler="ddim", generator=seeded()), expected, 1e-9)


@pytest.mark.parametrize("fps", [FPS, None])
def test_guidance_is_a_line_from_the_model_without_text_through_the_model_with_it(fps):
    z = randn(*SHAPE)
    t = torch.full((3,), 500)
    uncond = wavy(z, t, UNCOND, fps)
    cond = wavy(z, t, CONTEXT, fps)
    for guidance in (-1, 0, 0.5, 2, 7.5):
        output = Diffusion().guided_output(wavy, z, t, CONTEXT, UNCOND, fps, guidance)
        assert close(output, uncond + guidance * (cond - uncond), 1e-12)
    calls = []
    output = Diffusion().guided_output(recorded(wavy, calls), z, t, CONTEXT, UNCOND, fps, 1)
    assert len(calls) == 1 and calls[0][2] is CONTEXT and torch.equal(output, cond)
