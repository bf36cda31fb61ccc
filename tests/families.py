"""Tiny random models of every family, inputs as their processors make them, and the simple reference.

A row of inputs is written as in `helpers.py`: a text token per `t`, an image per `I`, a video per `V`.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

import shortv_hf


V4 = transformers.__version__.startswith("4.")
N_LAYERS, HIDDEN, VOCABULARY = 4, 32, 99
IMAGE, VIDEO, START, END = 90, 91, 92, 93  # placeholders, and what stands before and after them
SPECIAL = [IMAGE, VIDEO, START, END, 94, 95]  # 94 and 95 are GLM-4V's for videos
KINDS = {"image": ["ttItt"], "images": ["ttItItt", "tIttt"], "video": ["tItVtt", "ttVt"], "text": ["ttttt", "ttt"]}


# ------------------------------------------------------------------------------------------------------------ configs


def text_fields(**fields: Any) -> dict:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
        **fields,
    }


def text(name: str = "Llama", **fields: Any) -> PretrainedConfig:
    return getattr(transformers, f"{name}Config")(**text_fields(**fields))


def tower(**fields: Any) -> dict:
    """Fields of a vision tower with two layers."""
    return {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        **fields,
    }


def m_rope(sections: list[int], **fields: Any) -> dict:
    """Rotary settings in three dimensions, under the name that this line reads."""
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4, **fields}
    return {"rope_scaling": rope, "rope_theta": 1e4} if V4 else {"rope_parameters": rope}


def qwen_vision(**fields: Any) -> dict:
    return {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, **fields}


QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
TILES = [[16, 16], [16, 32], [32, 16]]


def llava_config(text_config: PretrainedConfig | None = None) -> PretrainedConfig:
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tower(num_hidden_layers=3), projection_dim=16),
        text_config=text() if text_config is None else text_config,
        image_token_index=IMAGE,
        image_seq_length=16,
    )


def llava_next_config() -> PretrainedConfig:
    return transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**tower(num_hidden_layers=3), projection_dim=16),
        text_config=text("Mistral", sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=TILES,
    )


def llava_onevision_config() -> PretrainedConfig:
    return transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**tower(), vision_use_head=False),
        text_config=text("Qwen2"),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=TILES,
    )


def qwen2_vl_config() -> PretrainedConfig:
    return transformers.Qwen2VLConfig(
        vision_config=qwen_vision(embed_dim=16, hidden_size=HIDDEN, mlp_ratio=2),
        text_config=text_fields(**m_rope([2, 1, 1])),
        **QWEN_IDS,
    )


def qwen2_5_vl_config() -> PretrainedConfig:
    vision = qwen_vision(hidden_size=16, out_hidden_size=HIDDEN, intermediate_size=32)
    return transformers.Qwen2_5_VLConfig(
        vision_config={**vision, "window_size": 16, "fullatt_block_indexes": [1]},
        text_config=text_fields(**m_rope([2, 1, 1])),
        **QWEN_IDS,
    )


def qwen3_vl_config() -> PretrainedConfig:
    vision = qwen_vision(hidden_size=16, out_hidden_size=HIDDEN, intermediate_size=32, num_position_embeddings=64)
    return transformers.Qwen3VLConfig(
        vision_config={**vision, "depth": 4, "deepstack_visual_indexes": [0, 1, 2]},
        text_config=text_fields(**m_rope([2, 1, 1], mrope_interleaved=True), head_dim=8),
        **QWEN_IDS,
    )


def internvl_config() -> PretrainedConfig:
    vision = tower(image_size=[16, 16], patch_size=[4, 4])
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision),
        text_config=text("Qwen3", head_dim=8),
        image_token_id=IMAGE,
        image_seq_length=4,
        downsample_ratio=0.5,
    )


def gemma3_config() -> PretrainedConfig:
    kinds = ["sliding_attention", "full_attention"] * 2
    fields = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 14, "layer_types": kinds}
    return transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**tower(patch_size=2), vision_use_head=False),
        text_config=text("Gemma3Text", **fields),
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        mm_tokens_per_image=16,  # of 64 patches
    )


def idefics3_config(name: str = "Idefics3") -> PretrainedConfig:
    return getattr(transformers, f"{name}Config")(
        vision_config=tower(), text_config=text(), image_token_id=IMAGE, scale_factor=2, pad_token_id=0
    )


def mistral3_config() -> PretrainedConfig:
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**tower(head_dim=8)),
        text_config=text("Mistral", sliding_window=None, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )


def glm4v_config() -> PretrainedConfig:
    vision = qwen_vision(hidden_size=16, out_hidden_size=HIDDEN, intermediate_size=32, image_size=16)
    half = {"partial_rotary_factor": 0.5}
    return transformers.Glm4vConfig(
        vision_config=vision,
        text_config=text_fields(**m_rope([1, 1, 0], **half), **(half if V4 else {})),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=94,
        video_end_token_id=95,
    )


def paligemma_config() -> PretrainedConfig:
    fields = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 14, "attn_logit_softcapping": 5.0}
    return transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**tower(), projection_dim=HIDDEN),
        text_config=text("Gemma2", **fields),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
    )


# ------------------------------------------------------------------------------------------------------------- inputs


@dataclass
class Block:
    """A piece of a row: its tokens, and the tensors that belong to them, which a batch joins along the first dimension."""

    tokens: list[int]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def pixels(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator)


def square_image(tokens: int, framed: bool = False) -> Callable:
    """An image of 16 by 16 pixels that becomes `tokens` tokens."""

    def block(i: int, generator: torch.Generator) -> Block:
        ids = [IMAGE] * tokens
        values = {"pixel_values": pixels(1, 3, 16, 16, generator=generator)}
        return Block([START, *ids, END] if framed else ids, values)

    return block


def tiled_image(i: int, generator: torch.Generator) -> Block:
    """LLaVA-NeXT's and OneVision's: a small version, two tiles, and a newline behind each row of them."""
    size, tokens = [([16, 32], 16 + 4 * 9), ([32, 16], 16 + 8 * 5)][i % 2]
    values = {"pixel_values": pixels(1, 3, 3, 16, 16, generator=generator), "image_sizes": torch.tensor([size])}
    return Block([IMAGE] * tokens, values)


def two_frames(i: int, generator: torch.Generator) -> Block:
    """OneVision's video: 2 by 2 tokens per frame and a newline behind all."""
    return Block([VIDEO] * 9, {"pixel_values_videos": pixels(1, 2, 3, 16, 16, generator=generator)})


def internvl_image(i: int, generator: torch.Generator) -> Block:
    """Two tiles or one, of four tokens each."""
    tiles = 2 - i % 2
    return Block([IMAGE] * 4 * tiles, {"pixel_values": pixels(tiles, 3, 16, 16, generator=generator)})


def mistral3_image(i: int, generator: torch.Generator) -> Block:
    block = square_image(4)(i, generator)
    return Block(block.tokens, {**block.tensors, "image_sizes": torch.tensor([[16, 16]])})


def patches(kind: str, grid: tuple[int, int, int], generator: torch.Generator) -> dict[str, Tensor]:
    """Flat patches of an image or a video, and its grid in patches: time, height, width."""
    time, height, width = grid
    pixel_values = pixels(time * height * width, 3 * 2 * 4 * 4, generator=generator)
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    return {name: pixel_values, f"{kind}_grid_thw": torch.tensor([grid])}


def qwen_image(i: int, generator: torch.Generator) -> Block:
    grid = [(1, 4, 8), (1, 4, 4)][i % 2]
    return Block([START, *[IMAGE] * (grid[1] * grid[2] // 4), END], patches("image", grid, generator))


def qwen_video(i: int, generator: torch.Generator) -> Block:
    return Block([START, *[VIDEO] * 8, END], patches("video", (2, 4, 4), generator))


def qwen2_5_video(i: int, generator: torch.Generator) -> Block:
    block = qwen_video(i, generator)
    return Block(block.tokens, {**block.tensors, "second_per_grid_ts": torch.tensor([0.5])})


def qwen3_video(i: int, generator: torch.Generator) -> Block:
    """Each frame stands alone, behind its time in text."""
    frame = [START, *[VIDEO] * 4, END]
    return Block([20, *frame, 21, *frame], patches("video", (2, 4, 4), generator))


def collate(family: "Family", rows: list[list[Block]]) -> dict[str, Tensor]:
    """Model inputs of rows of blocks, left padded."""
    sequences = [sum((block.tokens for block in row), []) for row in rows]
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in sequences])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in sequences])
    inputs = {"input_ids": ids, "attention_mask": mask}
    names = sorted({name for row in rows for block in row for name in block.tensors})
    for name in names:
        per_row = [[block.tensors[name] for block in row if name in block.tensors] for row in rows]
        if family.images_per_row:  # padded with black images, which upstream leaves out
            most = max(map(len, per_row))
            blank = torch.zeros_like(next(tensor for row in per_row for tensor in row))
            inputs[name] = torch.stack([torch.cat([*row, *[blank] * (most - len(row))]) for row in per_row])
        else:
            inputs[name] = torch.cat([tensor for row in per_row for tensor in row])
    inputs.update(token_types(family, ids))
    return inputs


def token_types(family: "Family", ids: Tensor) -> dict[str, Tensor]:
    stock = getattr(transformers, f"{family.stock}ForConditionalGeneration")
    named = "mm_token_type_ids" in inspect.signature(stock.forward).parameters  # not yet on 4.57 and the first of 5.x
    if family.token_types == "mm_token_type_ids" and named:
        return {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
    if family.token_types == "token_type_ids":
        return {"token_type_ids": (ids == IMAGE).long()}
    return {}


# ----------------------------------------------------------------------------------------------------------- families


@dataclass(frozen=True)
class Family:
    """A stock class, what builds its config, and what builds the blocks of images and videos.

    `shortv`: our classes' names without their endings; `None` for families that only `apply_shortv` serves.
    `token_types`: the input that tells visual tokens apart, if there is one.
    """

    stock: str
    config: Callable[..., PretrainedConfig]
    image: Callable[[int, torch.Generator], Block]
    video: Callable[[int, torch.Generator], Block] | None = None
    shortv: str | None = None
    token_types: str | None = None
    images_per_row: bool = False
    attentions: tuple[str, ...] = ("sdpa", "eager")


MM = {"token_types": "mm_token_type_ids"}
FAMILIES = {
    "llava": Family("Llava", llava_config, square_image(16), shortv="ShortVLlava"),
    "llava_next": Family("LlavaNext", llava_next_config, tiled_image, shortv="ShortVLlavaNext"),
    "llava_onevision": Family(
        "LlavaOnevision", llava_onevision_config, tiled_image, two_frames, "ShortVLlavaOnevision"
    ),
    "qwen2_vl": Family("Qwen2VL", qwen2_vl_config, qwen_image, qwen_video, "ShortVQwen2VL", **MM),
    "qwen2_5_vl": Family("Qwen2_5_VL", qwen2_5_vl_config, qwen_image, qwen2_5_video, "ShortVQwen2_5_VL", **MM),
    "qwen3_vl": Family("Qwen3VL", qwen3_vl_config, qwen_image, qwen3_video, "ShortVQwen3VL", **MM),
    "internvl": Family("InternVL", internvl_config, internvl_image, shortv="ShortVInternVL"),
    "gemma3": Family(
        "Gemma3", gemma3_config, square_image(16, True), shortv="ShortVGemma3", token_types="token_type_ids"
    ),
}
OTHERS = {  # without a class of ours
    "idefics3": Family("Idefics3", idefics3_config, square_image(4), images_per_row=True),
    "smolvlm": Family("SmolVLM", lambda: idefics3_config("SmolVLM"), square_image(4), images_per_row=True),
    "mistral3": Family("Mistral3", mistral3_config, mistral3_image),
    "glm4v": Family("Glm4v", glm4v_config, qwen_image, **MM),
    "paligemma": Family(
        "PaliGemma", paligemma_config, square_image(16), token_types="token_type_ids", attentions=("eager",)
    ),
}
REFUSED = {  # LLaVAs whose text models rotate queries and keys in some layers only, or norm them afterwards
    "cohere2": lambda: text(
        "Cohere2", sliding_window=12, layer_types=["sliding_attention", "full_attention"] * 2, use_cache=True
    ),
    "smollm3": lambda: text("SmolLM3", no_rope_layers=[1, 0, 1, 0]),
    "hunyuan_v1_dense": lambda: text("HunYuanDenseV1", head_dim=8),
}


def randomize(model: PreTrainedModel):
    """Weights large enough that freezing a layer is seen, the same on every version."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return model


def make_stock(stock: str, config: PretrainedConfig, attn: str) -> PreTrainedModel:
    name = f"{stock}ForConditionalGeneration"
    if not hasattr(transformers, name):
        pytest.skip(f"Transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model = randomize(getattr(transformers, name)._from_config(config, attn_implementation=attn)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


@functools.cache
def build(family: str, attn: str = "sdpa") -> PreTrainedModel:
    """The stock model, float32, in evaluation mode. It is shared: callers leave it as it is.

    Skips the test if the installed Transformers lacks the family.
    """
    described = (FAMILIES | OTHERS)[family]
    if not hasattr(transformers, f"{described.stock}ForConditionalGeneration"):
        pytest.skip(f"Transformers {transformers.__version__} has no {described.stock}")
    return make_stock(described.stock, described.config(), attn)


def refused(text_model: str) -> PreTrainedModel:
    """A stock LLaVA around a text model that cannot be frozen. Skips the test if it is not there."""
    try:
        config = llava_config(REFUSED[text_model]())
    except AttributeError:
        pytest.skip(f"Transformers {transformers.__version__} has no {text_model}")
    return make_stock("Llava", config, "sdpa")


def shortv_of(stock: PreTrainedModel, layers: list[int], reduction: dict | None = None) -> PreTrainedModel:
    """The ShortV model with the weights of a stock one."""
    family = FAMILIES[stock.config.model_type]
    fields = {**stock.config.to_dict(), "model_type": f"shortv_{stock.config.model_type}"}
    config_class = getattr(shortv_hf, f"{family.shortv}Config")
    config = config_class.from_dict({**fields, "shortv_layers": layers, "visual_reduction": reduction})
    config._attn_implementation = stock.config._attn_implementation
    model = getattr(shortv_hf, f"{family.shortv}ForConditionalGeneration")(config).eval()
    model.load_state_dict(stock.state_dict())
    model.generation_config = stock.generation_config
    return model


def blocks(family: str, row: str, seed: int = 0) -> list[Block]:
    """The pieces of a row; a longer row with the same beginning begins with the same pieces."""
    generator = torch.Generator().manual_seed(seed)
    makers = {"I": (FAMILIES | OTHERS)[family].image, "V": (FAMILIES | OTHERS)[family].video}
    found = []
    for i, letter in enumerate(row):
        if letter == "t":
            found.append(Block(torch.randint(3, IMAGE, (1,), generator=generator).tolist()))
        else:
            found.append(makers[letter](row[:i].count(letter), generator))
    return found


def make_inputs(family: str, rows: list[str], seed: int = 0) -> dict[str, Tensor]:
    """Inputs of a batch; row i alone is `make_inputs(family, [rows[i]], seed=seed + i)`."""
    return collate((FAMILIES | OTHERS)[family], [blocks(family, row, seed + i) for i, row in enumerate(rows)])


def inputs(family: str, kind: str) -> dict[str, Tensor]:
    """Inputs of one of the [`KINDS`]."""
    return make_inputs(family, KINDS[kind])


def kinds(family: str) -> list[str]:
    """The [`KINDS`] of inputs that a family has."""
    return [kind for kind in KINDS if kind != "video" or (FAMILIES | OTHERS)[family].video]


def turns(family: str, first: str, second: str) -> tuple[dict, dict, dict]:
    """Inputs of the first turn, of the second alone, and of both in one row. `attention_mask` of a lone turn is left out:
    nothing is padded."""
    described, both = (FAMILIES | OTHERS)[family], blocks(family, first + second)
    parts = [collate(described, [part]) for part in (both[: len(first)], both[len(first) :], both)]
    for part in parts:
        part.pop("attention_mask")
    return parts[0], parts[1], parts[2]


def extended(family: str, given: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """Inputs with text tokens `new` `[B, n]` behind each row."""
    ids = torch.cat([given["input_ids"], new], dim=1)
    longer = {**given, "input_ids": ids, **token_types((FAMILIES | OTHERS)[family], ids)}
    if "attention_mask" in given:
        longer["attention_mask"] = torch.cat([given["attention_mask"], torch.ones_like(new)], dim=1)
    return longer


# ---------------------------------------------------------------------------------------------------------- reference


def visual_mask(given: dict[str, Tensor]) -> Tensor:
    """Where the placeholders are, `[B, S]` bool."""
    return (given["input_ids"] == IMAGE) | (given["input_ids"] == VIDEO)


def decoder(model: PreTrainedModel) -> torch.nn.Module:
    """The text model."""
    return model.model.language_model if hasattr(model.model, "language_model") else model.model.text_model


def part_of(layers: Any, entry: int | str) -> torch.nn.Module:
    """What an entry of `shortv_layers` names."""
    layer, _, part = str(entry).partition(".")
    return getattr(layers[int(layer)], part) if part else layers[int(layer)]


@contextmanager
def discard_updates(stock: PreTrainedModel, layers: list[int | str], visual: Tensor) -> Iterator[PreTrainedModel]:
    """The simple reference: inside, the stock model runs every layer for every token, and then throws the updates of the
    tokens at `visual` `[B, S]` in `layers` away; of a part of a layer what it adds to them. Chunks of another length are
    left alone."""

    def discarding(forward: Callable, whole: bool) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            output = forward(*args, **kwargs)
            if hidden_states.shape[1] != visual.shape[1]:
                return output
            states = output[0] if isinstance(output, tuple) else output
            states = torch.where(visual[..., None], hidden_states if whole else torch.zeros_like(states), states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return wrapped

    frozen = [part_of(decoder(stock).layers, entry) for entry in layers]
    before = [vars(layer).get("forward") for layer in frozen]  # 4.57 leaves one there when it has recorded outputs
    for entry, layer in zip(layers, frozen, strict=True):
        layer.forward = discarding(layer.forward, whole=isinstance(entry, int))
    try:
        yield stock
    finally:
        for layer, forward in zip(frozen, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@contextmanager
def hidden_tokens(stock: PreTrainedModel, first_layer: int, dropped: Tensor) -> Iterator[PreTrainedModel]:
    """Inside, nobody attends to the tokens at `dropped` `[S]` from `first_layer` on. Eager attention, one row, no cache."""

    def hide(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        mask = kwargs["attention_mask"]
        return args, {**kwargs, "attention_mask": mask.masked_fill(dropped, torch.finfo(mask.dtype).min)}

    hooks = [layer.register_forward_pre_hook(hide, with_kwargs=True) for layer in decoder(stock).layers[first_layer:]]
    try:
        yield stock
    finally:
        for hook in hooks:
            hook.remove()


def greedy(model: PreTrainedModel, given: dict[str, Tensor], n: int = 6, **kwargs: Any) -> Any:
    """What `generate` returns: greedy, never a special token, which a random model may well answer."""
    options = {"do_sample": False, "suppress_tokens": SPECIAL, "eos_token_id": -1, **kwargs}
    with torch.no_grad():
        return model.generate(**given, max_new_tokens=n, **options)
