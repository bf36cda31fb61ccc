"""A tiny processor, written file by file in the form that both Transformers lines read."""

import json

from helpers import IMAGE_SIZE, IMAGE_TOKEN, PATCH, VOCABULARY


# In the manner of LLaVA-1.5: the generation prompt ends with ":", and an answer follows it after a space.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_processor(folder, family="llava"):
    """Write the processor files of a word-level vocabulary of 99 tokens into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "<pad>",
        "<s>",
        "</s>",
        "<unk>",
        "USER",
        "ASSISTANT",
        ":",
        "what",
        "is",
        "this",
        "?",
        "a",
        "red",
        "circle",
    ]
    vocabulary = {word: i for i, word in enumerate(words)}
    vocabulary |= {f"w{i}": i for i in range(len(words), IMAGE_TOKEN)}
    vocabulary["<image>"] = IMAGE_TOKEN
    assert len(vocabulary) == VOCABULARY
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<image>": IMAGE_TOKEN}
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for token, i in special.items()
    ]
    files = {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "left",
            "processor_class": PROCESSORS[family],
            "added_tokens_decoder": {
                str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
            },
        },
        "special_tokens_map.json": {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        },
        "preprocessor_config.json": {
            "image_processor_type": IMAGE_PROCESSORS[family],
            "processor_class": PROCESSORS[family],
            "size": {"shortest_edge": IMAGE_SIZE},
            "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        | ({"image_grid_pinpoints": [[16, 32], [32, 16], [32, 32]]} if family == "llava_next" else {}),
        "processor_config.json": {
            "processor_class": PROCESSORS[family],
            "image_token": "<image>",
            "patch_size": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


PROCESSORS = {"llava": "LlavaProcessor", "llava_next": "LlavaNextProcessor"}
IMAGE_PROCESSORS = {"llava": "CLIPImageProcessor", "llava_next": "LlavaNextImageProcessor"}
