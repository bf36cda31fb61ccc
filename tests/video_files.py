"""Videos, written by a test."""

from pathlib import Path

import av
import numpy as np
from PIL import Image


SIZE = (48, 32)


def color(i: int, n: int) -> tuple[int, int, int]:
    """Of the frame `i` of `n`: from blue to red."""
    red = round(250 * i / max(n - 1, 1))
    return red, 0, 250 - red


def write_video(file: Path, n: int, rate: int = 10, size: tuple[int, int] = SIZE) -> Path:
    """`n` frames of one colour each, `rate` a second."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt, stream.bit_rate = "yuv420p", 10_000_000  # enough to tell frames apart
        for i in range(n):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, color(i, n)))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file


def write_sound(file: Path) -> Path:
    """A file without pictures."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    return file
