"""Models to compare on: the demonstration model, and random ones with head sizes that vLLM's kernels take.

Each is a folder with the ShortV repo (`shortv`), the stock checkpoint of the same weights (`stock`), and a small repo that
references those (`reference`).
"""

import json
import re
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from shortv_hf import (
    ShortVLlavaConfig,
    ShortVLlavaNextConfig,
    ShortVQwen2_5_VLConfig,
    ShortVQwen2VLConfig,
)
from shortv_hf.benchmark.subjects import SUBJECTS
from shortv_hf.hub import build_repo, demo_model
from shortv_hf.modeling_shortv import MODELS

from .environment import ROOT


sys.path.insert(0, str(ROOT / "tests"))

from processor_files import QWEN_PATCHES, write_processor  # noqa: E402


LAYERS = [0, 2, 3, 5]
HALVES = [0, "2.mlp", "3.self_attn", 5]
# Wide enough for six layers to matter: at the usual 0.02 freezing would hardly change an answer.
TEXT = {
    "vocab_size": 128,
    "hidden_size": 256,  # heads of 64, which all of vLLM's kernels take
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
TOWER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
CLIP = {"model_type": "clip_vision_model", **TOWER, "image_size": 64, "patch_size": 8, "projection_dim": 64}
PATCHES = {"spatial_merge_size": 2, "temporal_patch_size": 2, "patch_size": 4, "depth": 2, "num_heads": 2}
TILES = [[64, 64], [64, 128], [128, 64], [128, 128]]
QWEN_IDS = {"<image>": 90, "<video>": 91, "<start>": 92, "<end>": 93}
QWEN_TOKENS = dict(
    zip(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
        range(90, 94),
        strict=True,
    )
)


def text(model_type: str, **fields) -> dict:
    """A text config's fields."""
    return {**TEXT, "model_type": model_type, **fields}


def m_rope() -> dict:
    """Rotary dimensions of heads of 64 for time, height and width."""
    rope = {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e4}
    return {"rope_parameters": rope, "vocab_size": 99}


def llava(text_config: dict) -> ShortVLlavaConfig:
    """64 tokens an image."""
    fields = {"image_token_index": 3, "image_seq_length": 64, "vision_feature_layer": -2}
    return ShortVLlavaConfig(text_config=text_config, vision_config=CLIP, **fields)


def llava_next(text_config: dict) -> ShortVLlavaNextConfig:
    """64 tokens a tile, and newlines."""
    fields = {"image_token_index": 3, "image_grid_pinpoints": TILES, "vision_feature_layer": -2}
    return ShortVLlavaNextConfig(text_config=text_config, vision_config=CLIP, **fields)


def qwen2_vl() -> ShortVQwen2VLConfig:
    """Images of any size."""
    vision = {**PATCHES, "embed_dim": 64, "hidden_size": 256, "mlp_ratio": 2}
    return ShortVQwen2VLConfig(text_config=text("qwen2_vl_text", **m_rope()), vision_config=vision, **QWEN_TOKENS)


def qwen2_5_vl() -> ShortVQwen2_5_VLConfig:
    """Images of any size, a tower with windows."""
    windows = {"window_size": 16, "fullatt_block_indexes": [1]}
    vision = {**PATCHES, **windows, "hidden_size": 64, "out_hidden_size": 256, "intermediate_size": 128}
    return ShortVQwen2_5_VLConfig(text_config=text("qwen2_5_vl_text", **m_rope()), vision_config=vision, **QWEN_TOKENS)


CONFIGS = {
    "LLaVA-1.5, Llama": lambda: llava(text("llama")),
    "LLaVA-1.5, Mistral": lambda: llava(text("mistral", sliding_window=None, head_dim=64)),
    "LLaVA-1.5, Qwen2": lambda: llava(text("qwen2")),
    "LLaVA-NeXT, Llama": lambda: llava_next(text("llama")),
    "LLaVA-NeXT, Mistral": lambda: llava_next(text("mistral", sliding_window=None, head_dim=64)),
    "LLaVA-NeXT, Qwen2": lambda: llava_next(text("qwen2")),
    "Qwen2-VL": qwen2_vl,
    "Qwen2.5-VL": qwen2_5_vl,
}
DEMO = "demonstration model"


def make(name: str, folder: Path) -> Path:
    """The folder of the model `name`, made there if it is not yet."""
    folder = folder / name.replace(" ", "-").replace(",", "")
    if (folder / "done").is_file():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name == DEMO:
        shutil.copytree(demo_model(), folder / "shortv")
        make_stock(folder)
    else:
        make_random(CONFIGS[name](), folder)
    (folder / "done").touch()
    return folder


def make_random(config, folder: Path) -> None:
    """Weights from a fixed seed, biases too, which upstream begins with zeros."""
    config.shortv_layers = LAYERS
    torch.manual_seed(0)
    model_class = next(each for each in MODELS if each.config_class is type(config))
    model = model_class(config).float().eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "shortv")
    write_processor_files(config, folder / "shortv")
    make_stock(folder)


def write_processor_files(config, folder: Path) -> None:
    """Of the demonstration model, whose words the prompts use; Qwen's of the tests."""
    family = config.base_model_type
    if family.startswith("qwen"):
        write_processor(folder, family, ids=QWEN_IDS)
        options = {**json.loads((folder / "preprocessor_config.json").read_text()), **QWEN_PATCHES}
        options["size"] = {"shortest_edge": 256, "longest_edge": 128 * 128}
        (folder / "preprocessor_config.json").write_text(json.dumps(options))
        return
    for name in ("preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(demo_model()) / name, folder / name)
    shutil.copy(Path(demo_model()) / "chat_template.jinja", folder / "chat_template.jinja")
    if family == "llava_next":
        for name in ("preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            content = json.loads((folder / name).read_text())
            content["processor_class"] = "LlavaNextProcessor"
            if name == "preprocessor_config.json":
                content["image_processor_type"] = "LlavaNextImageProcessor"
                content |= {"image_grid_pinpoints": TILES, "size": {"shortest_edge": 64}, "do_center_crop": True}
                content |= {"crop_size": {"height": 64, "width": 64}, "do_pad": True}
            (folder / name).write_text(json.dumps(content))


def make_stock(folder: Path) -> None:
    """`stock` and `reference` beside `shortv`; with the names that the original LLaVA checkpoints have, of which stock vLLM
    knows no other."""
    source, stock = folder / "shortv", folder / "stock"
    shutil.copytree(source, stock)
    write_stock_config(stock)
    for code in stock.glob("*.py"):
        code.unlink()
    weights = load_file(stock / "model.safetensors")
    old = {
        re.sub(r"vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name): w
        for name, w in weights.items()
    }
    save_file(old, stock / "model.safetensors", {"format": "pt"})
    layers = json.loads((source / "config.json").read_text())["shortv_layers"]
    config = type(transformers.AutoConfig.from_pretrained(source)).from_pretrained(stock, shortv_layers=layers)
    build_repo(config, folder / "reference", processor_dir=stock)


def write_stock_config(folder: Path) -> None:
    """Turn the config of a ShortV repo into that of the original model."""
    content = json.loads((folder / "config.json").read_text())
    for name in ("shortv_layers", "visual_reduction", "base_model_name_or_path", "base_model_revision", "auto_map"):
        content.pop(name, None)
    content["model_type"] = content["model_type"].removeprefix("shortv_")
    content["architectures"] = [each.removeprefix("ShortV") for each in content["architectures"]]
    (folder / "config.json").write_text(json.dumps(content, indent=1))


def make_shape(name: str, folder: Path) -> Path:
    """`stock` and `shortv` repos of a subject of `shortv bench`, without weights: an engine can make them up. An image is 576
    tokens; words are the demonstration model's."""
    folder = folder / name
    shutil.rmtree(folder, ignore_errors=True)
    config = SUBJECTS[name]().config
    config.image_token_index = config.image_token_id = 3
    config.architectures = ["ShortVLlavaForConditionalGeneration"]
    config.save_pretrained(folder / "shortv")
    write_processor_files(config, folder / "shortv")
    for file, options in {
        "preprocessor_config.json": {"size": {"height": 336, "width": 336}},
        "processor_config.json": {"patch_size": 14},
        "tokenizer_config.json": {"model_max_length": 4096},
    }.items():
        path = folder / "shortv" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **options}))
    shutil.copytree(folder / "shortv", folder / "stock")
    write_stock_config(folder / "stock")
    return folder
