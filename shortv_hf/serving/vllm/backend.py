"""An attention backend of vLLM for frozen layers: the same kernels and cache, and metadata that can be built twice in a step."""

import copy
import functools
from typing import Any

from vllm.v1.attention.backend import AttentionBackend, subclass_attention_backend


# FlashInfer and FlashAttention 3 size buffers by the number of sequences. Text in front of an image and behind it are two,
# a prompt with three images is four; a step with more runs attends with all queries (`layers.py`).
SEQUENCES_PER_REQUEST = 4


@functools.cache  # one class for all layers: vLLM groups layers by it, and a group has one builder
def shortv_backend(backend: type[AttentionBackend]) -> type[AttentionBackend]:
    """`backend` whose metadata remembers what it was built from and by which builder, as `shortv_source`.

    Being another class, it puts the frozen layers into an attention group of their own: the plans that FlashInfer's
    builder keeps for the dense layers of the step are not overwritten by a second build.

    Raises:
        ValueError: the backend writes K and V where it computes attention, for as many tokens as there are queries.
    """
    if backend.forward_includes_kv_cache_update:
        raise ValueError(
            f"ShortV cannot use the attention backend {backend.get_name()}, which writes keys and values of as many tokens "
            "as there are queries; choose another one with --attention-backend, such as FLASH_ATTN"
        )

    class ShortVMetadataBuilder(backend.get_builder_cls()):  # type: ignore[misc]  # known when it runs
        """Modifications: room for more sequences; the metadata knows its source."""

        supports_update_block_table = False  # the metadata of another group, changed, would have another source

        def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: Any) -> None:
            wide = copy.copy(vllm_config)
            wide.scheduler_config = copy.copy(vllm_config.scheduler_config)
            wide.scheduler_config.max_num_seqs *= SEQUENCES_PER_REQUEST
            super().__init__(kv_cache_spec, layer_names, wide, device)
            self.max_sequences = wide.scheduler_config.max_num_seqs

        def build(self, common_prefix_len: int, common_attn_metadata: Any, *args: Any, **kwargs: Any) -> Any:
            metadata = super().build(common_prefix_len, common_attn_metadata, *args, **kwargs)
            metadata.shortv_source = self, common_attn_metadata
            return metadata

    return subclass_attention_backend("ShortV", backend, ShortVMetadataBuilder)
