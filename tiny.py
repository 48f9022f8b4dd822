"""What a 64-pixel model trained from nothing in minutes needs beyond the paper, and why (all ours).

`StaggeredDiffusion` and Muon are for presets `tiny` and `laptop`, `VDiffusion` for the cascade too;
`small` and `paper` train and sample as `diffusion.py` says. `VPrediction` is for models from SD. At
the end, for every preset: optimizers, moving average, latents encoded once. Each trick was measured
(docs/measurements.md).
"""

import math
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from data import ClipDataset
from diffusion import Diffusion, DiffusionConfig, cast, seeded_randn


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
        """List the visited t: "trailing" spacing, from T-1, for 50 999, 979 .. 19 (Lin et al.)."""
        super().timesteps(steps)  # raises where it cannot be done
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

    def loss(self, model, z0, context, fps=None, t=None, eps=None, generator=None) -> Tensor:
        """Return `Diffusion.loss` over the frames that sampling would denoise at that moment, (b,).

        Frames already clean or still pure noise are left out; the sum is divided by the expected
        number of active frames, so that its mean is unbiased.
        """
        b, f = z0.shape[:2]
        t = torch.randint(self.num_steps, (b,), generator=generator) if t is None else t
        eps = seeded_randn(z0.shape, generator).to(z0) if eps is None else eps
        unclamped = self.frame_timesteps(t, f)
        t = unclamped.clamp(0, self.num_steps - 1)  # (b, f)
        output = model(self.add_noise(z0, eps, t), t.to(z0.device), context, fps)
        error = (output.to(z0) - self.target(z0, eps, t)).square().mean((2, 3, 4))  # (b, f)
        every_t = self.frame_timesteps(torch.arange(self.num_steps), f)
        counted = ((every_t >= 0) & (every_t < self.num_steps)).sum() / self.num_steps
        return (error * (unclamped == t).to(error)).sum(1) / float(counted)

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

    A convolution is a matrix (out, in * kernel); torch's own Muon, from 2.9 on, takes none. `lr` is
    about the spectral norm of an update.
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


def build_optimizers(modules: list[nn.Module], groups: list[dict],
                     muon: bool) -> list[torch.optim.Optimizer]:
    """Make AdamW and, with `muon`, Muon for the weight matrices of `modules` in `groups`.

    Embeddings, norms, biases, adaptors and the outermost layers are AdamW's.
    """
    matrices = set()
    for module in modules if muon else []:
        for name, layer in module.named_modules():
            is_outermost = name.split(".")[-1] in ("conv_in", "conv_out")
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and not is_outermost:
                matrices.add(layer.weight)
    for_adamw = []
    for_muon = []
    for group in groups:
        parameters = group["params"]
        for_adamw.append({**group, "params": [p for p in parameters if p not in matrices]})
        for_muon.append({**group, "params": [p for p in parameters if p in matrices]})
    fused = next(modules[0].parameters()).device.type in ("cpu", "cuda")  # in one kernel
    adamw = torch.optim.AdamW(for_adamw, betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    return [adamw, Muon(for_muon)] if muon else [adamw]


def set_learning_rates(optimizers: list[torch.optim.Optimizer], peaks: tuple[float, ...], step: int,
                       steps: int, warmup: int) -> None:
    """Raise the learning rate of every group linearly from its start, then lower it as a cosine."""
    for optimizer, peak in zip(optimizers, peaks):
        for group in optimizer.param_groups:
            done = max(0, step - group["start"])
            rise = min(1.0, (done + 1) / max(warmup, 1))
            fall = 0.5 * (1 + math.cos(math.pi * done / (steps - group["start"])))
            group["lr"] = peak * rise * fall


class EMA:
    """Moving average of weights; its decay rises as (1 + n) / (10 + n), to forget the start."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters = parameters
        self.decay = decay
        self.count = 0
        self.shadow = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the weights, after a step of the optimizer."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for average, p in zip(self.shadow, self.parameters):
            average.lerp_(p, 1 - decay)  # average <- decay average + (1 - decay) weight

    @contextmanager
    def applied(self):
        """Exchange weights and averages for a while."""
        weights = [p.data for p in self.parameters]
        self.copy_to_weights()
        try:
            yield
        finally:
            for p, weight in zip(self.parameters, weights):
                p.data = weight

    def copy_to_weights(self) -> None:
        """Put the averages in the model."""
        for p, average in zip(self.parameters, self.shadow):
            p.data = average


def encode_clips(model, clips: ClipDataset, count: int, rank: int, world: int) -> list[dict]:
    """Encode `count` cuts of clips once to {"z0", "caption", "fps"}; processes share the work."""
    items = []
    for n in tqdm(range(rank, count, world), "encoding", leave=False, disable=rank > 0 or None):
        clips.set_epoch(n // len(clips))
        item = clips[n % len(clips)]
        z0 = model.encode(item.pop("video")[None])[0].cpu()
        items.append({**item, "z0": z0})
    shares = [items]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, items)
    return [shares[n % world][n // world] for n in range(count)]
