"""What a 64-pixel model trained from scratch in minutes needs beyond the paper, and why (all ours).

Presets `tiny` and `laptop` train and sample by `StaggeredDiffusion` and train with `Muon`; `small`
and `paper` do as `diffusion.py` says. `VDiffusion` is for the cascade too, `VPrediction` for models
from SD that predict v: the velocity, not the frame rate of the same letter. Each trick was measured
(docs/measurements.md). Read `vae.py` next: what z is.
"""

import torch
from torch import Tensor

from diffusion import Diffusion, DiffusionConfig, cast


class VPrediction(Diffusion):
    """Diffusion by a network that predicts v (Salimans and Ho 2022), as some models from SD do."""

    def target(self, z0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) z_0, shaped like z0."""
        alpha_bar = self.alpha_bar(t)
        return cast(alpha_bar.sqrt(), z0) * eps - cast((1 - alpha_bar).sqrt(), z0) * z0

    def predict_z0_eps(self, z: Tensor, output: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return z_0_hat and eps_hat, each shaped like z, from v at step t."""
        alpha_bar = self.alpha_bar(t)
        signal = cast(alpha_bar.sqrt(), z)
        noise = cast((1 - alpha_bar).sqrt(), z)
        # z_0_hat = sqrt(alpha_bar) z_t - sqrt(1 - alpha_bar) v
        # eps_hat = sqrt(alpha_bar) v + sqrt(1 - alpha_bar) z_t
        return signal * z - noise * output, signal * output + noise * z


class VDiffusion(VPrediction):
    """Diffusion whose last step is pure noise (Lin et al. 2023), by a network that predicts v.

    SD's z_{T-1} still holds 1/15 of the signal. Training can read the object's position from it,
    averaged over similar frames; sampling starts without it. Without signal eps says nothing of
    z_0, hence v. Few steps must begin at pure noise too, which is why `cascade.py` uses this class.
    """

    def __init__(self, config: DiffusionConfig | None = None):
        super().__init__(config)
        # sqrt(alpha_bar) shifted and scaled until its last value is 0; the first stays
        root = self.alphas_cumprod.sqrt()
        self.alphas_cumprod = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2

    def timesteps(self, steps: int) -> list[int]:
        """List the visited t: "trailing" spacing from T-1, so 50 steps are 999, 979 .. 19 (Lin)."""
        super().timesteps(steps)  # raises for a number of steps that cannot be taken
        return [round(self.num_steps - i * self.num_steps / steps) - 1 for i in range(steps)]


class StaggeredDiffusion(VDiffusion):
    """Diffusion in which each frame is noisier than the one before it (like AR-Diffusion, Wu 2023).

    With a causal mask frame i cannot see frame i+1. If all frames are equally noisy, each picks an
    object position independently, and the object jumps. With a lag, frames are denoised one after
    another, and each sees the earlier frames more clearly than itself.
    """

    frame_lag = 100  # timesteps between neighbouring frames

    def frame_timesteps(self, t: Tensor, frames: int) -> Tensor:
        """Turn the timestep t (b,) of a clip into those of its frames, (b, f).

        Below 0 a frame is clean already, above T-1 it is still pure noise.
        """
        # t_i = t (T-1 + lag (f-1)) / (T-1) - lag (f - i) for i = 1 .. f: frame f is the noisiest
        stretched = t + t * self.frame_lag * (frames - 1) // (self.num_steps - 1)
        return stretched[:, None] - self.frame_lag * torch.arange(frames - 1, -1, -1)

    def loss(self, model, z0, context, fps, t, eps) -> Tensor:
        """Return `Diffusion.loss` over the frames that sampling would denoise at that moment, (b,).

        Frames already clean or still pure noise are left out; the sum is divided by the expected
        number of active frames, so that its mean is unbiased.
        """
        f = z0.shape[1]
        unclamped = self.frame_timesteps(t, f)
        t = unclamped.clamp(0, self.num_steps - 1)  # (b, f)
        output = model(self.add_noise(z0, eps, t), t.to(z0.device), context, fps)
        error = (output.to(z0) - self.target(z0, eps, t)).square().mean((2, 3, 4))  # (b, f)
        return (error * (unclamped == t).to(error)).sum(1) / float(self.expected_active(f))

    def active_frames(self, t: Tensor, frames: int) -> Tensor:
        """Count the frames of a clip at timestep t (b,) that are neither clean nor pure noise."""
        t = self.frame_timesteps(t, frames)
        return ((t >= 0) & (t < self.num_steps)).sum(1)

    def expected_active(self, frames: int) -> Tensor:
        """Return the mean number of active frames over all timesteps."""
        return self.active_frames(torch.arange(self.num_steps), frames).sum() / self.num_steps

    def loss_weight(self, t: Tensor, frames: int) -> Tensor:
        """Return the weight of a clip at timestep t (b,) in the loss, (b,): 1 in the mean."""
        return self.active_frames(t, frames) / self.expected_active(frames)

    def step(self, network, z, t, t_prev, sampler, eta, noise) -> Tensor:
        """Step the frames that are neither clean nor pure noise; the others stay."""
        last = self.num_steps - 1
        t = self.frame_timesteps(t, z.shape[1])  # (b, f)
        t_prev = self.frame_timesteps(t_prev, z.shape[1])
        is_active = ((t >= 0) & (t_prev < last)).to(z.device)
        z_prev = super().step(network, z, t.clamp(0, last), t_prev.clamp(-1, last), sampler, eta,
                              noise)
        return torch.where(is_active[..., None, None, None], z_prev, z)


class Muon(torch.optim.Optimizer):
    """SGD with momentum whose update matrices have singular values near 1 (Jordan et al. 2024).

    A convolution is a matrix (out, in * kernel); torch's own Muon, from 2.9 on, takes none. The
    singular values of an update (rows, columns) are near lr * sqrt(max(1, rows / columns)).
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all weights; matrices of one shape are orthogonalised in one batch."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), weights in by_shape.items():
                updates = []
                for p in weights:
                    # m <- mu m + (1 - mu) g; the update is mu m + (1 - mu) g (Nesterov)
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(m, group["momentum"]).flatten(1))
                scale = group["lr"] * max(1, rows / columns) ** 0.5
                for p, update in zip(weights, orthogonalise(torch.stack(updates))):
                    p.sub_(update.view_as(p), alpha=scale)


def orthogonalise(x: Tensor) -> Tensor:
    """Move the singular values of matrices (n, rows, columns) to 0.7 .. 1.2, by Newton-Schulz.

    Five steps of X <- 3.4445 X + (-4.7750 X X^T + 2.0315 (X X^T)^2) X (Jordan et al.).
    """
    if x.shape[1] > x.shape[2]:
        return orthogonalise(x.mT).mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        xx = x @ x.mT
        x = 3.4445 * x + (-4.7750 * xx + 2.0315 * xx @ xx) @ x
    return x
