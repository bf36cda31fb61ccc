"""Which frames of a video are taken, and what is said of files that hold none."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image


pytest.importorskip("av")
from video_files import SIZE, color, write_sound, write_video  # noqa: E402

from shortv_hf.data.video import Video, _choose, _decode, load_video  # noqa: E402


pytestmark = pytest.mark.once


def frame_numbers(video: Video, n: int) -> list[int]:
    """Which of the `n` frames of a test's video they are, by their colours."""
    reds = np.array([color(i, n)[0] for i in range(n)])
    return [int(np.abs(reds - frame.getpixel((20, 20))[0]).argmin()) for frame in video.frames]


@pytest.mark.parametrize(
    ("max_frames", "fps", "expected"),
    [
        (3, None, [0, 12, 24]),
        (4, None, [0, 8, 16, 24]),
        (1, None, [0]),
        (32, None, list(range(25))),
        (32, 2, [0, 5, 10, 15, 20]),
        (32, 0.5, [0, 20]),
        (32, 0.1, [0]),
        (3, 2, [0, 12, 24]),  # five would be too many
        (32, 1000, list(range(25))),
    ],
)
def test_frames(tmp_path, max_frames, fps, expected):
    video = load_video(write_video(tmp_path / "clip.mp4", 25), max_frames, fps)
    assert frame_numbers(video, 25) == expected
    assert video.seconds == pytest.approx([i / 10 for i in expected])
    assert {(frame.mode, frame.size) for frame in video.frames} == {("RGB", SIZE)}
    if len(expected) > 1:
        assert video.fps == pytest.approx((len(expected) - 1) / (expected[-1] - expected[0]) * 10)


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi", "clip.mkv"])
def test_formats_and_names(tmp_path, monkeypatch, name):
    write_video(tmp_path / name, 7)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert frame_numbers(load_video(f"~/{name}", 3), 7) == [0, 3, 6]


def test_one_frame_is_a_video(tmp_path):
    video = load_video(write_video(tmp_path / "clip.mp4", 1))
    assert len(video.frames) == 1 and video.seconds == (0.0,) and video.fps == 1.0


def test_frames_of_uneven_length():
    """Time decides, not the number of frames."""
    times = np.array([0, 0.1, 0.2, 0.3, 5.0, 9.9, 10.0])
    assert _choose(times, 3, None) == [0, 4, 6]
    assert _choose(times, 32, 0.2) == [0, 4, 6]


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (-90, (1, 0)), (90, (0, 2)), (180, (2, 1))])
def test_frames_are_upright(rotation, corner):
    """A film's rotation is counterclockwise: where its upper left corner goes."""
    image = Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 0, 0))
    container = SimpleNamespace(
        streams=SimpleNamespace(video=[SimpleNamespace(time_base=0.5)]),
        decode=lambda _: [SimpleNamespace(pts=4, rotation=rotation, to_image=lambda: image)],
    )
    (frame,) = _decode(container, np.array([2.0])).frames
    assert frame.getpixel(corner) == (255, 0, 0)


def test_frames_that_cannot_be_decoded():
    """A recording that was cut: the next ones are taken, with their own times, up to the last."""
    shown = [3, 4, 5, 6, 7, 9]  # of 0 to 9, the first three and one more cannot be
    pictures = {pts: Image.new("RGB", (2, 2), (pts, 0, 0)) for pts in shown}
    container = SimpleNamespace(
        streams=SimpleNamespace(video=[SimpleNamespace(time_base=0.1)]),
        decode=lambda _: [SimpleNamespace(pts=p, rotation=0, to_image=lambda p=p: pictures[p]) for p in shown],
    )
    video = _decode(container, np.array([0, 0.3, 0.6, 0.8, 0.9]))
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [3, 6, 9]
    assert video.seconds == pytest.approx((0, 0.3, 0.6))


def test_errors_are_one_line_that_names_the_file(tmp_path):
    clip = write_video(tmp_path / "clip.mp4", 25)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "truncated.mp4").write_bytes(clip.read_bytes()[:600])
    write_sound(tmp_path / "sound.wav")
    for name, reason in (
        ("missing.mp4", "no such file"),
        ("", "it is a directory"),
        ("empty.mp4", "it is empty"),
        ("text.mp4", "Invalid data found"),
        ("truncated.mp4", "Invalid data found"),
        ("sound.wav", "it holds no video"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            load_video(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_without_pyav(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"needs the extra: pip install '\.\[video\]'"):
        load_video(tmp_path / "clip.mp4")
