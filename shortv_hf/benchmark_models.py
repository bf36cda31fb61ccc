"""What the benchmark runs: real architectures with random weights, prompts for them, and the methods as data."""

from dataclasses import dataclass, field

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from .configuration_shortv import SHORTV_FIELDS, ShortVLlavaConfig
from .flops import visual_tokens_by_layer
from .modeling_shortv import ShortVLlavaForConditionalGeneration, ShortVLlavaNextForConditionalGeneration
from .paper_models import PAPER_MODELS
from .upstream import image_features


CLASSES = {
    "llava": (LlavaForConditionalGeneration, ShortVLlavaForConditionalGeneration),
    "llava_next": (LlavaNextForConditionalGeneration, ShortVLlavaNextForConditionalGeneration),
}
TEXT_BEFORE_IMAGE = 35  # tokens, in the paper's runs


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Attributes:
        config: a ShortV config; its `shortv_layers` are frozen by default.
        swept: numbers of frozen layers to try.
        vtw_layer: where VTW withdraws the visual tokens.
        images: per prompt, unless asked otherwise.
    """

    config: ShortVLlavaConfig
    swept: tuple[int, ...]
    vtw_layer: int
    images: tuple[int, ...] = (1,)

    def layers(self, n: int) -> tuple[int, ...]:
        """`n` layers to freeze: those of the config in their order, then the others from the last to the first (the
        paper prints no more; which layers they are does not change the cost). Raises `ValueError` if `n` is not valid.
        """
        n_layers = self.config.get_text_config().num_hidden_layers
        if not 1 <= n <= n_layers:
            raise ValueError(
                f"--num-layers is {n}; the model has {n_layers} layers, so the valid range is 1 to {n_layers}"
            )
        ranked = list(self.config.shortv_layers)
        return tuple([*ranked, *(i for i in reversed(range(n_layers)) if i not in ranked)][:n])


def cpu_small() -> Subject:
    """A language model that a CPU can run: 16 layers, of which the last 10 are frozen; a small vision tower."""
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=16, num_attention_heads=16, vocab_size=32064,
        max_position_embeddings=32768,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=336,
        patch_size=14,
    )  # fmt: skip
    layers = range(15, 5, -1)
    config = ShortVLlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), shortv_layers=layers)
    return Subject(config, swept=(4, 8, 10, 12), vtw_layer=8, images=(1, 5))


SUBJECTS = {
    "cpu-small": cpu_small,
    **{
        name: lambda model=model: Subject(model.config(), model.swept, model.vtw_layer)
        for name, model in PAPER_MODELS.items()
    },
}


@dataclass(frozen=True)
class Method:
    """A way to run the prompt. `shortv_layers` `None` is the stock Hugging Face class, the baseline."""

    name: str
    shortv_layers: tuple[int, ...] | None = ()
    visual_reduction: dict | None = field(default=None, hash=False)

    def per_layer(self, v: int, n_layers: int) -> list[tuple[int, bool]]:
        """Visual tokens of each decoder layer, of `v` in the prompt, and whether the layer freezes them."""
        counts = visual_tokens_by_layer(v, n_layers, self.visual_reduction)
        return [(count, i in (self.shortv_layers or ())) for i, count in enumerate(counts)]


STOCK = Method("stock", None)
FASTV = {"method": "fastv", "k": 2, "ratio": 0.5}
METHODS = ("shortv", "fastv", "vtw", "shortv+fastv")


def choose_methods(subject: Subject, names: list[str], num_layers: list[int] | None) -> list[Method]:
    """The stock class and the methods of these names; "shortv" once for each of `num_layers` (by default those of the
    subject). Raises `ValueError` for a number of layers that is not valid."""
    own = len(subject.config.shortv_layers)
    methods = [STOCK]
    if "shortv" in names:
        for n in sorted(set(num_layers or (*subject.swept, own))):
            methods.append(Method(f"ShortV N={n}", subject.layers(n)))
    if "fastv" in names:
        methods.append(Method("FastV", (), FASTV))
    if "vtw" in names:
        methods.append(Method("VTW", (), {"method": "vtw", "k": subject.vtw_layer}))
    if "shortv+fastv" in names:
        methods.append(Method(f"ShortV N={own} + FastV", subject.layers(own), FASTV))
    return methods


def build_models(config, device: torch.device, dtype: torch.dtype):
    """Stock and ShortV model that share one set of random weights, made on the device."""
    config._attn_implementation = "sdpa"
    stock_class, shortv_class = CLASSES[config.base_model_type]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            shortv = shortv_class(config).eval()
        with torch.device("meta"):
            stock_config = stock_class.config_class(**stock_fields(config))
            stock_config._attn_implementation = "sdpa"
            stock = stock_class(stock_config).eval()
    finally:
        torch.set_default_dtype(before)
    stock.load_state_dict(shortv.state_dict(), assign=True)
    for (_, module), (_, other) in zip(stock.named_modules(), shortv.named_modules(), strict=True):
        for name, buffer in other._buffers.items():
            module._buffers[name] = buffer  # those that are not in the state dict, such as rotary frequencies
    return stock, shortv


def stock_fields(config) -> dict:
    """The fields of the original checkpoint's config."""
    fields = config.to_dict()
    for name in ("auto_map", "architectures", "model_type", *SHORTV_FIELDS):
        fields.pop(name, None)
    return fields


def make_inputs(stock, t: int, images: int, batch: int) -> dict:
    """For a stock model: rows of `t` text tokens and `images` pictures, `TEXT_BEFORE_IMAGE` of the tokens before them.

    LLaVA-NeXT gets square pictures of 2 x 2 tiles and the overview: 2880 patches, and 48 ends of lines.
    """
    side, device, dtype = stock.config.vision_config.image_size, stock.device, stock.dtype
    if stock.config.model_type == "llava":
        inputs = {"pixel_values": torch.randn(batch * images, 3, side, side, device=device, dtype=dtype)}
    else:
        pixels = torch.randn(batch * images, 5, 3, side, side, device=device, dtype=dtype)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch * images)}
    with torch.inference_mode():
        features = stock.get_image_features(**inputs)
    v = sum(len(feature) for feature in image_features(features)) // batch
    start, image_token = min(TEXT_BEFORE_IMAGE, t - 1), stock.config.image_token_id
    ids = torch.randint(3, min(stock.config.text_config.vocab_size, image_token), (batch, t + v), device=device)
    ids[:, start : start + v] = image_token
    return {"input_ids": ids, **inputs}  # no row is padded, and a mask would keep compiled models from causal kernels
