"""Schedule, loss and samplers: diffusers' steps to the ninth digit, and what must hold for any model at all.

The models here are formulas: an oracle that knows z_0, a line in the text. Tests that compare with diffusers skip with
a reason where it is not installed.
"""

import math
from functools import partial

import pytest
import torch

import diffusion
from conftest import close, randn
from diffusion import Diffusion, DiffusionConfig

PREDICTIONS = ["epsilon", "v_prediction"]
SHAPE = (3, 2, 4, 2, 3)                                     # b, f, c, h, w
CONTEXT, UNCOND, FPS = randn(3, 5, 6, seed=1), randn(3, 5, 6, seed=2), torch.tensor([8.0, 12.0, 24.0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=PREDICTIONS)
def process(request):
    return Diffusion(DiffusionConfig(prediction=request.param))


def oracle(process, z0):
    """A perfect model: what it returns at z_t is exactly what leads back to z0."""
    def model(z, t, context, fps):
        signal, noise = process.coefficients(t, z)
        eps = (z - signal * z0) / noise
        return eps if process.config.prediction == "epsilon" else signal * eps - noise * z0
    return model


def wavy(z, t, context, fps):
    """A model of everything that it is given, the same for each clip alone or in a batch."""
    wave = (z * 3 + t.view(-1, 1, 1, 1, 1) / 100).sin() + context.mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
    return wave if fps is None else wave + fps.view(-1, 1, 1, 1, 1).to(z) / 24


# ---------------------------------------------------------------------------------------------------------------------
# Adding noise


def test_noisy_latents_are_the_closed_form_with_every_clips_own_step():
    process, z0, eps = Diffusion(), randn(*SHAPE), randn(*SHAPE, seed=1)
    t = torch.tensor([0, 500, 999])
    z = process.add_noise(z0, eps, t)
    for i in range(3):
        alpha = math.prod(1 - (0.00085**0.5 + n / 999 * (0.012**0.5 - 0.00085**0.5)) ** 2 for n in range(int(t[i]) + 1))
        assert close(z[i], alpha**0.5 * z0[i] + (1 - alpha) ** 0.5 * eps[i], 1e-5)         # the schedule is float32


def test_noise_keeps_the_variance_of_latents_at_one():
    signal, noise = Diffusion().coefficients(torch.arange(1000), torch.zeros(1000, 1, dtype=torch.float64))
    assert close(signal**2 + noise**2, torch.ones(1000, 1), 1e-12)
    z = Diffusion().add_noise(randn(1, 100_000), randn(1, 100_000, seed=1), torch.tensor([300]))
    assert z.std().item() == pytest.approx(1, abs=0.01)


def test_noise_grows_with_every_step_from_almost_none_to_almost_all():
    alphas = Diffusion().alphas_cumprod
    assert (alphas.diff() < 0).all() and alphas[0] > 0.999 and alphas[-1] < 0.005


@pytest.mark.parametrize("t", [0, 1, 500, 981, 999])
def test_a_perfect_output_splits_into_the_latents_and_the_noise_it_was_made_of(process, t):
    z0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
    steps = torch.full((3,), t)
    z = process.add_noise(z0, eps, steps)
    z0_hat, eps_hat = process.split(z, oracle(process, z0)(z, steps, None, None), t)
    assert close(z0_hat, z0, 1e-12) and close(eps_hat, eps, 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def recorded(model, calls):
    """The model, noting what it is given and what it returns."""
    def recording(z, t, context, fps):
        output = model(z, t, context, fps)
        calls.append((z, t, context, fps, output))
        return output
    return recording


def test_a_perfect_model_has_no_loss(process):
    z0 = randn(*SHAPE)
    assert process.loss(oracle(process, z0), z0, CONTEXT, FPS, seeded()).item() < 1e-12


def test_the_papers_loss_is_the_plain_mean_squared_error_to_the_noise():
    process, z0, calls = Diffusion(), randn(*SHAPE), []
    loss = process.loss(recorded(wavy, calls), z0, CONTEXT, FPS, seeded())
    ((z, t, context, fps, output),) = calls
    eps = oracle(process, z0)(z, t, context, fps)           # the noise that takes z0 to z
    assert loss.item() == pytest.approx((output - eps).square().mean().item(), rel=1e-6)
    assert context is CONTEXT and fps is FPS and abs(eps.std().item() - 1) < 0.2


def test_v_is_compared_with_sqrt_alpha_bar_eps_minus_sqrt_one_minus_alpha_bar_z0():
    process, z0, calls = Diffusion(DiffusionConfig(prediction="v_prediction")), randn(*SHAPE), []
    loss = process.loss(recorded(wavy, calls), z0, CONTEXT, FPS, seeded())
    ((z, t, _, _, output),) = calls
    alpha = process.alphas_cumprod[t].view(-1, 1, 1, 1, 1)
    eps = (z - alpha.sqrt() * z0) / (1 - alpha).sqrt()
    v = alpha.sqrt() * eps - (1 - alpha).sqrt() * z0
    assert loss.item() == pytest.approx((output - v).square().mean().item(), rel=1e-6)


def test_training_steps_are_uniform_over_0_to_999():
    calls = []
    z0, context = torch.zeros(20_000, 1, 1, 1, 1), torch.zeros(20_000, 1, 1)
    Diffusion().loss(recorded(lambda z, t, *rest: z, calls), z0, context, None, seeded())
    t = calls[0][1]
    assert (t.min(), t.max()) == (0, 999)
    assert t.double().mean().item() == pytest.approx(499.5, abs=5 * 289 / 20_000**0.5)
    assert ((t // 100).bincount(minlength=10) - 2000).abs().max() < 5 * 1800**0.5


def test_zero_terminal_snr_ends_in_pure_noise_as_diffusers_rescales():
    process, plain = Diffusion(DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction")), Diffusion()
    assert process.alphas_cumprod[-1] == 0 and process.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0])
    assert (process.alphas_cumprod.diff() < 0).all()
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim", reason="diffusers is not installed")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    theirs = (1 - scheduling.rescale_zero_terminal_snr(betas)).cumprod(0)
    assert close(process.alphas_cumprod, theirs.double(), 1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [50, 1000])
def test_an_oracle_is_followed_from_pure_noise(sampler, steps):
    process, z0 = Diffusion(DiffusionConfig(zero_terminal_snr=True, prediction="v_prediction")), randn(*SHAPE)
    z = process.sample(oracle(process, z0), SHAPE, CONTEXT, UNCOND, FPS, sampler, steps, 1.0, 1.0, seeded())
    assert close(z, z0, 0.1)


def test_eps_is_refused_where_the_last_step_holds_no_signal():
    with pytest.raises(ValueError, match="v_prediction"):
        Diffusion(DiffusionConfig(zero_terminal_snr=True))


LAGGED = DiffusionConfig(prediction="v_prediction", zero_terminal_snr=True, frame_lag=100)


def test_with_a_lag_each_frame_is_that_many_steps_noisier_than_the_one_before_and_all_begin_and_end_alike():
    process, t = Diffusion(LAGGED), torch.arange(1000)
    steps = process.frame_steps(t, 4, FPS)                                                 # (1000, 4)
    assert (steps[-1] >= 999).all() and (steps[0] <= 0).all() and (process.frame_steps(t[:1] - 1, 4, FPS) < 0).all()
    assert (steps.diff(dim=1) == 100).all() and (steps.diff(dim=0) >= 1).all()
    assert steps[-1, 0] == 999 and steps[0, -1] == 0 and ((steps >= 0) & (steps <= 999)).any(1).all()
    for i in range(4):
        assert ((steps[:, i] >= 0) & (steps[:, i] <= 999)).sum() > 700


def test_without_a_lag_or_without_fps_a_clip_has_one_step():
    t = torch.tensor([0, 500, 999])
    assert Diffusion().frame_steps(t, 4, FPS) is t and Diffusion(LAGGED).frame_steps(t, 4, None) is t


def test_with_a_lag_frames_that_are_done_or_whose_turn_has_not_come_are_left_out_of_the_loss():
    process, seen = Diffusion(LAGGED), []

    def model(z, t, context, fps):
        seen.append(t)
        absurd = (t == 0) | (t == 999)
        return z * 0 + torch.where(absurd, 1e6, 0.0).view(*t.shape, 1, 1, 1)

    z0 = torch.zeros(200, 4, 1, 2, 2, dtype=torch.float64)
    _, t = process.errors(model, z0, torch.zeros(200, 1, 1), torch.ones(200), seeded())
    assert (seen[0][t >= 0] == t[t >= 0]).all() and set(seen[0][t < 0].tolist()) == {0, 999}
    for end in (0, 999):  # these steps themselves are in the loss, but rare
        assert 0.05 < ((seen[0] == end) & (t < 0)).double().mean() < 0.2 and (t == end).double().mean() < 0.01
    loss = process.loss(model, z0, torch.zeros(200, 1, 1), torch.ones(200), seeded())
    assert loss < 1e12 * 0.01
    assert Diffusion(LAGGED).loss(oracle(process, z0), z0, torch.zeros(200, 1, 1), torch.ones(200), seeded()) < 1e-12


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("steps", [10, 50, 1000])
def test_with_a_lag_an_oracle_is_followed_from_pure_noise_frame_after_frame(sampler, eta, steps):
    process, z0, seen = Diffusion(LAGGED), randn(3, 5, 2, 4, 4), []

    def model(z, t, context, fps):
        seen.append((z.clone(), t))
        signal, noise = process.coefficients(t, z)
        return signal * (z - signal * z0) / noise - noise * z0

    context = torch.zeros(3, 1, 1, dtype=torch.float64)
    end = process.sample(model, z0.shape, context, context, FPS, sampler, steps, 1, eta, seeded())
    # DDIM ends at step 0, where a thousandth of the variance is still noise (matches SD)
    assert close(end, z0, 1e-9 if sampler == "ddpm" else 0.2) and (end - z0).std() < 0.05
    for (z, t), (later, next_t) in zip(seen, seen[1:]):
        waits, moves = ((same & (t > 0)).view(3, 5, 1, 1, 1).expand_as(z) for same in (t == next_t, t != next_t))
        assert torch.equal(z[waits], later[waits]) and (z[moves] != later[moves]).all()
    (_, t), (z, next_t) = seen[-2:]
    done = (next_t == 0) & (t == 0)                                                        # some steps before the end
    assert torch.equal(z[done], end[done]) and done.any()


def test_the_same_seed_gives_the_same_loss():
    first, again, other = (Diffusion().loss(wavy, randn(*SHAPE), CONTEXT, FPS, seeded(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_guidance_power_lowers_guidance_with_the_square_of_the_step():
    z, plain, falling = randn(*SHAPE), Diffusion(), Diffusion(DiffusionConfig(guidance_power=2.0))
    for t, weight in ((999, 1 + 6.5 * 0.999**2), (500, 1 + 6.5 / 4)):
        wanted = plain.guided(wavy, z, t, CONTEXT, UNCOND, FPS, weight)
        assert close(falling.guided(wavy, z, t, CONTEXT, UNCOND, FPS, 7.5), wanted, 1e-12)
    alone = wavy(z, torch.full((3,), 500), CONTEXT, FPS)
    assert close(falling.guided(wavy, z, 500, CONTEXT, UNCOND, FPS, 1.0), alone, 0)


# ---------------------------------------------------------------------------------------------------------------------
# Against diffusers


def diffusers_scheduler(sampler, prediction="epsilon"):
    """Stable Diffusion's scheduler, its table in float64.

    diffusers keeps alphas_cumprod, and so every step, in float32, good for six digits. The values stay the ones it
    made; only the arithmetic after them is exact, so that steps can be compared to the ninth digit.
    """
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: nothing to compare with")
    config = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading",
                  steps_offset=1, clip_sample=False, prediction_type=prediction)
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(**config, set_alpha_to_one=False)
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    else:
        scheduler = diffusers.DDPMScheduler(**config, variance_type="fixed_small")
        scheduler.one = scheduler.one.double()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def test_the_schedule_is_stable_diffusions_bit_for_bit():
    assert torch.equal(Diffusion().alphas_cumprod, diffusers_scheduler("ddim").alphas_cumprod)


def test_noisy_latents_and_v_are_those_of_diffusers():
    scheduler, process = diffusers_scheduler("ddim"), Diffusion(DiffusionConfig(prediction="v_prediction"))
    z0, eps, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0, 500, 999])
    assert close(process.add_noise(z0, eps, t), scheduler.add_noise(z0, eps, t), 1e-12)
    z = process.add_noise(z0, eps, t)
    assert close(oracle(process, z0)(z, t, None, None), scheduler.get_velocity(z0, eps, t), 1e-9)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 7, 20, 50, 300, 500, 501, 999])
def test_the_visited_steps_are_those_of_diffusers(sampler, steps):
    scheduler = diffusers_scheduler(sampler)
    scheduler.set_timesteps(steps)
    assert Diffusion().timesteps(steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 7, 10, 50, 300, 501, 1000])
def test_where_the_last_step_is_pure_noise_sampling_begins_there_as_in_diffusers_trailing_spacing(sampler, steps):
    scheduler = diffusers_scheduler(sampler)
    scheduler = type(scheduler).from_config(scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert Diffusion(LAGGED).timesteps(steps) == scheduler.timesteps.tolist()


def test_all_1000_steps_are_visited_where_diffusers_asks_for_a_step_1000_that_does_not_exist():
    scheduler = diffusers_scheduler("ddim")
    scheduler.set_timesteps(1000)
    assert scheduler.timesteps[0] == 1000 and len(scheduler.alphas_cumprod) == 1000
    assert Diffusion().timesteps(1000) == list(range(999, -1, -1))


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 0.5), ("ddim", 1.0), ("ddpm", 0.0)])
@pytest.mark.parametrize("steps", [1, 7, 50, 999])
def test_whole_trajectories_are_those_of_diffusers(process, monkeypatch, sampler, eta, steps):
    scheduler = diffusers_scheduler(sampler, process.config.prediction)
    scheduler.set_timesteps(steps)
    step = scheduler.step if sampler == "ddpm" else partial(scheduler.step, eta=eta)
    generator = seeded()
    theirs = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    for t in scheduler.timesteps:
        output = wavy(theirs, t.expand(3), CONTEXT, FPS)
        theirs = step(output, t, theirs, generator=generator).prev_sample

    # ours draws in float32, theirs in the latents' own float64: the same draws for both
    monkeypatch.setattr(diffusion, "normal", lambda shape, g: torch.randn(shape, generator=g, dtype=torch.float64))
    ours = process.sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, sampler, steps, guidance=1, eta=eta, generator=seeded())
    assert close(ours, theirs, 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Sampling


@pytest.mark.parametrize("steps", [1, 2, 7, 20, 50, 300, 501, 999, 1000])
def test_the_visited_steps_fall_from_high_to_low_inside_0_to_999(steps):
    visited = Diffusion().timesteps(steps)
    assert len(visited) == steps and visited == sorted(set(visited), reverse=True)
    assert visited[0] <= 999 and visited[-1] == (0 if steps == 1000 else 1)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
def test_no_steps_or_more_than_there_are_is_refused_with_the_number(steps):
    with pytest.raises(ValueError, match=f"^{steps} sampling steps.*1 to 1000"):
        Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, steps=steps)


def test_an_unknown_sampler_or_prediction_is_refused():
    with pytest.raises(ValueError, match='sampler "euler".*ddim.*ddpm'):
        Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, sampler="euler")
    with pytest.raises(ValueError, match='prediction "x0".*epsilon.*v_prediction'):
        Diffusion(DiffusionConfig(prediction="x0"))


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 501, 999, 1000])
def test_ddim_with_an_oracle_walks_straight_to_its_latents_and_keeps_the_noise_of_step_0(process, steps):
    z0, first = randn(*SHAPE), process.timesteps(steps)[0]
    model, start = oracle(process, z0), torch.randn(SHAPE, generator=seeded()).double()
    _, eps = process.split(start, model(start, torch.full((3,), first), None, None), first)
    ours = process.sample(model, SHAPE, CONTEXT, UNCOND, FPS, "ddim", steps, guidance=1, generator=seeded())
    assert close(ours, process.add_noise(z0, eps, torch.zeros(3, dtype=torch.int64)), 1e-9)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 500, 501, 999, 1000])
def test_ddpm_with_an_oracle_ends_at_its_latents_exactly(process, steps):
    z0 = randn(*SHAPE)
    model = oracle(process, z0)
    ours = process.sample(model, SHAPE, CONTEXT, UNCOND, FPS, "ddpm", steps, guidance=1, generator=seeded())
    assert close(ours, z0, 1e-9)


def test_ddpm_and_ddim_with_eta_1_are_the_same_step(process):
    z, output, eps = (randn(*SHAPE, seed=seed) for seed in range(3))
    for t, previous in ((981, 961), (500, 499), (21, 1)):
        ddim, ddpm = process.ddim_step(z, output, t, previous, 1.0, eps), process.ddpm_step(z, output, t, previous, eps)
        assert close(ddim, ddpm, 1e-9)


def test_a_ddpm_step_from_a_perfect_model_has_the_variance_of_the_step_it_goes_to(process):
    z0, eps, fresh = (randn(1, 100_000, seed=seed) for seed in range(3))
    z = process.add_noise(z0, eps, torch.tensor([500]))
    output = oracle(process, z0)(z, torch.tensor([500]), None, None)
    left = process.ddpm_step(z, output, 500, 480, fresh) - process.alphas_cumprod[480].sqrt() * z0
    assert left.var().item() == pytest.approx(1 - process.alphas_cumprod[480].item(), rel=0.02)


# ---------------------------------------------------------------------------------------------------------------------
# Guidance and seeds


def test_guidance_1_is_the_model_with_text_called_once_on_the_batch_as_it_is():
    calls, z = [], randn(*SHAPE)
    guided = Diffusion().guided(recorded(wavy, calls), z, 500, CONTEXT, UNCOND, FPS, 1)
    ((given, t, context, fps, output),) = calls
    assert guided is output and given is z and context is CONTEXT and fps is FPS and t.tolist() == [500] * 3


@pytest.mark.parametrize("fps", [FPS, None])
@pytest.mark.parametrize("guidance", [-1, 0, 0.5, 2, 7.5])
def test_guidance_is_a_line_from_the_model_without_text_through_the_model_with_it(guidance, fps):
    z, t = randn(*SHAPE), torch.full((3,), 500)
    without, given = wavy(z, t, UNCOND, fps), wavy(z, t, CONTEXT, fps)
    guided = Diffusion().guided(wavy, z, 500, CONTEXT, UNCOND, fps, guidance)
    assert close(guided, without + guidance * (given - without), 1e-12)
    assert guidance != 0 or close(guided, without, 0)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_same_seed_gives_the_same_clip_and_another_seed_another(sampler):
    first, again, other = (Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, sampler, 5, generator=seeded(seed))
                           for seed in (0, 0, 1))
    assert torch.equal(first, again) and (first != other).all()


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_with_a_generator_each_a_clip_does_not_depend_on_its_neighbours(sampler, eta):
    batch = Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, sampler, 5, eta=eta,
                               generator=[seeded(i) for i in range(3)])
    for i in range(3):
        context, uncond, fps = (x[i : i + 1] for x in (CONTEXT, UNCOND, FPS))
        alone = Diffusion().sample(wavy, (1, *SHAPE[1:]), context, uncond, fps, sampler, 5, eta=eta,
                                   generator=[seeded(i)])
        assert close(batch[i : i + 1], alone, 1e-12)


def test_an_eta_out_of_range_and_generators_that_are_no_clips_are_refused_with_their_numbers():
    for eta in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"^eta {eta}: give 0 to 1$"):
            Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, eta=eta)
    with pytest.raises(ValueError, match="^2 generators for 4 clips"):
        diffusion.normal((4, *SHAPE[1:]), [seeded()] * 2)


def test_ddim_without_eta_draws_nothing_after_the_first_latents():
    generator, fresh = seeded(), seeded()
    Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, "ddim", 5, generator=generator)
    torch.randn(SHAPE, generator=fresh)
    assert torch.equal(generator.get_state(), fresh.get_state())


def test_progress_sees_every_step():
    seen = []
    Diffusion().sample(wavy, SHAPE, CONTEXT, UNCOND, FPS, steps=7, progress=lambda steps: seen.extend(steps) or steps)
    assert len(seen) == 7


def test_rescaled_guidance_has_the_spread_of_the_output_with_text():
    outputs = randn(4, 2, 3, 4, 4)
    z, zeros = torch.zeros(2, 2, 3, 4, 4).double(), torch.zeros(2, 1, 1).double()

    def guided(rescale):
        diffusion = Diffusion(DiffusionConfig(guidance_rescale=rescale))
        return diffusion.guided(lambda *_: outputs, z, 500, zeros, zeros, None, 7.5)

    spread = outputs[2:].std((1, 2, 3, 4))
    torch.testing.assert_close(guided(1.0).std((1, 2, 3, 4)), spread)
    assert (guided(0.0).std((1, 2, 3, 4)) > 2 * spread).all()
    torch.testing.assert_close(guided(0.5), (guided(0.0) + guided(1.0)) / 2)
