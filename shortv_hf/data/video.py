"""Videos as the models take them: some of their frames, as upright RGB pictures, and when they are shown.

    load_video("clip.mp4")                # at most 32 frames, spaced evenly from the first to the last
    load_video("clip.mp4", 16, fps=1)     # one a second; if these are more than 16, then 16 spaced evenly

Decoding needs PyAV, the `video` extra.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..upstream import ON_4


MAX_FRAMES = 32


@dataclass(frozen=True)
class Video:
    """Frames of a video, all of one size, and the `seconds` after the first of them at which they are shown."""

    frames: tuple[Image.Image, ...]
    seconds: tuple[float, ...]

    @property
    def fps(self) -> float:
        """Frames per second among these frames; 1 of a single one."""
        duration = self.seconds[-1] - self.seconds[0]
        return (len(self.frames) - 1) / duration if duration > 0 else 1.0


def load_video(name: str | os.PathLike, max_frames: int = MAX_FRAMES, fps: float | None = None) -> Video:
    """Frames of the video in a file.

    Args:
        name: a path, in which a leading ~ is the home directory.
        max_frames: the most frames; spaced evenly over the whole video, its first and its last frame among them.
        fps: frames a second instead, counted from the first frame, where they are not more than `max_frames`.

    Raises:
        ValueError: PyAV is missing, or the file cannot be read; one line that names it and says why.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"reading a video needs the extra: pip install '.[video]' ({error})") from None
    path = Path(name).expanduser()
    try:
        if not path.exists():
            raise ValueError("no such file")
        if path.is_dir():
            raise ValueError("it is a directory")
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it holds no video")
            times = _shown_at(container)
        with av.open(str(path)) as container:  # anew: not every format can be wound back
            return _decode(container, times[_choose(times, max_frames, fps)])
    except (ValueError, OSError) as error:  # PyAV's own are of one of these kinds, or of both
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ValueError(f"cannot read the video {name}: {reason}") from None


def _shown_at(container: Any) -> np.ndarray:
    """Of all frames of the first video stream, when they are shown, ascending `[N]`, in seconds.
    Nothing is decoded: files say neither reliably how many frames they hold nor how long they are."""
    stream = container.streams.video[0]
    stamps = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
    if not stamps:
        raise ValueError("it holds no frames")
    return np.array(stamps) * float(stream.time_base)


def _choose(times: np.ndarray, max_frames: int, fps: float | None) -> list[int]:
    """The indices of the frames, of those shown at `times` `[N]`, that are nearest to the wanted times."""
    times = times - times[0]
    wanted = np.linspace(0, times[-1], min(max_frames, len(times)))
    if fps is not None and times[-1] * fps < max_frames:
        wanted = np.arange(0, times[-1] + 1e-6, 1 / fps)[:max_frames]
    return sorted({int(np.abs(times - second).argmin()) for second in wanted})


def _decode(container: Any, wanted: np.ndarray) -> Video:
    """The frames shown at the `wanted` seconds, ascending; the next ones for those that cannot be decoded, as at the
    beginning of a recording that was cut."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    frames: list[Image.Image] = []
    seconds: list[float] = []
    left = list(wanted)
    for frame in container.decode(stream):
        if frame.pts is None or float(frame.pts * stream.time_base) < left[0] - 1e-6:
            continue
        seconds.append(float(frame.pts * stream.time_base))
        while left and left[0] <= seconds[-1] + 1e-6:
            left.pop(0)
        image = frame.to_image()
        # Of phones, which film lying down and say how to turn it
        frames.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
        if not left:
            break
    if not frames:
        raise ValueError("none of its frames can be decoded")
    return Video(tuple(frames), tuple(each - seconds[0] for each in seconds))


def video_arguments(videos: Sequence[Video]) -> dict:
    """What a processor is called with for `videos`; `{}` for none. They have been sampled, so to the processor they are
    videos whose every frame counts."""
    if not videos:
        return {}
    metadata = [
        {"total_num_frames": len(video.frames), "fps": video.fps, "frames_indices": list(range(len(video.frames)))}
        for video in videos
    ]
    options: dict[str, Any] = {"do_sample_frames": False, "video_metadata": metadata}
    if ON_4:  # does not look into the metadata for it
        options["fps"] = [video.fps for video in videos]
    return {"videos": [list(video.frames) for video in videos], "videos_kwargs": options}
