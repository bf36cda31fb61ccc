"""What the benchmark runs: real architectures with random weights, prompts for them, and the methods as data."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from ..configuration_shortv import (
    SHORTV_FIELDS,
    ShortVLlavaConfig,
    ShortVLlavaOnevisionConfig,
    ShortVQwen2_5_VLConfig,
    frozen_updates,
)
from ..flops.equations import frozen_updates_in, visual_tokens_by_layer
from ..hub.loading import model_classes
from ..hub.paper import PAPER_MODELS
from ..hub.trial import TOKEN_TYPES, visual_ids
from ..modeling_shortv import MODELS
from ..reduction import METHODS as REDUCTIONS
from ..reduction import ModelSizes, visual_reduction_from_text
from ..upstream import image_features


SIDE_IN_PIXELS = 896  # of a picture, in families that keep its size
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

    config: PretrainedConfig
    swept: tuple[int, ...]
    vtw_layer: int
    images: tuple[int, ...] = (1,)

    def layers(self, n: int) -> tuple[int | str, ...]:
        """`n` layers (or halves) to freeze: those of the config in their order, then the others from the last to the first (the
        paper prints no more; which layers they are does not change the cost). Raises `ValueError` if `n` is not valid.
        """
        n_layers = self.config.get_text_config().num_hidden_layers
        if not 1 <= n <= n_layers:
            raise ValueError(
                f"--num-layers is {n}; the model has {n_layers} layers, so the valid range is 1 to {n_layers}"
            )
        ranked = list(self.config.shortv_layers)
        named = set.union(*map(set, frozen_updates(ranked)))
        return tuple([*ranked, *(i for i in reversed(range(n_layers)) if i not in named)][:n])


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
    fields: dict[str, Any] = {
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        "shortv_layers": layers,
    }
    config = ShortVLlavaConfig(**fields)
    return Subject(config, swept=(4, 8, 10, 12), vtw_layer=8, images=(1, 5))


def onevision() -> Subject:
    """LLaVA-OneVision with Qwen2-0.5B; the last half of its layers are frozen, since nobody has ranked them."""
    text = Qwen2Config(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=152000, tie_word_embeddings=True,
    )  # fmt: skip
    vision = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    sides = [384 * n for n in range(1, 7)]
    fields: dict[str, Any] = {
        "text_config": text.to_dict(),
        "vision_config": vision.to_dict(),
        "image_grid_pinpoints": [[height, width] for height in sides for width in sides],
        "shortv_layers": range(23, 11, -1),
    }
    config = ShortVLlavaOnevisionConfig(**fields)
    return Subject(config, swept=(6, 12), vtw_layer=12)


def qwen2_5_vl() -> Subject:
    """Qwen2.5-VL-7B; the last half of its layers are frozen, since nobody has ranked them."""
    text = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    fields: dict[str, Any] = {"text_config": text, "vision_config": vision, "shortv_layers": range(27, 13, -1)}
    return Subject(ShortVQwen2_5_VLConfig(**fields), swept=(7, 14), vtw_layer=14)


def of_the_paper(name: str) -> Subject:
    """One of the paper's models."""
    model = PAPER_MODELS[name]
    return Subject(model.config(), model.swept, model.vtw_layer)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "cpu-small": cpu_small,
    "onevision-0.5b": onevision,
    "qwen2.5-vl-7b": qwen2_5_vl,
    **{name: partial(of_the_paper, name) for name in PAPER_MODELS},
}


def find_subject(name: str) -> Subject:
    """One of the [`SUBJECTS`], or a ShortV repo (Hub id or directory), of whose config alone is read.

    Raises:
        ValueError: it is neither, or a repo that freezes no layer.
    """
    if name in SUBJECTS:
        return SUBJECTS[name]()
    try:
        config = model_classes(name)[0].from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--models takes {', '.join(SUBJECTS)} or a ShortV repo, and {name} is neither: {error}"
        ) from None
    if not config.shortv_layers:
        raise ValueError(f"{name} freezes no layer; name a ShortV repo that does")
    return Subject(config, swept=(), vtw_layer=config.get_text_config().num_hidden_layers // 2)


@dataclass(frozen=True)
class Method:
    """A way to run the prompt. `shortv_layers` `None` is the stock Hugging Face class, the baseline."""

    name: str
    shortv_layers: tuple[int | str, ...] | None = ()
    visual_reduction: dict | None = field(default=None, hash=False)

    @property
    def settings(self) -> dict:
        """The config's fields that it sets."""
        return {"shortv_layers": list(self.shortv_layers or ()), "visual_reduction": self.visual_reduction}

    @property
    def works_on_images(self) -> bool:
        """Whether tokens leave before the language model."""
        if self.visual_reduction is None:
            return False
        options = dict(self.visual_reduction)
        return REDUCTIONS[options.pop("method")](**options).cuts_images

    def per_layer(self, v: int, config: PretrainedConfig) -> list[tuple[int, bool, bool]]:
        """Visual tokens of each decoder layer, of `v` in the prompt, and whether its attention and its FFN leave them as they
        are. `config`: that of the model. Raises `ValueError` where how many the method keeps depends on the pictures."""
        if self.works_on_images and ModelSizes.of(config).tiled:  # v could be mistaken for a number of whole tiles
            raise ValueError(f"{self.name}: how many of {v} visual tokens are newlines depends on the pictures")
        n_layers = config.get_text_config().num_hidden_layers
        counts = visual_tokens_by_layer(v, n_layers, self.visual_reduction, config)
        attention, ffn = frozen_updates_in(self.shortv_layers or (), self.visual_reduction, v, config, n_layers)
        return [(count, i in attention, i in ffn) for i, count in enumerate(counts)]


STOCK = Method("stock", None)
FASTV = {"method": "fastv", "k": 2, "ratio": 0.5}
METHODS = ("shortv", "fastv", "vtw", "shortv+fastv")
WITH_SHORTV = "shortv+"
TITLES = {"fastv": "FastV", "vtw": "VTW"}  # of reductions without options; others are called what was typed


def choose_methods(subject: Subject, names: Sequence[str], num_layers: Sequence[int] | None) -> list[Method]:
    """The stock class, and the methods of these names in their order: "shortv", once for each of `num_layers` (by default
    those of the subject); a reduction as text; or this after "shortv+", with the layers of the config frozen.

    Raises:
        ValueError: for a number of layers that is not valid, or a name that is none of these.
    """
    own = len(subject.config.shortv_layers)
    methods = [STOCK]
    for name in names:
        if name == "shortv":
            numbers = sorted(set(num_layers or (*subject.swept, own)))
            methods += [Method(f"ShortV N={n}", subject.layers(n)) for n in numbers]
            continue
        text = name.removeprefix(WITH_SHORTV)
        title, reduction = TITLES.get(text, text), parse_method(text, subject)
        if text == name:
            methods.append(Method(title, (), reduction))
        else:
            methods.append(Method(f"ShortV N={own} + {title}", subject.layers(own), reduction))
    return list(dict.fromkeys(methods))


def parse_method(text: str, subject: Subject) -> dict:
    """The reduction that a text names. Where it gives no options, FastV's and VTW's are the benchmark's, others those that
    a method has for the model. Whether the model can have it is not checked. Raises `ValueError` if it is none."""
    reduction = visual_reduction_from_text(text)
    defaults = {"fastv": FASTV, "vtw": {"method": "vtw", "k": subject.vtw_layer}}
    name = None if reduction is None else reduction.get("method")
    if reduction is None or name not in list(REDUCTIONS):
        raise ValueError(
            f"--methods takes shortv, a token reduction ({', '.join(REDUCTIONS)}; with options after a colon), or "
            f"{WITH_SHORTV} and one, got {text!r}"
        )
    if len(reduction) > 1:
        return reduction
    return defaults[name] if name in defaults else REDUCTIONS[name].defaults(subject.config)


def build_models(
    config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Stock and ShortV model that share one set of random weights, made on the device. `config`: a ShortV one."""
    config._attn_implementation = "sdpa"
    shortv_class = next(each for each in MODELS if each.config_class is type(config))
    stock_class: Any = next(each for each in shortv_class.__mro__ if each.__module__.startswith("transformers."))
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


def make_inputs(stock: Any, t: int, images: int, batch: int) -> dict[str, torch.Tensor]:
    """For a stock model: rows of `t` text tokens and `images` pictures, `TEXT_BEFORE_IMAGE` of the tokens before them.

    Models that cut pictures into tiles get square ones of 2 x 2 tiles and the overview: of LLaVA-NeXT 2880 patches, and
    48 ends of lines. Those that keep the size get `SIDE_IN_PIXELS` squared.

    Raises:
        ValueError: `t` is too small for the tokens around the pictures.
    """
    config, device = stock.config, stock.device
    inputs = _make_pictures(stock, batch * images)
    with torch.inference_mode():
        features = image_features(stock.get_image_features(**inputs))
    marks = [getattr(config, f"vision_{end}_token_id", None) for end in ("start", "end")]
    before, after = ([] if mark is None else [mark] for mark in marks)
    pictures = []
    for feature in features[: len(features) // batch]:
        pictures += [*before, *[config.image_token_id] * len(feature), *after]
    v = sum(map(len, features)) // batch
    around = len(pictures) - v
    if t <= around:
        raise ValueError(
            f"--text-tokens is {t}; with {images} images, whose marks are text, the least is {around + 1}"
        )
    start, limit = (
        min(TEXT_BEFORE_IMAGE, t - around - 1),
        min(config.get_text_config().vocab_size, *visual_ids(config)),
    )
    ids = torch.randint(3, limit, (batch, t + v), device=device)
    ids[:, start : start + len(pictures)] = torch.tensor(pictures, device=device)
    for name in TOKEN_TYPES & inspect.signature(stock.forward).parameters.keys():
        inputs[name] = (ids == config.image_token_id).int()
    return {"input_ids": ids, **inputs}  # no row is padded, and a mask would keep compiled models from causal kernels


def _make_pictures(stock: PreTrainedModel, n: int) -> dict[str, torch.Tensor]:
    """Arguments of `get_image_features` for `n` pictures of noise."""
    vision: Any = stock.config.vision_config
    options: dict[str, Any] = {"device": stock.device, "dtype": stock.dtype}
    if hasattr(vision, "spatial_merge_size"):  # flat patches of the picture's own size
        side = SIDE_IN_PIXELS // (vision.patch_size * vision.spatial_merge_size) * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, side, side]] * n, device=stock.device)
        return {"pixel_values": torch.randn(n * side**2, values, **options), "image_grid_thw": grid}
    side = vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
    if getattr(stock.config, "image_grid_pinpoints", None) is None:
        return {"pixel_values": torch.randn(n, 3, side, side, **options)}
    sizes = torch.tensor([[2 * side, 2 * side]] * n)
    return {"pixel_values": torch.randn(n, 5, 3, side, side, **options), "image_sizes": sizes}
