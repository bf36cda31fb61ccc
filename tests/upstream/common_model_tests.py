"""Transformers' own common model tests on stock LLaVA and InternVL, and on ShortV with a frozen layer.

Not collected with the suite: `scripts/run_common_tests.py` fetches the upstream tests and runs this file beside them.
"""

import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLModel,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    Qwen2Config,
)
from transformers.models.auto import modeling_auto

from shortv_hf import (
    ShortVInternVLConfig,
    ShortVInternVLForConditionalGeneration,
    ShortVInternVLModel,
    ShortVLlavaConfig,
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaModel,
)


# The mixin chooses labels and skips by class name.
for name, family in (("shortv_llava", "Llava"), ("shortv_internvl", "InternVL")):
    modeling_auto.MODEL_MAPPING_NAMES[name] = f"ShortV{family}Model"
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] = f"ShortV{family}ForConditionalGeneration"


class LlavaTester:
    """Config and inputs of a tiny LLaVA, in the form that the mixin asks for."""

    batch_size, num_channels, image_size, patch_size = 3, 3, 8, 2
    num_hidden_layers, num_attention_heads, hidden_size, vocab_size = 2, 4, 32, 99
    image_token_index, n_text_tokens, is_training = 98, 7, True
    seq_length = encoder_seq_length = (image_size // patch_size) ** 2 + n_text_tokens
    text_config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    vision_config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}

    def __init__(self, config_class, **config_kwargs):
        self.config_class, self.config_kwargs = config_class, config_kwargs

    def get_config(self):
        text = LlamaConfig(
            vocab_size=self.vocab_size, intermediate_size=37, max_position_embeddings=64, num_key_value_heads=4,
            pad_token_id=1, bos_token_id=2, eos_token_id=3, **self.text_config,
        )  # fmt: skip
        vision = CLIPVisionConfig(
            image_size=self.image_size, patch_size=self.patch_size, intermediate_size=37, projection_dim=32,
            **self.vision_config,
        )  # fmt: skip
        return self.config_class(
            text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=self.image_token_index,
            image_seq_length=16, vision_feature_layer=-1, pad_token_id=1, **self.config_kwargs,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        pixels = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.image_token_index - 5) + 4
        input_ids[:, 2:18] = self.image_token_index
        attention_mask = torch.ones(input_ids.shape, dtype=torch.long, device=input_ids.device)
        inputs = {"pixel_values": pixels, "input_ids": input_ids, "attention_mask": attention_mask}
        return self.get_config(), inputs


class InternVLTester(LlavaTester):
    """Of InternVL: a square of four patches becomes one token."""

    seq_length = encoder_seq_length = 4 + LlavaTester.n_text_tokens

    def get_config(self):
        text = Qwen2Config(
            vocab_size=self.vocab_size, intermediate_size=37, max_position_embeddings=64, num_key_value_heads=4,
            pad_token_id=1, bos_token_id=2, eos_token_id=3, **self.text_config,
        )  # fmt: skip
        vision = InternVLVisionConfig(
            image_size=[self.image_size] * 2, patch_size=[self.patch_size] * 2, intermediate_size=37,
            **self.vision_config,
        )  # fmt: skip
        return self.config_class(
            text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_id=self.image_token_index,
            image_seq_length=4, downsample_ratio=0.5, vision_feature_layer=-1, **self.config_kwargs,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        inputs["input_ids"] = ids_tensor([self.batch_size, self.seq_length], self.image_token_index - 5) + 4
        inputs["input_ids"][:, 2:6] = self.image_token_index
        return config, inputs


class Common(ModelTesterMixin):
    is_encoder_decoder = False
    _is_composite = True
    test_resize_embeddings = True
    test_missing_keys = False
    kind_of_tester = LlavaTester

    def setUp(self):
        self.model_tester = self.kind_of_tester(self.config_class, **self.config_kwargs)
        self.config_tester = None


class TestStock(Common, unittest.TestCase):
    all_model_classes = (LlavaModel, LlavaForConditionalGeneration)
    config_class, config_kwargs = LlavaConfig, {}


class TestShortV(Common, unittest.TestCase):
    all_model_classes = (ShortVLlavaModel, ShortVLlavaForConditionalGeneration)
    config_class, config_kwargs = ShortVLlavaConfig, {"shortv_layers": [0]}


class TestShortVDense(Common, unittest.TestCase):
    all_model_classes = (ShortVLlavaModel, ShortVLlavaForConditionalGeneration)
    config_class, config_kwargs = ShortVLlavaConfig, {"shortv_layers": []}


class TestStockInternVL(Common, unittest.TestCase):
    kind_of_tester = InternVLTester
    all_model_classes = (InternVLModel, InternVLForConditionalGeneration)
    config_class, config_kwargs = InternVLConfig, {}


class TestShortVInternVL(Common, unittest.TestCase):
    kind_of_tester = InternVLTester
    all_model_classes = (ShortVInternVLModel, ShortVInternVLForConditionalGeneration)
    config_class, config_kwargs = ShortVInternVLConfig, {"shortv_layers": [0]}
