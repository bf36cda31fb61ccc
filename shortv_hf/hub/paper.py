"""The four models of the paper as data: original checkpoint, architecture, frozen layers, and the paper's results.

`hub_configs/` and its cards are written from here, and the benchmark builds the architectures from here, so that an
installed package needs no file of the checkout.
"""

import json
from dataclasses import dataclass, field

from transformers import PretrainedConfig

from ..configuration_shortv import ShortVLlavaConfig, ShortVLlavaNextConfig


VISION = {
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "model_type": "clip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
TEXT = {
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "rms_norm_eps": 1e-05,
    "vocab_size": 32064,
}
TEXT_7B = {
    **TEXT,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
}
TEXT_13B = {
    **TEXT,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
NEXT = {
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
}


@dataclass(frozen=True)
class PaperModel:
    """One model of the paper.

    Attributes:
        title: what the paper calls it.
        repo: name of its ShortV repo.
        config_class: its ShortV config.
        base, revision: Hub id and commit of the original checkpoint.
        text_config: of the language model.
        shortv_layers: Table 8, the most ineffective layer first; as many as the paper freezes.
        swept: numbers of frozen layers whose speed Tables 3 and 4 print.
        vtw_layer: the layer at which VTW withdraws the visual tokens (its paper's default for the size).
        dense, shortv: rows of Table 2 without and with ShortV, by [`RESULTS`].
        speed_up: to the first token on one A100 (Tables 3 and 4).
        license: of the original checkpoint, as the Hub abbreviates it.
        more: fields of the config that the four do not share.
    """

    title: str
    repo: str
    config_class: type[PretrainedConfig]
    base: str
    revision: str
    text_config: dict
    shortv_layers: list[int]
    swept: tuple[int, ...]
    vtw_layer: int
    dense: tuple[float, ...]
    shortv: tuple[float, ...]
    speed_up: float
    license: str = "llama2"  # of the Llama 2 models inside
    more: dict = field(default_factory=dict)

    def config_fields(self) -> dict:
        """The fields of `config.json`, those that the class adds by itself left out; only such as both Transformers
        lines read alike."""
        fields = {
            "dtype": "float16",
            "ignore_index": -100,
            "image_seq_length": 576,
            "image_token_index": 32000,
            "pad_token_id": 32001,
            "projector_hidden_act": "gelu",
            "text_config": self.text_config,
            "tie_word_embeddings": False,
            "vision_config": VISION,
            "vision_feature_layer": -2,
            "vision_feature_select_strategy": "default",
            "shortv_layers": self.shortv_layers,
            "visual_reduction": None,
            "base_model_name_or_path": self.base,
            "base_model_revision": self.revision,
            **self.more,
        }
        return json.loads(json.dumps(fields))  # a copy: config classes change the dicts they are given

    def config(self):
        """The config object; reads no file."""
        return self.config_class.from_dict(self.config_fields())


# Columns of Table 2. MMBench is English, MMMU the validation set, Flickr30K is CIDEr, the average is normalized.
RESULTS = ("MME", "MMBench", "MMMU", "MMStar", "SEED-Bench", "GQA", "Flickr30K", "average", "retained, %")
DATASETS = ["lmms-lab/GQA", "lmms-lab/flickr30k"]  # 20 samples of each chose the layers (Appendix B)

# fmt: off
PAPER_MODELS = {
    "llava-1.5-7b": PaperModel(
        "LLaVA-1.5-7B", "shortv-llava-1.5-7b-hf", ShortVLlavaConfig,
        "llava-hf/llava-1.5-7b-hf", "b234b804b114d9e37bb655e11cbbb5f5e971b7a9", TEXT_7B,
        [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19], (8, 16, 19, 24), 16,
        (1510.7, 64.1, 36.3, 33.7, 66.1, 61.9, 74.9, 58.9, 100.0),
        (1503.1, 64.8, 36.2, 33.3, 66.2, 60.9, 71.3, 58.3, 99.0), 1.30,
    ),
    "llava-1.5-13b": PaperModel(
        "LLaVA-1.5-13B", "shortv-llava-1.5-13b-hf", ShortVLlavaConfig,
        "llava-hf/llava-1.5-13b-hf", "5dda2880bda009266dda7c4baff660b95ca64540", TEXT_13B,
        [39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17], (8, 16, 24, 32),
        20,
        (1531.3, 68.9, 35.4, 36.1, 68.2, 63.3, 79.6, 61.2, 100.0),
        (1535.9, 68.6, 35.8, 37.1, 68.0, 62.0, 76.4, 60.7, 99.2), 1.39,
    ),
    "llava-next-7b": PaperModel(
        "LLaVA-NeXT-7B", "shortv-llava-v1.6-vicuna-7b-hf", ShortVLlavaNextConfig,
        "llava-hf/llava-v1.6-vicuna-7b-hf", "c916e6cdcd760b4cecd1dd4907f84ac649f93b23", TEXT_7B,
        [31, 29, 30, 28, 26, 27, 22, 24, 21, 23, 25, 20, 19, 17, 18, 15, 12, 0, 2], (8, 16, 19, 24), 16,
        (1519.0, 67.1, 36.4, 37.1, 70.2, 64.1, 69.7, 60.1, 100.0),
        (1525.1, 67.2, 36.0, 37.8, 70.4, 63.4, 65.7, 59.5, 99.0), 1.44, more=NEXT,
    ),
    "llava-next-13b": PaperModel(
        "LLaVA-NeXT-13B", "shortv-llava-v1.6-vicuna-13b-hf", ShortVLlavaNextConfig,
        "llava-hf/llava-v1.6-vicuna-13b-hf", "e66fcaaa7d502b1037c8465375bb67f4c33758dd", TEXT_13B,
        [39, 32, 29, 36, 27, 30, 37, 23, 25, 31, 26, 2, 28, 22, 33, 35, 34, 24, 38, 21, 20, 18, 1, 17], (8, 16, 24, 32),
        20,
        (1570.0, 70.5, 35.9, 39.9, 71.9, 65.7, 66.7, 61.3, 100.0),
        (1553.0, 70.2, 36.2, 39.9, 71.8, 63.6, 67.5, 61.0, 99.5), 1.52, more=NEXT,
    ),
}
# fmt: on


def paper_model(base: str | None) -> PaperModel | None:
    """The model of the paper whose original checkpoint has this Hub id, if there is one."""
    return next((model for model in PAPER_MODELS.values() if model.base == base), None)
