"""Latent diffusion (paper §3.2): a fixed schedule adds noise, a network learns to predict it, and
sampling walks back.

The paper states the loss, noise prediction; of schedule, samplers (DDIM steps, DDPM steps) and
guidance it gives no numbers, so these are Stable Diffusion's. Timesteps t are 0 .. T-1. Read
`tiny.py` next: what the default presets do differently, and why.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

SAMPLERS = ("ddim", "ddpm")
Generators = torch.Generator | list[torch.Generator] | None  # a list holds one for each clip


@dataclass
class DiffusionConfig:
    """Noise schedule; the defaults are Stable Diffusion 1.x."""

    num_steps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012


class Diffusion:
    """q(z_t | z_0), the training loss and the samplers (paper §3.2; matches SD)."""

    def __init__(self, config: DiffusionConfig | None = None):
        config = config or DiffusionConfig()
        self.num_steps = config.num_steps
        # "scaled linear": the square roots of the betas are evenly spaced (matches SD)
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, self.num_steps) ** 2
        # alpha_bar_t = prod_{s <= t} (1 - beta_s), in float32 as in diffusers, then kept in float64
        self.alphas_cumprod = (1 - betas).cumprod(0).double()

    def alpha_bar(self, t: Tensor, after_last: float | None = None) -> Tensor:
        """Return alpha_bar_t for t (b,) or (b, f) as (b, 1 or f, 1, 1, 1), in float64 on the CPU.

        t = -1 means fully denoised: alpha_bar is `after_last`, or alpha_bar_0 (matches SD's DDIM).
        """
        t = t.cpu()
        alpha_bar = self.alphas_cumprod[t.clamp(min=0)]
        if after_last is not None:
            alpha_bar = alpha_bar.where(t >= 0, after_last)
        return alpha_bar.reshape(*t.shape, *[1] * (5 - t.ndim))

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Sample q(z_t | z_0): z0, eps (b, f, c, h, w), t (b,) or (b, f) -> z_t (paper §3.2)."""
        # z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps
        alpha_bar = self.alpha_bar(t)
        return cast(alpha_bar.sqrt(), z0) * z0 + cast((1 - alpha_bar).sqrt(), z0) * eps

    def loss(self, model: Callable, z0: Tensor, context: Tensor, fps: Tensor | None, t: Tensor,
             eps: Tensor) -> Tensor:
        """Return || eps - eps_hat(z_t, t, context, fps) ||^2 of each clip: what training minimises.

        z0 and eps (b, f, c, h, w), context (b, l, d), fps (b,) or None for the image model, t (b,)
        -> (b,): means over f, c, h, w (paper §3.2).
        """
        eps_hat = model(self.add_noise(z0, eps, t), t.to(z0.device), context, fps)
        return (eps_hat.to(z0) - self.target(z0, eps, t)).square().mean((1, 2, 3, 4))

    def loss_weight(self, t: Tensor, frames: int) -> Tensor:
        """Return the weight of a clip at timestep t (b,) in the loss, (b,): all weigh the same."""
        return torch.ones(len(t))

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what the network learns to predict: eps (paper §3.2)."""
        return eps

    @torch.no_grad()
    def sample(self, model: Callable, shape: tuple[int, ...], context: Tensor, uncond: Tensor,
               fps: Tensor | None, sampler: str = "ddim", steps: int = 50, guidance: float = 7.5,
               eta: float = 0.0, generator: Generators = None) -> Tensor:
        """Walk from noise to z_0: shape (b, f, c, h, w), context and uncond (b, l, d), fps (b,)."""
        network = partial(self.guided_output, model, context=context, uncond=uncond, fps=fps,
                          guidance=guidance)
        z = seeded_randn(shape, generator).to(context)
        timesteps = torch.tensor([*self.timesteps(steps), -1])
        for i in tqdm(range(steps), "sampling", leave=False, disable=None):
            t = timesteps[i].expand(len(z))
            t_prev = timesteps[i + 1].expand(len(z))
            noise = torch.zeros_like(z)
            if sampler == "ddpm" or eta > 0:
                noise = seeded_randn(shape, generator).to(z)
            z = self.step(network, z, t, t_prev, sampler, eta, noise)
        return z

    def step(self, network: Callable, z: Tensor, t: Tensor, t_prev: Tensor, sampler: str,
             eta: float, noise: Tensor) -> Tensor:
        """Step z_t -> z_{t_prev} by `network`, a function of z and t: predict, then denoise a bit.

        z (b, f, c, h, w), t and t_prev (b,) or (b, f). `tiny.py` steps only some of the frames.
        Raises ValueError for an unknown sampler.
        """
        output = network(z, t)
        if sampler == "ddim":
            return self.ddim_step(z, output, t, t_prev, eta, noise)
        if sampler == "ddpm":
            return self.ddpm_step(z, output, t, t_prev, noise)
        raise ValueError(f'sampler "{sampler}": use {" or ".join(SAMPLERS)}')

    def timesteps(self, steps: int) -> list[int]:
        """List the visited t: "leading" spacing, offset 1, so 50 steps are 981, 961 .. 1 (as SD)."""
        if not 1 <= steps <= self.num_steps:
            raise ValueError(f"{steps} sampling steps: give 1 to {self.num_steps}")
        stride = self.num_steps // steps
        offset = 1 if steps < self.num_steps else 0  # all 1000: 999 .. 0, there is no step 1000
        return [i * stride + offset for i in reversed(range(steps))]

    def guided_output(self, model: Callable, z: Tensor, t: Tensor, context: Tensor, uncond: Tensor,
                      fps: Tensor | None, guidance: float) -> Tensor:
        """Apply classifier-free guidance, uncond + s (cond - uncond) (paper §3; matches SD)."""
        t = t.to(z.device)
        if guidance == 1:
            return model(z, t, context, fps)
        fps = None if fps is None else torch.cat([fps, fps])
        output = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([uncond, context]), fps)
        uncond_output, cond_output = output.chunk(2)
        return uncond_output + guidance * (cond_output - uncond_output)

    def predict_z0_eps(self, z: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_0_hat and eps_hat, each shaped like z, from the network's output at step t."""
        # z_0_hat = (z_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)
        alpha_bar = self.alpha_bar(t)
        z0_hat = (z - cast((1 - alpha_bar).sqrt(), z) * output) / cast(alpha_bar.sqrt(), z)
        return z0_hat, output

    def ddim_step(self, z: Tensor, output: Tensor, t: Tensor, t_prev: Tensor, eta: float,
                  noise: Tensor) -> Tensor:
        """Step z_t -> z_{t_prev} by DDIM, t (b,) or (b, f) (§3; Song 2021, eq. 12; matches SD)."""
        alpha_bar = self.alpha_bar(t)
        alpha_bar_prev = self.alpha_bar(t_prev)
        z0_hat, eps_hat = self.predict_z0_eps(z, output, t)
        # with a for alpha_bar: sigma^2 = eta^2 (1 - a_prev) / (1 - a) (1 - a / a_prev)
        ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
        variance = eta**2 * ratio * (1 - alpha_bar / alpha_bar_prev)
        # z_prev = sqrt(a_prev) z_0_hat + sqrt(1 - a_prev - sigma^2) eps_hat + sigma noise
        coef_eps = (1 - alpha_bar_prev - variance).sqrt()
        z_prev = cast(alpha_bar_prev.sqrt(), z) * z0_hat + cast(coef_eps, z) * eps_hat
        return z_prev + cast(variance.sqrt(), z) * noise

    def ddpm_step(self, z: Tensor, output: Tensor, t: Tensor, t_prev: Tensor,
                  noise: Tensor) -> Tensor:
        """Step z_t -> z_{t_prev} by DDPM: q(z_prev | z_t, z_0_hat), t (b,) or (b, f) (§3, SD)."""
        alpha_bar = self.alpha_bar(t)
        alpha_bar_prev = self.alpha_bar(t_prev, after_last=1.0)
        beta = 1 - alpha_bar / alpha_bar_prev  # of the whole stride from t_prev to t
        ratio = (1 - alpha_bar_prev) / (1 - alpha_bar)
        z0_hat, _ = self.predict_z0_eps(z, output, t)
        # eq. 7: mean = sqrt(a_prev) beta / (1 - a) z_0_hat + sqrt(1 - beta) ratio z_t
        coef_z0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
        coef_zt = (1 - beta).sqrt() * ratio
        sigma = (ratio * beta).sqrt()
        return cast(coef_z0, z) * z0_hat + cast(coef_zt, z) * z + cast(sigma, z) * noise


def cast(factor: Tensor, z: Tensor) -> Tensor:
    """Convert a float64 factor to z's type, then move it to z's device: Apple GPUs lack float64."""
    return factor.to(z.dtype).to(z.device)


def seeded_randn(shape: tuple[int, ...], generator: Generators) -> Tensor:
    """Draw N(0, 1) on the CPU, so that a seed gives the same clip on every device (ours)."""
    if isinstance(generator, list):
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])
    return torch.randn(shape, generator=generator)
