"""Peak memory of a prefill on the CPU: dense, with each reduction method, with ShortV, and with both.

    python scripts/prefill_memory.py

A `TorchDispatchMode` sees every tensor that an operator returns, and when it dies; the peak is the largest sum of live
bytes above what was there before (weights, inputs). Scratch space inside an operator is not seen; that no operator
returns an attention matrix is: `largest` is the largest tensor, in units of sequence x sequence elements.
"""

import argparse
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPVisionConfig, LlamaConfig

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration


class PeakMemory(TorchDispatchMode):
    """While open: `peak` bytes of live tensors made inside, and the `largest` number of elements of one."""

    def __init__(self):
        super().__init__()
        self.peak = self.live = self.largest = 0
        self._tensors_of = {}  # storage → live tensors that share it

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {self._storage(tensor) for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if torch.is_tensor(tensor):
                storage = self._storage(tensor)
                if storage not in self._tensors_of:
                    if storage in before:  # a view of a weight or an input
                        continue
                    self._tensors_of[storage] = 0
                    self.live += tensor.untyped_storage().nbytes()
                self._tensors_of[storage] += 1
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
                weakref.finalize(tensor, self._died, storage, tensor.untyped_storage().nbytes())
        self.peak = max(self.peak, self.live)
        return output

    @staticmethod
    def _storage(tensor):
        return tensor.untyped_storage().data_ptr()

    def _died(self, storage, nbytes):
        self._tensors_of[storage] -= 1
        if self._tensors_of[storage] == 0:
            del self._tensors_of[storage]
            self.live -= nbytes


def build_model(layers: int = 16, hidden: int = 256, patches: int = 24):
    """Random weights, the proportions of LLaVA-1.5."""
    text = LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 43 // 16, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=400,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=2 * patches,
        patch_size=2,
    )  # fmt: skip
    config = ShortVLlavaConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=399, vision_feature_layer=-2
    )
    torch.manual_seed(0)
    return ShortVLlavaForConditionalGeneration(config).eval()


@torch.no_grad()
def prefill_memory(model, t: int = 64) -> tuple[int, float]:
    """Peak bytes of the language model's prefill with its cache, one image and `t` text tokens; the largest tensor in
    units of sequence x sequence."""
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    ids = torch.cat([torch.full((t // 2,), 5), torch.full((side**2,), 399), torch.full((t - t // 2,), 6)])[None]
    pixels = torch.randn(1, 3, *(2 * [model.config.vision_config.image_size]))
    kept = []
    forward = model.model.language_model.forward

    def measured(*args, **kwargs):
        with PeakMemory() as memory:
            output = forward(*args, **kwargs)
        kept.append(memory)
        return output

    model.model.language_model.forward = measured
    try:
        model(input_ids=ids, pixel_values=pixels, use_cache=True, logits_to_keep=1)
    finally:
        del model.model.language_model.forward
    return kept[0].peak, kept[0].largest / ids.shape[1] ** 2


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    model = build_model()
    frozen = list(range(6, 16))
    print("16 layers, hidden 256, t = 64, v = 576, float32, SDPA, with cache\n")
    print("| method | peak MB | of dense | ShortV too (10 of 16 layers) |\n|---|---|---|---|")
    dense = None
    for options in (
        None,
        {"method": "fastv", "k": 2, "ratio": 0.5},
        {"method": "vtw", "k": 8},
        {"method": "vtc_cls", "layer": 0, "token_num": 128},
        {"method": "random", "token_num": 128},
        {"method": "downsample", "factor": 2},
    ):
        model.set_visual_reduction(options)
        peaks = []
        for layers in ([], frozen):
            model.set_shortv_layers(layers)
            peaks.append(prefill_memory(model)[0])
        dense = dense or peaks[0]
        name = "dense" if options is None else ", ".join(str(value) for value in options.values())
        print(f"| {name} | {peaks[0] / 1e6:.1f} | {peaks[0] / dense:.0%} | {peaks[1] / dense:.0%} |")


if __name__ == "__main__":
    main()
