"""Tiny models, inputs and the deliberately simple reference that the tests compare with."""

from contextlib import contextmanager

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
)

from shortv_hf import (
    ShortVLlavaConfig,
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextConfig,
    ShortVLlavaNextForConditionalGeneration,
)
from shortv_hf.upstream import image_features


FAMILIES = {
    "llava": (ShortVLlavaConfig, ShortVLlavaForConditionalGeneration, LlavaForConditionalGeneration),
    "llava_next": (ShortVLlavaNextConfig, ShortVLlavaNextForConditionalGeneration, LlavaNextForConditionalGeneration),
}
IMAGE_TOKEN = 98
VOCABULARY = 99
N_LAYERS = 4
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**TEXT),
    "mistral": lambda: MistralConfig(**TEXT, sliding_window=None),
    "mistral_sliding": lambda: MistralConfig(**TEXT, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**TEXT),
    "qwen2_sliding": lambda: Qwen2Config(
        **TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),  # layers 0 and 1 attend to everything, 2 and 3 to a window
}
OTHER_TEXT_CONFIGS = {
    "deep": lambda: LlamaConfig(**{**TEXT, "num_hidden_layers": 32})
}  # to count FLOPs, not to compare
IMAGE_SIZE, PATCH = 16, 4  # 16 patches
NEXT_SIZES = [(16, 32), (30, 12)]  # (height, width) of the images that LLaVA-NeXT gets, in turn


def make_config(family: str = "llava", text: str = "llama", **kwargs):
    """A tiny ShortV config."""
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=16,
    )
    if family == "llava_next":
        kwargs.setdefault("image_grid_pinpoints", [[16, 32], [32, 16], [32, 32]])
    return FAMILIES[family][0](
        vision_config=vision.to_dict(),
        text_config=(TEXT_CONFIGS | OTHER_TEXT_CONFIGS)[text]().to_dict(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=16,
        **kwargs,
    )


def make_model(family: str = "llava", text: str = "llama", attn: str = "sdpa", seed: int = 0, **kwargs):
    """A tiny ShortV model in float32, eval mode."""
    config = make_config(family, text, **kwargs)
    config._attn_implementation = attn
    torch.manual_seed(seed)
    model = FAMILIES[family][1](config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def make_stock(model):
    """The Hugging Face model with the same weights."""
    family = model.config.base_model_type
    fields = model.config.to_dict()
    for name in ("auto_map", "shortv_layers", "visual_reduction", "base_model_name_or_path", "base_model_revision"):
        fields.pop(name)
    fields["model_type"] = family
    stock_class = FAMILIES[family][2]
    config = stock_class.config_class.from_dict(fields)
    config._attn_implementation = model.config._attn_implementation
    stock = stock_class(config).eval()
    stock.load_state_dict(model.state_dict())
    stock.generation_config = model.generation_config
    return stock


def make_images(config, n: int, seed: int = 0) -> dict:
    """`pixel_values` (and `image_sizes`) of `n` random images."""
    generator = torch.Generator().manual_seed(seed)
    if config.base_model_type == "llava":
        return {"pixel_values": torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)}
    sizes = [NEXT_SIZES[i % 2] for i in range(n)]
    return {
        "pixel_values": torch.randn(n, 3, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),  # base image and two tiles
        "image_sizes": torch.tensor(sizes),
    }


def image_lengths(model, images: dict) -> list[int]:
    """Number of tokens of each image."""
    with torch.no_grad():
        features = model.get_image_features(**images)
    features = image_features(features)
    return [len(feature) for feature in features]


def make_inputs(model, rows: list[str], padding_side: str = "left", seed: int = 0) -> dict:
    """Model inputs. A row such as `"tttIttIt"` is a text token per `t` and an image per `I`."""
    n_images = sum(row.count("I") for row in rows)
    inputs = make_images(model.config, n_images, seed) if n_images else {}
    lengths = iter(image_lengths(model, inputs) if n_images else [])
    generator = torch.Generator().manual_seed(seed + 1)
    sequences = []
    for row in rows:
        sequence = []
        for token in row:
            if token == "I":
                sequence += [IMAGE_TOKEN] * next(lengths)
            else:
                sequence.append(int(torch.randint(3, IMAGE_TOKEN, (), generator=generator)))
        sequences.append(sequence)
    length = max(map(len, sequences))
    ids, mask = [], []
    for sequence in sequences:
        padding = length - len(sequence)
        left, right = (padding, 0) if padding_side == "left" else (0, padding)
        ids.append([0] * left + sequence + [0] * right)
        mask.append([0] * left + [1] * len(sequence) + [0] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), **inputs}


def solo_inputs(inputs: dict, rows: list[str], index: int) -> dict:
    """Row `index` of a batch, without its padding."""
    first = sum(row.count("I") for row in rows[:index])
    images = rows[index].count("I")
    keep = inputs["attention_mask"][index].bool()
    solo = {"input_ids": inputs["input_ids"][index][keep][None], "attention_mask": torch.ones(1, int(keep.sum()))}
    solo["attention_mask"] = solo["attention_mask"].long()
    if images:
        for name in ("pixel_values", "image_sizes"):
            if name in inputs:
                solo[name] = inputs[name][first : first + images]
    return solo


def part_of(layers, entry: int | str):
    """What an entry of `shortv_layers` names."""
    layer, _, part = str(entry).partition(".")
    return getattr(layers[int(layer)], part) if part else layers[int(layer)]


@contextmanager
def discard_updates(stock, layers: list[int | str], visual_mask: torch.Tensor):
    """The simple reference: inside, the dense `stock` model runs every layer for every token, and then throws the
    updates of visual tokens in `layers` away; of a part of a layer what it adds to them. Chunks of another length than
    `visual_mask` `[B, S]` are left alone."""

    def discarding(forward, whole):
        def wrapped(*args, **kwargs):
            hidden_states = args[0] if args else kwargs["hidden_states"]
            output = forward(*args, **kwargs)
            if hidden_states.shape[1] != visual_mask.shape[1]:
                return output
            mask = visual_mask.repeat_interleave(len(hidden_states) // len(visual_mask), 0)[..., None]  # beams
            if isinstance(output, tuple):  # of an attention
                return output[0].masked_fill(mask, 0), *output[1:]
            return torch.where(mask, hidden_states, output) if whole else output.masked_fill(mask, 0)

        return wrapped

    frozen = [part_of(stock.model.language_model.layers, entry) for entry in layers]
    for entry, layer in zip(layers, frozen, strict=True):
        layer.forward = discarding(layer.forward, whole=isinstance(entry, int))
    try:
        yield stock
    finally:
        for layer in frozen:
            del layer.forward


def reference_forward(stock, layers, inputs, visual_mask=None, **kwargs):
    """Output of the simple reference."""
    if visual_mask is None:
        visual_mask = inputs["input_ids"] == stock.config.image_token_id
    with discard_updates(stock, layers, visual_mask):
        return stock(**inputs, **kwargs)
