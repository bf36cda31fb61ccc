"""A tiny processor, written file by file in the form that both Transformers lines read."""

import json

from helpers import IMAGE_SIZE, IMAGE_TOKEN, PATCH, VOCABULARY


# In the manner of LLaVA-1.5: the generation prompt ends with ":", and an answer follows it after a space.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}: "
    "{% for part in message['content'] if part['type'] == 'image' %}PICTURE\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'video' %}VIDEO\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


# Tokens about pictures and what stands around them, and the names under which processors ask the tokenizer for them
VISUAL_TOKENS = {
    "image_token": "<image>",
    "context_image_token": "<image>",
    "video_token": "<video>",
    **dict.fromkeys(["boi_token", "start_image_token", "vision_start_token"], "<start>"),
    **dict.fromkeys(["eoi_token", "end_image_token", "vision_end_token"], "<end>"),
}


def write_processor(folder, family="llava", tokenizer="words", ids=None):
    """Write the processor files of a vocabulary of 99 tokens into `folder`, of one of the [`PROCESSORS`]: of words, or of characters and a few pairs,
    "prepend" in the manner of Llama (a text begins with a space that is not there, and the files name a class that
    upstream ignores for LLaVA), "bytes" in that of GPT-2 and Qwen. `ids`, with "words" only, says where all of the
    [`VISUAL_TOKENS`] are, for the tiny models of `families.py`; without it there is <image> alone, as the last token."""
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
    visual = ids or {"<image>": IMAGE_TOKEN}
    vocabulary |= {f"w{i}": i for i in range(len(words), VOCABULARY) if i not in visual.values()} | visual
    assert len(vocabulary) == VOCABULARY
    special = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **visual}
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
            **(WORDS if tokenizer == "words" else PREPEND if tokenizer == "prepend" else BYTES),
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
            if tokenizer == "words"
            else pairs_of_characters("▁" if tokenizer == "prepend" else "Ġ"),
        },
        "tokenizer_config.json": {
            "tokenizer_class": "LlamaTokenizer" if tokenizer == "prepend" else "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "legacy": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "left",
            "processor_class": PROCESSORS[family],
            "added_tokens_decoder": {
                str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
            },
            **({"extra_special_tokens": VISUAL_TOKENS} if ids else {}),
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
        | IMAGE_OPTIONS.get(family, {})
        | ({"image_grid_pinpoints": TILES if ids else TILES_OF_HELPERS} if family in TILED else {}),
        "processor_config.json": {"processor_class": PROCESSORS[family]} | PROCESSOR_OPTIONS.get(family, {}),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    picture = PICTURES.get(family, "<image>") if ids else "<image>"
    template = CHAT_TEMPLATE.replace("PICTURE", picture).replace("VIDEO", picture.replace("<image>", "<video>"))
    (folder / "chat_template.jinja").write_text(template)
    return folder


WORDS = {"normalizer": None, "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None}
PREPEND = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    },
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
BYTES = {"normalizer": None, "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL}


def pairs_of_characters(space: str) -> dict:
    """A BPE model in which a word's first letter joins the space before it, and some letters join each other."""
    characters = [space, "Ċ" if space == "Ġ" else "\n", *"abcdefghijklmnopqrstuvwxyz", *"ASITNUER", *":?!.,0123456789"]
    merges = [(space, letter) for letter in "awirbcteAU"] + [("i", "s"), ("e", "d"), (":", space), ("?", space)]
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *characters, *map("".join, merges)]
    tokens += [f"<unused{i}>" for i in range(len(tokens), IMAGE_TOKEN)] + ["<image>"]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": "<unk>"}
    return {**model, "merges": [list(pair) for pair in merges]}


PROCESSORS = {
    "llava": "LlavaProcessor",
    "llava_next": "LlavaNextProcessor",
    "llava_onevision": "LlavaOnevisionProcessor",
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "internvl": "InternVLProcessor",
    "gemma3": "Gemma3Processor",
    "idefics3": "Idefics3Processor",
}
IMAGE_PROCESSORS = {
    "llava": "CLIPImageProcessor",
    "llava_next": "LlavaNextImageProcessor",
    "llava_onevision": "LlavaOnevisionImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "qwen3_vl": "Qwen2VLImageProcessor",
    "internvl": "GotOcr2ImageProcessor",
    "gemma3": "Gemma3ImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
}
# What a processor reads beside the tokenizer, for the towers of `helpers.py` and `families.py`
PATCHES = {
    "image_token": "<image>",
    "patch_size": PATCH,
    "num_additional_image_tokens": 1,
    "vision_feature_select_strategy": "default",
}
SIDE = {"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
QWEN_PATCHES = {
    "patch_size": PATCH,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 512},
}
TILED = ("llava_next", "llava_onevision")
TILES, TILES_OF_HELPERS = [[16, 16], [16, 32], [32, 16]], [[16, 32], [32, 16], [32, 32]]
IMAGE_OPTIONS = {
    "llava_onevision": SIDE,
    "qwen2_vl": QWEN_PATCHES,
    "qwen2_5_vl": QWEN_PATCHES,
    "qwen3_vl": QWEN_PATCHES,
    "internvl": {**SIDE, "min_patches": 1, "max_patches": 2},
    "gemma3": SIDE,
    "idefics3": {
        "size": {"longest_edge": IMAGE_SIZE},
        "max_image_size": {"longest_edge": IMAGE_SIZE},
        "do_image_splitting": False,
    },
}
PROCESSOR_OPTIONS = {
    "llava": PATCHES,
    "llava_next": PATCHES,
    "llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
    "internvl": {"image_seq_length": 4},
    "gemma3": {"image_seq_length": 16},
    "idefics3": {"image_seq_len": 4},
}
PICTURES = {  # in a prompt, before the processor puts a token for each feature there
    **dict.fromkeys(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], "<start><image><end>"),
    "gemma3": "<start>",
}
