"""What may be uploaded: files are refused before they are decoded, in one line that names them."""

import pytest
from PIL import Image

from shortv_hf.web import uploads
from shortv_hf.web.uploads import read_uploads


pytestmark = pytest.mark.once


@pytest.fixture
def picture(tmp_path):
    Image.new("RGBA", (20, 10), (255, 0, 0, 0)).save(tmp_path / "one.png")
    return tmp_path / "one.png"


def refused(files, takes_video=True):
    with pytest.raises(ValueError) as error:
        read_uploads(files, takes_video)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_pictures_are_rgb(picture):
    upload = read_uploads([str(picture), picture], takes_video=False)
    assert [each.mode for each in upload.pictures] == ["RGB", "RGB"] and upload.videos == []
    assert upload.pictures[0].getpixel((0, 0)) == (255, 255, 255)


def test_no_picture(tmp_path):
    (tmp_path / "no.png").write_text("<svg/>")
    assert refused([tmp_path / "no.png"]).startswith("no.png: it is no picture; BMP, GIF")


def test_formats_that_run_programs_are_not_tried(tmp_path):
    """Pillow hands EPS to Ghostscript."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    assert "it is no picture" in refused([tmp_path / "x.eps"])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])  # Pillow itself refuses the second
def test_many_pixels_are_refused_before_they_are_decoded(tmp_path, side, monkeypatch):
    Image.new("1", (side, side)).save(tmp_path / "big.png")
    monkeypatch.setattr(uploads, "load_image", lambda path: pytest.fail("it was decoded"))
    said = refused([tmp_path / "big.png"])
    assert said.startswith("big.png: it has") and ("the limit is 40" in said or "too many pixels" in said)


def test_many_bytes(picture, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_PICTURE_BYTES", 10)
    assert refused([picture]) == "one.png: it has 0 MB; the limit is 0"


def test_a_picture_that_ends_too_early(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    said = refused([tmp_path / "half.png"])
    assert said.startswith("half.png: ") and str(tmp_path) not in said


def test_too_many_files(picture):
    assert refused([picture] * 5) == "5 files: a question takes at most 4"


class TestVideos:
    @pytest.fixture(autouse=True)
    def _av(self):
        pytest.importorskip("av")

    @pytest.fixture
    def clip(self, tmp_path):
        from video_files import write_video

        return write_video(tmp_path / "clip.mp4", 20)

    def test_frames(self, clip, picture):
        upload = read_uploads([clip, picture], takes_video=True)
        assert len(upload.videos[0].frames) == uploads.MAX_FRAMES and len(upload.pictures) == 1

    def test_a_model_that_takes_none(self, clip):
        assert refused([clip], takes_video=False) == "clip.mp4: it is a video, and this model takes pictures only"

    def test_broken(self, clip, tmp_path):
        (tmp_path / "cut.mp4").write_bytes(clip.read_bytes()[:200])
        assert refused([tmp_path / "cut.mp4"]) == "cut.mp4: it is no video that can be read, or it is broken"

    @pytest.mark.parametrize(
        ("limit", "value", "said"),
        [
            ("MAX_FRAME_PIXELS", 100, "its frames have 48 x 32 pixels; the limit is 0 megapixels"),
            ("MAX_SECONDS", 1, "it is 0 minutes long; the limit is 0"),
            ("MAX_VIDEO_BYTES", 100, "the limit is 0"),
        ],
    )
    def test_limits_are_looked_at_before_it_is_decoded(self, clip, monkeypatch, limit, value, said):
        monkeypatch.setattr(uploads, limit, value)
        monkeypatch.setattr(uploads, "load_video", lambda *_: pytest.fail("it was decoded"))
        assert refused([clip]).endswith(said)
