"""What goes into a model and what a command writes: pictures, prompts, samples, answers, files."""

from .. import lazy_names


__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "images": ("load_image", "load_images", "to_rgb"),
        "video": ("Video", "load_video"),
        "sources": ("Case", "Samples", "encode", "load_cases", "load_samples"),
    },
)
