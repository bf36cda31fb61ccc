"""A user's words as a chat template's message: they are text, whatever they hold."""

from collections.abc import Sequence

from transformers import ProcessorMixin


def user_message(prompt: str, images: Sequence, processor: ProcessorMixin, videos: Sequence = ()) -> dict:
    """The message with a place for each of the `images` and of the `videos`, and the prompt after them.

    The text of a special token, `<image>` above all, is no token in a prompt: it gets a space, `< image>`. The processor
    looks for image tokens in the text, before any tokenizer, so nothing but the text can tell them apart.

    Raises:
        ValueError: the prompt is not valid UTF-8.
    """
    check_utf8(prompt)
    placeholders = [getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video")]
    for token in (*placeholders, *processor.tokenizer.all_special_tokens):
        if len(token) > 1:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
    places = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    return {"role": "user", "content": [*places, {"type": "text", "text": prompt}]}


def check_utf8(prompt: str):
    """Raises `ValueError` if a prompt holds bytes that are not UTF-8, which Python keeps as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 at character {error.start + 1}") from None
