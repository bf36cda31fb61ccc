"""Pictures of every kind, from every kind of name, as RGB with known pixels or an error of one line."""

import base64
import io
import struct
import threading
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_model
from PIL import Image, ImageDraw, ImageFile
from processor_files import write_processor
from transformers import AutoProcessor

from shortv_hf.chat import comparison
from shortv_hf.chat import conversation as chat
from shortv_hf.data import scoring as evaluation
from shortv_hf.data import sources as calibration_data
from shortv_hf.data.images import load_image, load_images, measure_image, to_rgb
from shortv_hf.pictures import patches as reduction_pictures


pytestmark = pytest.mark.once

RED, GREEN, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (255, 255, 255), (0, 0, 0)


def in_mode(mode, *values, palette=None, **info):
    """A picture of one row with these values."""
    image = Image.new(mode, (len(values), 1))
    if palette:
        image.putpalette(*palette)
    for x, value in enumerate(values):
        image.putpixel((x, 0), value)
    image.info.update(info)
    return image


def wide(values, dtype, mode=None):
    image = Image.fromarray(np.array([values], dtype))
    assert mode is None or image.mode == mode
    return image


def pixels(image):
    assert image.mode == "RGB" and not image.info.get("transparency")
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(bits, row, width, transparent=None):
    """A grey PNG of one row, of any depth."""
    header = struct.pack(">IIBBBBB", width, 1, bits, 0, 0, 0, 0)
    transparency = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    data = chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency + data


def grey_tiff(bits, photometric, row, width, sample_format=1):
    """A little-endian grey TIFF of one row, whatever its bits mean."""
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: 1, 279: len(row)}
    tags[339] = sample_format
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in sorted(tags.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + row


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


HALF_RED = (255, 127, 127)  # (255, 0, 0) at 128 of 255, on white
MODES = {
    "1": (in_mode("1", 0, 255), [BLACK, WHITE]),
    "1 transparent": (in_mode("1", 0, 255, transparency=0), [WHITE, WHITE]),
    "L": (in_mode("L", 0, 7, 255), [BLACK, (7, 7, 7), WHITE]),
    "L transparent": (in_mode("L", 5, 7, transparency=5), [WHITE, (7, 7, 7)]),
    "LA": (in_mode("LA", (100, 255), (100, 0), (0, 128)), [(100,) * 3, WHITE, (127,) * 3]),
    "La": (in_mode("LA", (100, 255), (100, 0)).convert("La"), [(100,) * 3, WHITE]),
    "P": (in_mode("P", 0, 1, palette=([*RED, *GREEN],)), [RED, GREEN]),
    "P transparent": (in_mode("P", 0, 1, palette=([*RED, *GREEN],), transparency=1), [RED, WHITE]),
    "P transparencies": (in_mode("P", 0, 1, palette=([*RED, *GREEN],), transparency=b"\x80\xff"), [HALF_RED, GREEN]),
    "P of RGBA": (in_mode("P", 0, 1, palette=([*RED, 128, *GREEN, 255], "RGBA")), [HALF_RED, GREEN]),
    "PA": (in_mode("PA", (0, 128), (1, 255), palette=([*RED, *GREEN],)), [HALF_RED, GREEN]),
    "RGB": (in_mode("RGB", (1, 2, 3)), [(1, 2, 3)]),
    "RGB transparent": (in_mode("RGB", (1, 2, 3), RED, transparency=(1, 2, 3)), [WHITE, RED]),
    "RGBA": (in_mode("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)), [RED, WHITE, HALF_RED]),
    "RGBa": (in_mode("RGBA", (*RED, 255), (*RED, 0), (*RED, 128)).convert("RGBa"), [RED, WHITE, HALF_RED]),
    "RGBX": (in_mode("RGBX", (1, 2, 3, 0)), [(1, 2, 3)]),
    "CMYK": (in_mode("CMYK", (0, 255, 255, 0), (0, 0, 0, 0), (0, 0, 0, 255)), [RED, WHITE, BLACK]),
    "YCbCr": (in_mode("YCbCr", (255, 128, 128), (76, 85, 255)), [WHITE, RED]),
    "LAB": (in_mode("RGB", (200, 30, 90), WHITE, BLACK).convert("LAB"), [(200, 27, 90), WHITE, BLACK]),
    "HSV": (in_mode("HSV", (0, 255, 255), (85, 255, 255), (0, 0, 255)), [RED, GREEN, WHITE]),
    "I;16": (wide([0, 0x8080, 0xFFFF], "<u2", "I;16"), [BLACK, (128,) * 3, WHITE]),
    "I;16B": (in_mode("I;16B", 0, 0x8080, 0xFFFF), [BLACK, (128,) * 3, WHITE]),
    "I;16L": (in_mode("I;16L", 0, 0x8080, 0xFFFF), [BLACK, (128,) * 3, WHITE]),
    "I;16 transparent": (in_mode("I;16", 0x1234, 0x1235, transparency=0x1234), [WHITE, (18,) * 3]),
}


@pytest.mark.parametrize("name", MODES)
def test_modes(name):
    image, expected = MODES[name]
    before = image.copy()
    found = pixels(to_rgb(image))
    assert len(found) == len(expected)
    assert np.abs(np.array(found) - expected).max() <= 2, found  # colour spaces round
    assert image.mode == before.mode and image.tobytes() == before.tobytes()


def test_no_mode_is_forgotten():
    tested = {image.mode for image, _ in MODES.values()} | {"I", "F", "I;16N"}
    assert set(Image.MODES) <= tested | {mode for mode in Image.MODES if mode.startswith("BGR")}


def test_every_16_bit_copy_of_8_bits_is_the_same():
    grey = np.arange(256, dtype="u1")[None]
    expected = to_rgb(Image.fromarray(grey)).tobytes()
    assert to_rgb(Image.fromarray(grey.astype("u2") * 257)).tobytes() == expected


FILES = {
    "16-bit PNG": (grey_png(16, b"\0\0\x80\x80\xff\xff", 3), [BLACK, (128,) * 3, WHITE]),
    "16-bit PNG, transparent": (grey_png(16, b"\x12\x34\x12\x35", 2, 0x1234), [WHITE, (18,) * 3]),
    "2-bit PNG": (grey_png(2, b"\x1b", 4), [BLACK, (85,) * 3, (170,) * 3, WHITE]),
    "16-bit TIFF": (saved(wide([0, 0x8080, 0xFFFF], "<u2"), "TIFF"), [BLACK, (128,) * 3, WHITE]),
    "16-bit TIFF, big": (saved(in_mode("I;16B", 0, 0x8080, 0xFFFF), "TIFF"), [BLACK, (128,) * 3, WHITE]),
    "16-bit TIFF, white is 0": (grey_tiff(16, 0, b"\0\0\xff\xff\x7f\x7f", 3), [WHITE, BLACK, (128,) * 3]),
    "12-bit TIFF": (grey_tiff(12, 1, b"\x00\x0f\xff", 2), [BLACK, WHITE]),
    "16-bit PGM": (b"P5 3 1 65535\n\0\0\x80\x80\xff\xff", [BLACK, (128,) * 3, WHITE]),
    "10-bit PGM": (b"P5 2 1 1023\n\x03\xff\x00\x00", [WHITE, BLACK]),
    "16-bit JPEG 2000": (saved(wide([0, 0x8080, 0xFFFF], "<u2"), "JPEG2000"), [BLACK, (128,) * 3, WHITE]),
    "LAB TIFF": (saved(in_mode("RGB", (200, 30, 90), WHITE).convert("LAB"), "TIFF"), [(200, 27, 90), WHITE]),
    "GIF of two frames": (
        saved(in_mode("RGB", RED, RED), "GIF", save_all=True, append_images=[in_mode("RGB", GREEN, GREEN)]),
        [RED, RED],
    ),
    "PNG of two frames": (
        saved(in_mode("RGB", RED, RED), "PNG", save_all=True, append_images=[in_mode("RGB", GREEN, GREEN)]),
        [RED, RED],
    ),
    "transparent GIF": (
        saved(in_mode("P", 0, 1, palette=([*RED, *GREEN],)), "GIF", transparency=1),
        [RED, WHITE],
    ),
    "CMYK JPEG": (saved(in_mode("CMYK", *[(0, 255, 255, 0)] * 8), "JPEG", quality=100), [RED] * 8),
}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    data, expected = FILES[name]
    (tmp_path / "picture").write_bytes(data)
    found = pixels(load_image(tmp_path / "picture"))
    assert len(found) == len(expected) and np.abs(np.array(found) - expected).max() <= 2, found


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "16-bit PNG", "WEBP"])
@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 1)), (4, (0, 1)), (6, (1, 0)), (8, (0, 1))]
)
def test_exif_orientation(kind, orientation, corner, tmp_path):
    """A dark patch in the upper left corner of the file, which EXIF moves to another corner."""
    image = Image.new("L", (64, 32), 255)
    ImageDraw.Draw(image).rectangle((0, 0, 15, 15), 0)
    if kind == "16-bit PNG":
        image = Image.fromarray(np.asarray(image).astype("u2") * 257)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "picture", kind.removeprefix("16-bit "), exif=exif)
    for found in (load_image(tmp_path / "picture"), to_rgb(load_image(tmp_path / "picture"))):
        width, height = found.size
        assert (width, height) == ((32, 64) if orientation > 4 else (64, 32))
        dark = {(x, y) for x in (0, 1) for y in (0, 1) if found.getpixel((x * (width - 1), y * (height - 1)))[0] < 50}
        assert dark == {corner}


def test_broken_exif_is_ignored(tmp_path):
    in_mode("RGB", RED).save(tmp_path / "picture.png", exif=b"Exif\0\0no EXIF")
    assert pixels(load_image(tmp_path / "picture.png")) == [RED]


def test_a_picture_that_older_pillow_opens_with_32_bits():
    image = wide([0, 0x8080, 0xFFFF], "i4", "I")
    image.format = "PNG"
    assert pixels(to_rgb(image)) == [BLACK, (128,) * 3, WHITE]
    image.putpixel((0, 0), 70_000)
    with pytest.raises(ValueError, match="its pixels are 32896 to 70000; 0 to 65535 was expected"):
        to_rgb(image)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (wide([0, 200], "i4"), "32-bit integers, and nothing says which of them is white"),
        (wide([0, 1], "f4"), "floating-point numbers, and nothing says which of them is white"),
        (Image.new("RGB", (0, 4)), "0 x 4: it has no pixels"),
        (np.zeros((2, 2, 3), "u1"), "must be a Pillow image, not ndarray"),
        ("photo.png", "must be a Pillow image, not str"),
    ],
    ids=["I", "F", "empty", "array", "name"],
)
def test_pictures_without_known_values_are_refused(picture, message):
    with pytest.raises(ValueError, match=message) as caught:
        to_rgb(picture)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------------- names


@pytest.fixture
def picture(tmp_path):
    in_mode("RGB", RED).save(tmp_path / "a picture.png")
    return tmp_path / "a picture.png"


def test_names(picture, monkeypatch):
    monkeypatch.setenv("HOME", str(picture.parent))
    monkeypatch.chdir(picture.parent)
    data = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    names = [picture, str(picture), "a picture.png", "~/a picture.png", picture.as_uri(), f"file://{picture}", data]
    names += [picture.as_uri().replace("file://", "FILE://localhost")]
    assert "%20" in picture.as_uri()
    assert [pixels(image) for image in load_images(names)] == [[RED]] * len(names)


FAULTS = {
    "missing": ("missing.png", "no such file"),
    "nothing": ("", "no such file"),
    "directory": ("", "it is a directory"),
    "empty": ("empty.png", "it is empty"),
    "text": ("text.png", "it is no picture that Pillow can read"),
    "truncated": ("truncated.png", "truncated"),
    "broken": ("broken.png", "broken"),
    "large": ("large.png", "exceeds limit"),
    "integers": ("integers.tiff", "32-bit integers"),
    "floats": ("floats.pfm", "floating-point numbers"),
    "signed": ("signed.tiff", "32-bit integers"),
}


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    noise = Image.effect_noise((64, 64), 80)
    png = saved(noise, "PNG")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "truncated.png").write_bytes(png[: len(png) // 2])
    (tmp_path / "broken.png").write_bytes(png.replace(b"IDAT", b"\0\0\0\0"))
    (tmp_path / "large.png").write_bytes(saved(Image.new("1", (300, 300)), "PNG"))
    (tmp_path / "integers.tiff").write_bytes(saved(wide([0, 200], "i4"), "TIFF"))
    (tmp_path / "floats.pfm").write_bytes(b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5))
    (tmp_path / "signed.tiff").write_bytes(grey_tiff(16, 1, b"\0\0\xff\xff", 2, sample_format=2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40_000)
    return tmp_path


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("as_url", [False, True])
def test_faulty_files(name, as_url, faulty):
    file, message = FAULTS[name]
    path = "" if name == "nothing" else str(faulty / file)
    path = (faulty / file).as_uri() if as_url and path else path
    with pytest.raises(ValueError) as caught:
        load_image(path)
    assert str(caught.value).startswith(f"cannot read the image {path}: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and "0x" not in str(caught.value)


def test_half_a_picture_is_an_error_whatever_other_libraries_want(faulty, monkeypatch):
    """lmms-eval, once it is imported, has Pillow fill what is missing."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image(faulty / FAULTS["truncated"][0])
    assert ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png: Connection refused"),
        ("https://", "https://: no host given"),
        ("ftp://127.0.0.1/a.png", "the schemes of URLs are http, https, file and data"),
        ("file://server/a.png", "another machine, server"),
        ("file:///no%20such.png", "no such file"),
        ("data:image/png;base64,AAAA", "it is no picture"),
        ("data:image/png;base64,", "it is empty"),
        ("two\nlines.png", r"cannot read the image 'two\nlines.png': no such file"),
        ("\udcff.png", r"cannot read the image '\udcff.png': no such file"),
        ("nul\0.png", "no such file"),
        ("~nobody-of-this-name/a.png", "no such file"),
        ("x" * 5000, "no such file"),
    ],
    ids=lambda value: ascii(value)[:30],
)
def test_faulty_names(name, message):
    with pytest.raises(ValueError) as caught:
        load_image(name)
    assert message in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 300


@pytest.fixture(scope="module")
def server():
    png = saved(in_mode("RGB", RED), "PNG")
    answers = {"/a%20picture.png?size=1": (200, png), "/page": (200, b"<html>"), "/empty": (200, b"")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, content = answers.get(self.path, (404, b"no"))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_url(server, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    for name in ("/a%20picture.png?size=1", "/a picture.png?size=1"):
        assert pixels(load_image(server + name)) == [RED]
    for name, message in (
        ("/page", "it is no picture that Pillow can read"),
        ("/empty", "it is empty"),
        ("/missing.png", "the server answers 404 Not Found"),
    ):
        with pytest.raises(ValueError) as caught:
            load_image(server + name)
        assert str(caught.value) == f"cannot read the image {server}{name}: {message}"


# ------------------------------------------------------------------------------------------------------- readers


def gradient():
    return Image.fromarray((np.arange(400, dtype="u2") * 160).reshape(20, 20))


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return AutoProcessor.from_pretrained(write_processor(tmp_path_factory.mktemp("processor")))


def pixel_values(reader, image, processor, tmp_path, monkeypatch):
    """What reaches the vision tower when `reader` is given the picture."""
    case = calibration_data.Case((image,), "what ?")
    if reader == "encode":
        return calibration_data.encode(case, processor)["pixel_values"]
    if reader == "encode_batches":
        return next(evaluation.encode_batches(processor, [case], 1))["pixel_values"]
    if reader == "folder":
        image.save(tmp_path / "a.png")
        (tmp_path / "a.jsonl").write_text('{"image": "a.png", "prompt": "what ?"}')
        return next(calibration_data.load_samples(tmp_path, processor, 1))["pixel_values"]
    model, seen = make_model(shortv_layers=[1]), []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args, kwargs: seen.extend(args), with_kwargs=True)
    if reader == "ask":
        chat.Conversation(model, processor, 1).ask("what ?", [image])
    if reader == "compare":
        monkeypatch.setattr(comparison, "MAX_ROUNDS", 1)
        comparison.compare(model, processor, "what ?", [image], 1)
    if reader == "draw_reduction":
        method = {"method": "random", "token_num": 4}
        reduction_pictures.draw_reduction(model, processor, image, "what ?", method, tmp_path / "out.png")
    assert all(torch.equal(each, seen[0]) for each in seen)
    return seen[0]


@pytest.mark.parametrize("reader", ["encode", "encode_batches", "folder", "ask", "compare", "draw_reduction"])
def test_every_reader_sees_the_right_values(reader, processor, tmp_path, monkeypatch):
    image = gradient()
    grey = Image.fromarray(np.rint(np.asarray(image) / 257).astype("u1"))
    expected = processor(images=grey.convert("RGB"), text="<image>", return_tensors="pt")["pixel_values"]
    found = pixel_values(reader, image, processor, tmp_path, monkeypatch)
    assert expected.std() > 0.3 and torch.equal(found, expected)


def test_a_picture_is_measured_by_its_header(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").write_bytes(data[:50])  # without pixels
    assert measure_image(tmp_path / "x.png") == measure_image(tmp_path / "x.png", ("PNG",)) == (30, 20)
    with pytest.raises(ValueError, match="it is no picture; BMP, GIF can be read"):
        measure_image(tmp_path / "x.png", ("BMP", "GIF"))


def test_the_package_opens_pictures_in_one_place():
    package = Path(calibration_data.__file__).parents[1]
    opening = {file.name for file in package.rglob("*.py") if "Image.open(" in file.read_text(encoding="utf-8")}
    converting = {file.name for file in package.rglob("*.py") if '.convert("RGB")' in file.read_text(encoding="utf-8")}
    assert opening == {"images.py"} and converting <= {"images.py"}
