"""vLLM's vision-language models with visual tokens frozen in the layers of `config.shortv_layers`."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.models.llava import LlavaForConditionalGeneration
from vllm.model_executor.models.llava_next import LlavaNextForConditionalGeneration
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.utils import WeightsMapper
from vllm.platforms import current_platform

from ...configuration_shortv import frozen_updates
from .guards import check_settings
from .layers import Step, Text, graft


logger = init_logger(__name__)

if TYPE_CHECKING:  # vLLM's modules, which the mixins are put before
    _Module = Any
else:
    _Module = nn.Module

# Transformers 5 saves the names of CLIP's and SigLIP's weights one level higher.
INNER_VISION_MODEL = {re.compile(r"vision_tower\.(?!vision_model\.)"): "vision_tower.vision_model."}


class ShortVMixin(_Module):
    """Modifications: layers of the language model are grafted, and learn which scheduled tokens are visual."""

    hf_to_vllm_mapper: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.packed_modules_mapping = {**cls.packed_modules_mapping, "kv_proj": ["k_proj", "v_proj"]}

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_settings(vllm_config, rocm=current_platform.is_rocm())
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.step = Step()
        self.is_visual: np.ndarray | None = None
        self.freezes = bool(config.shortv_layers)
        attention, ffn = frozen_updates(config.shortv_layers)
        text_model = self.language_model.model
        named = [graft(text_model.layers[i], self.step, i in attention, i in ffn) for i in sorted(attention | ffn)]
        self.frozen_attentions = [name for name in named if name is not None]
        text_model.hf_to_vllm_mapper = _split_projections(attention) | text_model.hf_to_vllm_mapper
        if hasattr(getattr(self, "vision_tower", None), "vision_model"):
            self.hf_to_vllm_mapper = self.hf_to_vllm_mapper | WeightsMapper(orig_to_new_regex=INNER_VISION_MODEL)

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """As the parent's. Both model runners call it before each forward pass with `is_multimodal` `[n]` on the CPU, and
        without embeddings where no visual token is scheduled: knowing costs no synchronisation."""
        if self.is_visual is not None:
            logger.warning_once(
                "The last token of a prompt, of an image, was computed as if it were text: a CUDA graph took it for a decoding "
                "request. Put text behind images, or set cudagraph_mode to PIECEWISE."
            )
        visual = multimodal_embeddings is not None and len(multimodal_embeddings) > 0
        self.is_visual = is_multimodal.cpu().numpy() if visual else None
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the parent's. Steps with visual tokens run eagerly, with attention metadata of text queries for frozen layers."""
        is_visual, self.is_visual = self.is_visual, None
        context = get_forward_context()
        if is_visual is not None and self.freezes and context.attn_metadata:
            self.step.text = Text.of(is_visual, context.attn_metadata, self.frozen_attentions, positions.device)
            context.attn_metadata, context.skip_compiled = self.step.text.metadata, True
        try:
            return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
        finally:
            self.step.text = None


def _split_projections(layers: frozenset[int]) -> WeightsMapper:
    """Names in the checkpoint → those of the projections in layers with frozen attention."""
    names = [f"layers.{i}.self_attn" for i in sorted(layers)]
    return WeightsMapper(
        orig_to_new_substr={f"{name}.q_proj.": f"{name}.query_proj." for name in names},
        orig_to_new_stacked={
            f"{name}.{part}_proj.": (f"{name}.kv_proj.", shard) for name in names for shard, part in enumerate("kv")
        },
    )


class ShortVLlavaForConditionalGeneration(ShortVMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5, with any text model of `architectures.py`."""


class ShortVLlavaNextForConditionalGeneration(ShortVMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT: newline tokens of its tiles count as visual."""


class ShortVQwen2VLForConditionalGeneration(ShortVMixin, Qwen2VLForConditionalGeneration):
    """Qwen2-VL, images and videos."""


class ShortVQwen2_5_VLForConditionalGeneration(ShortVMixin, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL, images and videos."""
