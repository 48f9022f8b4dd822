"""Latent diffusion (paper §3.2): noise is added by a fixed schedule, a network learns to predict it, and sampling
walks the schedule backwards. Schedule, DDPM and DDIM are Stable Diffusion's, number for number; the paper names
none (see README, "Where the paper is silent"). Read `vae.py` next: what z is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLERS = ("ddim", "ddpm")


@dataclass
class DiffusionConfig:
    """The noise schedule and what the network predicts; the defaults are Stable Diffusion 1.x and the paper's loss."""

    steps: int = 1000  # T
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False  # whether z_T is pure noise (Lin et al. 2023); SD leaves 0.07 z_0 in it
    prediction: str = "epsilon"  # what the network returns: "epsilon" (paper) or "v_prediction"
    frame_lag: int = 0  # steps by which each frame is noisier than the one before it (ours); 0 = all alike (paper)
    guidance_power: float = 0.0  # guidance falls towards 1 as (t / T)^power, for small models (ours); 0 = constant (SD)
    guidance_rescale: float = 0.0  # how far guided outputs are brought back to their spread (Lin et al. 2023); 0 = SD


class Diffusion:
    """q(z_t | z_0), the training loss and the samplers; t counts 0 .. T-1 as in Stable Diffusion.

    Raises ValueError for an unknown prediction, and for one that cannot do without signal in z_T.
    """

    def __init__(self, config: DiffusionConfig | None = None):
        self.config = config = config or DiffusionConfig()
        if config.prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f'prediction "{config.prediction}" is unknown: use "epsilon" or "v_prediction"')
        # "scaled linear": the square roots of the betas are evenly spaced (matches SD)
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.steps) ** 2
        # alpha_bar_t: made in float32 as diffusers makes it, then kept in float64 so that nothing else is rounded
        self.alphas_cumprod = (1 - betas).cumprod(0).double()
        if config.zero_terminal_snr:
            if config.prediction == "epsilon":
                raise ValueError('zero_terminal_snr needs prediction "v_prediction": eps says nothing of z_0 at T')
            # sqrt(alpha_bar) moved and stretched until its last value is 0 and its first stays
            root = self.alphas_cumprod.sqrt()
            self.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def alpha_bar(self, t: Tensor | int, like: Tensor, done: float | None = None) -> Tensor:
        """alpha_bar of steps t, one or (b,) or (b, f), in float64, shaped to multiply `like` (b, f, ...).

        Below step 0 it is `done`, by default that of step 0 (matches SD).
        """
        t = torch.as_tensor(t).cpu()
        alpha = self.alphas_cumprod[t.clamp(0, self.config.steps - 1)]
        alpha = alpha if done is None else torch.where(t < 0, done, alpha)
        return alpha.view(*alpha.shape, *[1] * (like.ndim - alpha.ndim)).to(like.device)

    def coefficients(self, t: Tensor | int, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t) of steps t, one or (b,) or (b, f), shaped to multiply `like`."""
        alpha = self.alpha_bar(t, like)
        return alpha.sqrt().to(like), (1 - alpha).sqrt().to(like)

    def frame_steps(self, t: Tensor, frames: int, fps: Tensor | None) -> Tensor:
        """Step t (b,) of a clip -> those of its frames (b, f); t itself without lag.

        Below 0 a frame is done, above T-1 it is pure noise until its turn comes.

        A causal frame cannot give way to a later one: where all are equally noisy, each settles for a place of its own
        and the object jumps. With a lag, frames settle in turn, and each sees those before it more clearly than
        itself (ours, in the spirit of AR-Diffusion, Wu et al. 2023).
        """
        lag, last = self.config.frame_lag, self.config.steps - 1
        if not lag or fps is None:
            return t
        # t_i = t (T-1 + lag (f-1)) / (T-1) - lag (f - i) for i = 1 .. f: the last frame is the noisiest
        stretched = t + t * lag * (frames - 1) // last
        return stretched[:, None] - lag * torch.arange(frames - 1, -1, -1)  # (b, f)

    def counted(self, frames: int, fps: Tensor | None) -> float:
        """The part of a clip's frames that the loss counts, on average over t: 1 without lag."""
        t = self.frame_steps(torch.arange(self.config.steps), frames, fps)
        return ((t >= 0) & (t < self.config.steps)).double().mean().item()

    def add_noise(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """q(z_t | z_0): z0, eps (b, f, c, h, w), t (b,) or (b, f) -> z_t (b, f, c, h, w) (paper §3.2)."""
        # z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps
        signal, noise = self.coefficients(t, z0)
        return signal * z0 + noise * eps

    def loss(self, model: Callable, z0: Tensor, context: Tensor, fps: Tensor | None,
             generator: torch.Generator | None = None) -> Tensor:
        """|| eps - eps_hat(z_t, t, context, fps) ||^2, t uniform in [0, T), averaged over everything (paper §3.2).

        z0 (b, f, c, h, w), context (b, l, d), fps (b,) or None for the image model -> scalar. With "v_prediction" the
        network is compared with v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans and Ho 2022); with a
        `frame_lag`, frames whose turn is over or has not come are left out: sampling does not ask for them (both ours).
        Training averages `errors` itself, so that parts of a batch add up: `losses.unet_loss`.
        """
        errors, t = self.errors(model, z0, context, fps, generator)
        return errors[t >= 0].mean()

    def errors(self, model: Callable, z0: Tensor, context: Tensor, fps: Tensor | None,
               generator: torch.Generator | list[torch.Generator] | None = None) -> tuple[Tensor, Tensor]:
        """What `loss` averages: each frame's squared error (b, f), and its step (b, f), -1 where it is left out."""
        if isinstance(generator, list):  # one for each clip, as in `sample`
            drawn = torch.cat([torch.randint(self.config.steps, (1,), generator=g) for g in generator])  # (b,)
        else:
            drawn = torch.randint(self.config.steps, (len(z0),), generator=generator)
        drawn = self.frame_steps(drawn, z0.shape[1], fps)  # (b,) or (b, f)
        t = drawn.clamp(0, self.config.steps - 1)
        eps = normal(z0.shape, generator).to(z0)
        predicted = model(self.add_noise(z0, eps, t), t.to(z0.device), context, fps)
        target = eps
        if self.config.prediction == "v_prediction":
            # v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0
            signal, noise = self.coefficients(t, z0)
            target = signal * eps - noise * z0
        errors = (predicted.float() - target.float()).square().mean((2, 3, 4))  # (b, f)
        t = torch.where(drawn == t, t, -1)
        return errors, t.view(len(t), -1).expand(errors.shape).to(errors.device)

    @torch.no_grad()
    def sample(self, model: Callable, shape: tuple[int, ...], context: Tensor, uncond: Tensor, fps: Tensor | None,
               sampler: str = "ddim", steps: int = 50, guidance: float = 7.5, eta: float = 0.0,
               generator: torch.Generator | list[torch.Generator] | None = None,
               progress: Callable = lambda steps: steps) -> Tensor:
        """Noise to latents: shape (b, f, c, h, w), context and uncond (b, l, d), fps (b,) -> z_0 of that shape.

        `sampler` is "ddim" (eta 0 deterministic, eta 1 as noisy as DDPM) or "ddpm"; `generator` is one for the batch or
        a list with one for each clip; `progress` wraps the list of steps. Raises ValueError for a sampler that is
        unknown, an eta outside 0 .. 1, or a number of steps outside 1 .. T.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f'sampler "{sampler}" is unknown: use {" or ".join(SAMPLERS)}')
        if not 0 <= eta <= 1:
            raise ValueError(f"eta {eta}: give 0 to 1")
        z, visited = normal(shape, generator).to(context), self.timesteps(steps)
        for t, previous in progress(list(zip(visited, [*visited[1:], -1]))):
            t, previous = (self.frame_steps(torch.full(shape[:1], n), shape[1], fps) for n in (t, previous))
            output = self.guided(model, z, t, context, uncond, fps, guidance)
            eps = normal(shape, generator).to(z) if (sampler == "ddpm" or eta > 0) else torch.zeros_like(z)
            if sampler == "ddim":
                stepped = self.ddim_step(z, output, t, previous, eta, eps)
            else:
                stepped = self.ddpm_step(z, output, t, previous, eps)
            # frames that are done, or whose turn has not come, stay as they are
            moves = ((previous < self.config.steps - 1) & (t >= 0)).view(*t.shape, *[1] * (z.ndim - t.ndim))
            z = torch.where(moves.to(z.device), stepped, z)
        return z

    def timesteps(self, steps: int) -> list[int]:
        """The visited t, high to low: "leading" spacing with offset 1, 50 steps are 981, 961 .. 1 (matches SD).

        Where z_T is pure noise the first must be T-1: "trailing" spacing, 999, 979 .. 19 (Lin et al. 2023).
        """
        total = self.config.steps
        if not 1 <= steps <= total:
            raise ValueError(f"{steps} sampling steps asked for: give 1 to {total}")
        if self.config.zero_terminal_snr:
            return [round(total - i * total / steps) - 1 for i in range(steps)]
        stride = total // steps
        offset = 1 if steps < total else 0  # all 1000 steps: 999 .. 0, there is no step 1000
        return [i * stride + offset for i in reversed(range(steps))]

    def guided(self, model: Callable, z: Tensor, t: Tensor | int, context: Tensor, uncond: Tensor, fps: Tensor | None,
               guidance: float) -> Tensor:
        """Classifier-free guidance (paper §3): the output pushed away from the one without text, shape of z."""
        t = torch.as_tensor(t).clamp(0, self.config.steps - 1)
        t = (t if t.ndim else t.expand(len(z))).to(z.device)  # (b,) or (b, f)
        if guidance == 1:
            return model(z, t, context, fps)
        if self.config.guidance_power:  # text settles place and motion first; pushed on, edges and colors overshoot
            # s_t = 1 + (s - 1) (t / T)^power
            falling = (t.cpu().double() / self.config.steps) ** self.config.guidance_power
            guidance = 1 + (guidance - 1) * falling.view(*t.shape, *[1] * (z.ndim - t.ndim)).to(z)
        # both halves in one batch: uncond + s (cond - uncond)
        both = model(torch.cat([z, z]), torch.cat([t, t]), torch.cat([uncond, context]),
                     None if fps is None else torch.cat([fps, fps]))
        without, given = both.chunk(2)
        guided = without + guidance * (given - without)
        if self.config.guidance_rescale:
            # guided * (1 + rescale (std(given) / std(guided) - 1)): guidance makes values too large; each clip (frame,
            # where each has a step of its own) gets back the spread of the output with text
            dims = tuple(range(t.ndim, z.ndim))
            spread = given.std(dims, keepdim=True) / guided.std(dims, keepdim=True)
            guided = guided * (1 + self.config.guidance_rescale * (spread - 1))
        return guided

    def split(self, z: Tensor, output: Tensor, t: Tensor | int) -> tuple[Tensor, Tensor]:
        """What the network's output at step t says of z_t: (z_0_hat, eps_hat), each of z's shape."""
        signal, noise = self.coefficients(t, z)
        if self.config.prediction == "v_prediction":
            # z_0_hat = sqrt(alpha_bar_t) z_t - sqrt(1 - alpha_bar_t) v
            # eps_hat = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) z_t
            return signal * z - noise * output, signal * output + noise * z
        # z_0_hat = (z_t - sqrt(1 - alpha_bar_t) eps_hat) / sqrt(alpha_bar_t)
        return (z - noise * output) / signal, output

    def ddim_step(self, z: Tensor, output: Tensor, t: Tensor | int, previous: Tensor | int, eta: float,
                  eps: Tensor) -> Tensor:
        """z_t -> z_previous (paper §3; DDIM, Song et al. 2021, eq. 12); alpha_bar below 0 is that of 0 (as SD)."""
        alpha, alpha_previous = self.alpha_bar(t, z), self.alpha_bar(previous, z)
        z0_hat, eps_hat = self.split(z, output, t)
        # sigma^2 = eta^2 (1 - alpha_bar_prev) / (1 - alpha_bar) (1 - alpha_bar / alpha_bar_prev)
        variance = eta**2 * (1 - alpha_previous) / (1 - alpha) * (1 - alpha / alpha_previous)
        # z_prev = sqrt(alpha_bar_prev) z_0_hat + sqrt(1 - alpha_bar_prev - sigma^2) eps_hat + sigma eps
        signal, noise, sigma = (x.sqrt().to(z) for x in (alpha_previous, 1 - alpha_previous - variance, variance))
        return signal * z0_hat + noise * eps_hat + sigma * eps

    def ddpm_step(self, z: Tensor, output: Tensor, t: Tensor | int, previous: Tensor | int, eps: Tensor) -> Tensor:
        """z_t -> z_previous, from q(z_prev | z_t, z_0_hat) (paper §3; DDPM, Ho et al. 2020, eq. 7; matches SD)."""
        alpha, alpha_previous = self.alpha_bar(t, z), self.alpha_bar(previous, z, done=1.0)
        beta = 1 - alpha / alpha_previous  # of the whole stride from previous to t
        z0_hat, _ = self.split(z, output, t)
        # mean = sqrt(alpha_bar_prev) beta / (1 - alpha_bar) z_0_hat
        #      + sqrt(alpha_bar / alpha_bar_prev) (1 - alpha_bar_prev) / (1 - alpha_bar) z_t
        of_z0, of_z = alpha_previous.sqrt() * beta / (1 - alpha), (1 - beta).sqrt() * (1 - alpha_previous) / (1 - alpha)
        # variance = (1 - alpha_bar_prev) / (1 - alpha_bar) beta
        sigma = ((1 - alpha_previous) / (1 - alpha) * beta).sqrt()
        return of_z0.to(z) * z0_hat + of_z.to(z) * z + sigma.to(z) * eps


def normal(shape: tuple[int, ...], generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    """Standard normal noise of `shape`, drawn on the CPU so that a seed gives the same clip on every device (ours).

    A list of generators gives each clip its own, so that a clip does not depend on its neighbours in the batch.
    """
    if isinstance(generator, list):
        if len(generator) != shape[0]:
            raise ValueError(f"{len(generator)} generators for {shape[0]} clips: give one for each")
        return torch.stack([torch.randn(shape[1:], generator=g) for g in generator])
    return torch.randn(shape, generator=generator)
