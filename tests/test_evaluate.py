"""The judge sees what is there, changes its mind when the clip changes, and can say no; the counting is exact."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import evaluate
from data import InputError, ShapesDataset, shape_captions
from judge import FILLS, TRENDS, WORDS, confusions, count, decibels, edges, judge, largest_component, prompts_of, wilson
from magicvideo import MagicVideo, read_checkpoint
from sample import SHIPPED

NOTHING = dict.fromkeys(WORDS)


def words(caption):
    return dict(zip(WORDS, caption.split(" ", 3)[1:]))


def blurred(video, sigma=1.0):
    taps = torch.exp(-torch.arange(-3, 4) ** 2 / (2 * sigma**2))
    kernel = (taps[:, None] * taps / taps.sum() ** 2).repeat(3, 1, 1, 1)
    return F.conv2d(F.pad(video, (3, 3, 3, 3), mode="replicate"), kernel, groups=3)


def right(clips, change=lambda video: video):
    """Rate of clips whose three words are all right after a change that leaves them so."""
    hits = [judge(change(clip["video"]), clip["fps"]) == words(clip["caption"]) for clip in clips]
    return sum(hits) / len(hits)


@pytest.fixture(scope="module")
def clips():
    """One of every caption at 8 frames a second."""
    captions = {split: shape_captions(split) for split in ("train", "test")}
    return [ShapesDataset(split, seed=11, fps=8)[i] for split in captions for i in range(len(captions[split]))]


@pytest.fixture(scope="module")
def verdicts(clips):
    return [judge(clip["video"]) for clip in clips]


# ---------------------------------------------------------------------------------------------------------------------
# The judge says what is there


def test_real_clips_are_judged_right(clips, verdicts):
    assert count("", [clip["caption"] for clip in clips], verdicts)["all three"]["rate"] >= 0.99


@pytest.mark.parametrize("fps", [4, 16, 24])
def test_real_clips_are_judged_right_at_other_rates(fps):
    dataset = ShapesDataset("test", seed=5, fps=fps)
    assert right([dataset[i] for i in range(96)]) >= 0.99


def test_real_clips_of_more_frames_and_larger_ones_are_judged_right():
    dataset = ShapesDataset("test", frames=16, size=96, fps=8)
    assert right([dataset[i] for i in range(24)]) == 1


def test_blur_and_noise_as_a_decoder_leaves_them_change_no_verdict(clips):
    generator = torch.Generator().manual_seed(0)
    assert right(clips, lambda v: blurred(v) + 0.05 * torch.randn(v.shape, generator=generator)) >= 0.97


def test_speckle_is_overlooked(clips):
    def speckled(video):
        speckles = torch.rand(len(video), 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.001
        return torch.where(speckles, 1.0, video)

    assert right(clips[::5], speckled) >= 0.95


def test_the_fill_of_a_box_is_finer_than_a_pixel():
    dataset = ShapesDataset("train", seed=2)
    for i in range(24):
        clip = dataset[5 * i]
        frame = (clip["video"][0] - clip["video"][0, :, :1, :1]).norm(dim=0)
        frame = frame / frame.max()
        (left, right_edge), (top, bottom) = edges(frame.amax(0)), edges(frame.amax(1))
        filled = float(frame.sum()) / ((right_edge - left) * (bottom - top))
        assert abs(filled - FILLS[words(clip["caption"])["shape"]][0]) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The judge changes its mind when the clip changes


def test_a_clip_played_backwards_has_the_opposite_motion_and_nothing_else_changed(clips):
    opposite = dict(TRENDS) | {b: a for a, b in TRENDS}
    for clip in clips[::7]:
        truth = words(clip["caption"])
        assert judge(clip["video"].flip(0)) == {**truth, "motion": opposite[truth["motion"]]}


def test_a_turned_clip_moves_the_other_way(clips):
    left, up, right_way, down = ("moving left", "moving up", "moving right", "moving down")
    turned = {left: up, up: right_way, right_way: down, down: left}
    for clip in clips[::3]:
        truth = words(clip["caption"])
        if truth["motion"] in turned and truth["shape"] != "triangle":
            assert judge(clip["video"].rot90(-1, (2, 3))) == {**truth, "motion": turned[truth["motion"]]}


def test_recoloring_changes_the_color_alone(clips):
    next_hue = {"red": "green", "green": "blue", "blue": "red", "yellow": "cyan", "cyan": "magenta"}
    for clip in clips[::3]:
        truth = words(clip["caption"])
        if truth["color"] in next_hue:
            assert judge(clip["video"].roll(1, dims=1)) == {**truth, "color": next_hue[truth["color"]]}


def test_shuffled_captions_are_at_chance(clips, verdicts):
    captions = [clip["caption"] for clip in clips]
    rows = [count("", captions[k:] + captions[:k], verdicts) for k in range(len(captions))]  # every clip, every caption
    for word, chance in (("color", 1 / 8), ("shape", 1 / 3), ("motion", 1 / 6), ("all three", 1 / 144)):
        assert sum(row[word]["rate"] for row in rows) / len(rows) == pytest.approx(chance, abs=0.005)


# ---------------------------------------------------------------------------------------------------------------------
# The judge can say no


@pytest.mark.parametrize("scale", [0.05, 0.3, 1.0])
def test_noise_is_nothing(scale):
    for seed in range(10):
        noise = scale * torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        assert judge(noise) == judge(blurred(noise, 3.0)) == judge(blurred(10 * noise, 3.0)) == NOTHING


@pytest.mark.parametrize("value", [-1.0, 0.0, 1.0, float("nan")])
def test_an_empty_clip_is_nothing(value):
    assert judge(torch.full((8, 3, 64, 64), value)) == NOTHING


def test_an_untrained_model_shows_nothing():
    torch.manual_seed(0)
    video = MagicVideo.from_preset("tiny").eval().sample("a red circle moving left", steps=2)[0]
    assert None in judge(video).values()


def test_two_objects_are_nothing(clips):
    for clip in clips[::9]:
        narrow = F.interpolate(clip["video"], size=(64, 32))
        assert judge(torch.cat([narrow, narrow], dim=3)) == NOTHING


def test_an_object_there_in_half_of_the_frames_is_nothing(clips):
    video = clips[0]["video"].clone()
    video[::2] = video[:, :, :1, :1].mean()
    assert judge(video) == NOTHING


def test_standing_still_is_no_motion(clips):
    for clip in clips[::9]:
        still = clip["video"][3:4].repeat(8, 1, 1, 1)
        assert judge(still) == {**words(clip["caption"]), "motion": None}


def test_there_and_back_is_no_motion(clips):
    for clip in clips[::9]:
        assert judge(torch.cat([clip["video"][::2], clip["video"][::2].flip(0)]))["motion"] is None


def test_a_jump_is_no_motion(clips):
    for clip in clips[::9]:
        assert judge(clip["video"][[0, 0, 0, 0, -1, -1, -1, -1]])["motion"] is None


def test_moving_askew_is_no_motion():
    video = torch.full((8, 3, 64, 64), -0.88)
    for k in range(8):
        video[k, 0, 10 + 4 * k : 22 + 4 * k, 10 + 4 * k : 22 + 4 * k] = 1
    assert judge(video) == {"color": "red", "shape": "square", "motion": None}


def test_what_is_enough_motion_in_a_third_of_the_time_is_too_little_in_all_of_it():
    dataset = ShapesDataset("train", seed=1, fps=24)
    for clip in (dataset[i] for i in range(0, 120, 7)):
        assert judge(clip["video"], fps=24)["motion"] == words(clip["caption"])["motion"]
        assert judge(clip["video"][[0, 0, 1, 1, 2, 2, 3, 3]], fps=8)["motion"] is None


def test_a_shape_of_no_name_has_none():
    y, x = (torch.arange(64) - 32).abs()[:, None], (torch.arange(64) - 32).abs()[None]
    bar, cross = (x < 18) & (y < 8), (x < 15) & (y < 4) | (x < 4) & (y < 15)
    for mask in (bar, cross):
        video = torch.where(mask, 1.0, -0.88).repeat(8, 3, 1, 1)
        assert judge(video)["color"] == "white" and judge(video)["shape"] is None


def test_a_triangle_on_its_apex_is_none(clips):
    for clip in clips:
        if "triangle" in clip["caption"]:
            assert judge(clip["video"].flip(2))["shape"] is None


def test_an_object_of_two_colors_has_no_color(clips):
    for clip in clips[:15]:  # the red ones
        video = clip["video"].clone()
        middle = int((video.amax((0, 1, 2)) > 0).nonzero().float().mean())
        video[..., middle:] = video[..., middle:].roll(1, dims=1)  # what is red becomes green
        assert judge(clip["video"])["color"] == "red"
        if words(clip["caption"])["motion"] not in ("moving left", "moving right"):
            assert judge(video)["color"] is None


def test_an_object_that_changes_its_shape_or_color_half_way_has_none(clips):
    by_words = {clip["caption"]: clip["video"] for clip in clips}
    changed = torch.cat([by_words["a red square moving left"][:4], by_words["a blue circle moving left"][4:]])
    assert judge(changed)["color"] is None and judge(changed)["shape"] is None


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def test_the_largest_component_is_kept_however_it_winds():
    mask = torch.tensor([[1, 1, 1, 0, 1], [0, 0, 1, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1]]).bool()
    kept = mask & torch.tensor([True, True, True, False, False])
    both = largest_component(torch.stack([mask, torch.zeros_like(mask)]))
    assert torch.equal(both, torch.stack([kept, torch.zeros_like(mask)]))


@pytest.mark.parametrize(
    ("seen", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
     (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_values(seen, n, low, high):
    assert wilson(seen, n) == pytest.approx((low, high), abs=5e-5)


def test_rows_and_confusions_count_what_was_said():
    captions = ["a red circle growing", "a red square moving up", "a blue circle moving up"]
    verdicts = [words(captions[0]), {**words(captions[1]), "shape": "circle"}, NOTHING]
    row = count("name", captions, verdicts)
    assert [row[word]["right"] for word in (*WORDS, "all three")] == [2, 1, 2, 1]
    assert {"asked": "square", "judged": "circle", "clips": 1, "of": 1} in confusions(captions, verdicts)
    assert {"asked": "circle", "judged": None, "clips": 1, "of": 2} in confusions(captions, verdicts)


def test_trained_prompts_are_trained_and_both_kinds_hold_every_word_equally_often():
    assert set(prompts_of("train")) <= set(shape_captions("train"))
    assert set(prompts_of("test")) == set(shape_captions("test"))
    for split in ("train", "test"):
        assert len(set(prompts_of(split))) == 24
        for word, times in (("color", 3), ("shape", 8), ("motion", 4)):
            said = [words(caption)[word] for caption in prompts_of(split)]
            assert {said.count(w) for w in said} == {times}


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def oracle(clips):
    """A model that returns real clips: what it is asked for, except that its squares are circles."""
    by_caption = {clip["caption"]: clip["video"] for clip in clips}

    class Oracle:
        config = MagicVideo.from_preset("tiny").config

        def sample(self, prompts, *settings):
            return torch.stack([by_caption[prompt.replace("square", "circle")] for prompt in prompts])

    return Oracle()


def test_the_command_counts_a_models_mistakes_and_writes_numbers_and_pictures(oracle, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(MagicVideo, "load", lambda path, device: oracle)
    evaluate.main(["--checkpoint", "model.pt", "--seeds", "2", "--out", str(tmp_path / "new"), "--batch-size", "7"])
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    for name in ("held-out captions", "trained captions"):
        assert [rows[name][word]["right"] for word in (*WORDS, "all three")] == [48, 32, 48, 32]
    assert rows["held-out, shuffled"]["all three"]["rate"] < 0.2 and rows["real clips"]["all three"]["rate"] >= 0.99
    assert results["confusions"] == [{"asked": "square", "judged": "circle", "clips": 32, "of": 32}]
    assert results["command"].startswith("python evaluate.py --checkpoint model.pt") and len(results["clips"]) == 96
    assert (tmp_path / "new" / "held-out.png").exists() and (tmp_path / "new" / "trained.png").exists()
    assert "square judged circle: 32 of 32 clips" in capsys.readouterr().out


class Cutter:
    """A model that returns real clips at the rate it is asked for, or, `deaf`, always at 8 frames a second."""

    config = MagicVideo.from_preset("tiny").config
    device = torch.device("cpu")

    def __init__(self, deaf=False):
        self.deaf = deaf

    def sample(self, prompts, fps, steps, guidance, sampler, seed):
        captions = shape_captions("test")
        dataset = ShapesDataset("test", fps=8 if self.deaf else fps, seed=5, length=2400)
        places = (captions.index(prompt) + 24 * i for i, prompt in enumerate(prompts, seed))
        return torch.stack([dataset[place]["video"] for place in places])


def test_speed_is_that_of_the_object_the_way_its_caption_says():
    dataset = ShapesDataset("test", fps=8, length=48)
    for clip in (dataset[i] for i in range(48)):
        motion = words(clip["caption"])["motion"]
        speed = evaluate.speed(clip["video"], motion)
        pair = next(pair for pair in TRENDS if motion in pair)
        opposite = pair[1 - pair.index(motion)]
        assert speed > (0.9 * 0.3 / 7 if "moving" in motion else 0.9 * math.log(2) / 7)
        assert evaluate.speed(clip["video"], opposite) == -speed
    assert math.isnan(evaluate.speed(torch.zeros(8, 3, 64, 64), "growing"))


def test_rates_see_whether_frames_a_second_are_obeyed(monkeypatch, tmp_path, capsys):
    for deaf, least, most in ((False, 40, 96), (True, 0, 0)):
        monkeypatch.setattr(MagicVideo, "load", lambda path, device: Cutter(deaf))
        evaluate.main(["--checkpoint", "model.pt", "--rates", "--out", str(tmp_path)])
        found = json.loads((tmp_path / "results.json").read_text())
        assert least <= found["falls"] <= most and found["of"] >= 90
        four, eight, sixteen = found["rates"]
        assert deaf == (four["moving"] == eight["moving"]) and eight["data fps"] == 8 and sixteen["data fps"] == 12
        assert deaf or four["moving, data"] > eight["moving, data"] > sixteen["moving, data"]
    assert "falls from 4 to 8 to 16" in capsys.readouterr().out


def test_reconstruction_tells_temporal_layers_that_flicker_from_none(monkeypatch, tmp_path):
    model = MagicVideo.from_preset("tiny").eval()
    monkeypatch.setattr(MagicVideo, "load", lambda path, device: model)
    flags = ["--checkpoint", "model.pt", "--reconstruction", "--clips", "3", "--out", str(tmp_path)]
    evaluate.main(flags)
    on, off = json.loads((tmp_path / "results.json").read_text())["reconstruction"]
    assert on["psnr"] == off["psnr"] and on["flicker_psnr"] == off["flicker_psnr"] and on["clips"] == 3  # zero start
    torch.nn.init.normal_(model.vae.decoder.temporal_attentions[1].to_out.weight, std=0.5)
    evaluate.main(flags)
    on, again = json.loads((tmp_path / "results.json").read_text())["reconstruction"]
    assert again["psnr"] == off["psnr"] and on["psnr"] != off["psnr"]


def test_decibels_are_those_of_pixels_between_minus_one_and_one():
    assert decibels(torch.tensor(4.0)) == 0 and evaluate.decibels(torch.tensor(0.04)) == pytest.approx(20)


def test_fvd_prints_how_many_clips_and_warns_of_few(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(MagicVideo, "load", lambda path, device: Cutter())
    monkeypatch.setattr(evaluate, "load_i3d", lambda: torch.nn.Flatten())
    monkeypatch.setattr(evaluate, "features", lambda i3d, videos: videos.mean((3, 4)).flatten(1).numpy())
    evaluate.main(["--checkpoint", "model.pt", "--fvd", "--clips", "30", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "FVD of samples:" in printed and "(30 clips)" in printed and "30 clips are few" in printed
    rows = json.loads((tmp_path / "results.json").read_text())["fvd"]
    assert [row["clips"] for row in rows] == [30, 30] and all(row["fvd"] > 0 for row in rows)


def test_a_folder_is_refused_where_prompts_are_judged():
    with pytest.raises(InputError, match="--data clips.*--fvd"):
        evaluate.main(["--checkpoint", "model.pt", "--data", "clips"])


@pytest.mark.parametrize(
    "flags", [["--seeds", "0"], ["--clips", "0"], ["--steps", "0"], ["--steps", "1001"], ["--batch-size", "-1"],
              ["--fps", "0"]]
)
def test_settings_out_of_range_are_named(flags, monkeypatch, tmp_path):
    model = MagicVideo.from_preset("tiny").eval()
    monkeypatch.setattr(MagicVideo, "load", lambda path, device: model)
    with pytest.raises(InputError, match=flags[0]):
        evaluate.main(["--checkpoint", "model.pt", "--out", str(tmp_path), *flags])


def test_a_missing_checkpoint_is_named():
    with pytest.raises(InputError, match="nowhere.pt"):
        evaluate.main(["--checkpoint", "nowhere.pt"])


def test_the_shipped_model_is_small_says_who_made_it_and_follows_captions_that_it_never_saw():
    assert SHIPPED.stat().st_size < 12e6
    assert "train.py" in read_checkpoint(SHIPPED, "magicvideo")["made_by"]
    captions = shape_captions("test")[::3]
    clips = MagicVideo.load(SHIPPED).sample(captions, steps=20)
    right = sum(judge(clip) == words(caption) for clip, caption in zip(clips, captions))
    assert right >= 3                                       # of 8; by chance one of a hundred and forty-four
