"""A user's words as a chat template's message: they are text, whatever they hold."""

from collections.abc import Sequence

from transformers import ProcessorMixin


def user_message(prompt: str, images: Sequence, processor: ProcessorMixin, videos: Sequence = ()) -> dict:
    """The message with a place for each of the `images` and of the `videos`, and the prompt after them, [`as_text`].

    Raises:
        ValueError: the prompt is not valid UTF-8.
    """
    places = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    return {"role": "user", "content": [*places, {"type": "text", "text": as_text(prompt, processor)}]}


def as_text(prompt: str, processor: ProcessorMixin) -> str:
    """The prompt with no special token in it: the text of one, `<image>` above all, gets a space, `< image>`. The processor
    looks for image tokens in the text, before any tokenizer, so nothing but the text can tell them apart.

    Raises:
        ValueError: the prompt is not valid UTF-8.
    """
    check_utf8(prompt)
    placeholders = [getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "video")]
    for token in (*placeholders, *processor.tokenizer.all_special_tokens):
        if len(token) > 1:
            prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
    return prompt


def system_message(text: str) -> dict:
    """The message before a user's, as parts: templates that print system messages expect either form or parts only."""
    return {"role": "system", "content": [{"type": "text", "text": text}]}


def check_system_prompt(text: str, processor: ProcessorMixin):
    """Raises `ValueError` if the chat template leaves out, or refuses, what a system message says."""
    check_utf8(text)
    try:
        prompt = processor.apply_chat_template([system_message(text), user_message("", (), processor)])
    except Exception as error:  # what a template raises is up to it
        raise ValueError(f"the model's chat template takes no system prompt: {error}") from None
    if text not in prompt:
        raise ValueError("the model's chat template does not print a system prompt")


def check_utf8(prompt: str):
    """Raises `ValueError` if a prompt holds bytes that are not UTF-8, which Python keeps as surrogates."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid UTF-8 at character {error.start + 1}") from None
