"""How weights are moved: Muon for matrices, the learning rate over a stage, the moving average (the paper names none).

Torch's own AdamW does the rest. Everything here is ours, since the paper says nothing of its optimizer.
"""

import math

import torch
from torch import Tensor, nn

MATRICES = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps have singular values near one (Jordan et al. 2024): a matrix moves alike in all directions.

    For weights of linear layers, and of convolutions as matrices (out, in * kernel); torch.optim.Muon, from torch 2.9,
    takes linear layers alone. `lr` is the size of a step as a matrix, about 0.02 whatever the width.
    """

    def __init__(self, params, lr: float = 0.02, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Matrices of one shape are made orthogonal in one batch."""
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.flatten(1).shape, []).append(p)
            for (rows, columns), matrices in by_shape.items():
                steps = []
                for p in matrices:
                    # m <- mu m + (1 - mu) g; the step is (1 - mu) g + mu m
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, 1 - group["momentum"])
                    steps.append(p.grad.lerp(average, group["momentum"]).flatten(1))  # Nesterov's look ahead
                size = group["lr"] * max(1, rows / columns) ** 0.5
                for p, step in zip(matrices, orthogonal(torch.stack(steps))):
                    p.sub_(step.view_as(p), alpha=size)


def orthogonal(m: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with their singular values moved to 0.7 .. 1.2, by five steps of Newton-Schulz.

    X <- 3.4445 X + (-4.7750 X X^T + 2.0315 (X X^T)^2) X is steep at 0, so that five steps are enough; nearer to one is
    not needed (Jordan et al.).
    """
    if m.shape[1] > m.shape[2]:
        return orthogonal(m.mT).mT
    m = m / (m.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = m @ m.mT
        m = 3.4445 * m + (-4.7750 * square + 2.0315 * square @ square) @ m
    return m


def make_optimizers(model: nn.Module, groups: list[dict], muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and with `muon` Muon beside it for the matrices among the weights of `groups` ("params", "factor").

    The first and last layers, embeddings, biases, norms and adaptors are AdamW's always; "factor" times the learning
    rate is for them, since Muon's steps are as large as they should be.
    """
    matrices = {id(module.weight) for name, module in model.named_modules()
                if muon and isinstance(module, MATRICES) and name.split(".")[-1] not in ("conv_in", "conv_out")}
    split = [[{**group, "params": [p for p in group["params"] if (id(p) in matrices) == kind]} for group in groups]
             for kind in (False, True)]
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())  # in one kernel, not one for each weight
    adamw = torch.optim.AdamW(split[0], betas=(0.9, 0.99), weight_decay=0.0, fused=fused)
    return [adamw, Muon([{**group, "factor": 1.0} for group in split[1]])] if muon else [adamw]


def learning_rate(step: int, steps: int, highest: float, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / max(warmup, 1))
    return highest * rise * 0.5 * (1 + math.cos(math.pi * step / steps))


class MovingAverage:
    """EMA of weights with warm-up, decay (1 + n) / (10 + n) at first: a long one would keep the noise of the start."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay, self.count = parameters, decay, 0
        self.values = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        # average <- decay average + (1 - decay) weight
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    def swap(self) -> None:
        """Puts the averages in the model and its weights here; called again, back. Nothing is copied."""
        for i, p in enumerate(self.parameters):
            p.data, self.values[i] = self.values[i], p.data
