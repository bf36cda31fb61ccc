"""Time to first token of ShortV against the stock Hugging Face class, on real architectures with random weights.

    python scripts/benchmark.py                                                # CPU, float32, a small model
    python scripts/benchmark.py --models llava-1.5-7b llava-1.5-13b llava-next-7b llava-next-13b \\
        --device cuda --dtype bfloat16 --output results.json                   # a GPU

Per model: the prefill of the language model alone, the whole forward with the vision tower, and a decoding step; stock
and ShortV in turn, medians with quartiles. `bound` is the speed-up that the FLOPs of Eq. 3-5 allow the language model.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
)

from shortv_hf import (
    ShortVLlavaConfig,
    ShortVLlavaForConditionalGeneration,
    ShortVLlavaNextForConditionalGeneration,
)
from shortv_hf.flops import flops_ratio


ROOT = Path(__file__).parent.parent
REPOS = {
    "llava-1.5-7b": "shortv-llava-1.5-7b-hf",
    "llava-1.5-13b": "shortv-llava-1.5-13b-hf",
    "llava-next-7b": "shortv-llava-v1.6-vicuna-7b-hf",
    "llava-next-13b": "shortv-llava-v1.6-vicuna-13b-hf",
}
CLASSES = {
    "llava": (LlavaForConditionalGeneration, ShortVLlavaForConditionalGeneration),
    "llava_next": (LlavaNextForConditionalGeneration, ShortVLlavaNextForConditionalGeneration),
}


def model_config(name: str):
    """The published ShortV config of a model; `cpu-small` freezes the last 10 of its 16 layers."""
    if name in REPOS:
        return AutoConfig.from_pretrained(ROOT / "hub_configs" / REPOS[name])
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=16, num_attention_heads=16, vocab_size=32064
    )
    vision = CLIPVisionConfig(
        hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, image_size=336,
        patch_size=14,
    )  # fmt: skip
    return ShortVLlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), shortv_layers=range(6, 16))


def build_models(config, device: str, dtype: torch.dtype):
    """Stock and ShortV model that share one set of random weights."""
    stock_class, shortv_class = CLASSES[config.base_model_type]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            shortv = shortv_class(config).eval()
        with torch.device("meta"):
            stock = stock_class(stock_class.config_class(**stock_fields(config))).eval()
    finally:
        torch.set_default_dtype(before)
    stock.load_state_dict(shortv.state_dict(), assign=True)
    for (_, module), (_, other) in zip(stock.named_modules(), shortv.named_modules(), strict=True):
        for name, buffer in other._buffers.items():
            module._buffers[name] = buffer  # those that are not in the state dict, such as rotary frequencies
    return stock, shortv


def stock_fields(config) -> dict:
    fields = config.to_dict()
    own = ("auto_map", "architectures", "model_type", "shortv_layers", "visual_reduction")
    for name in (*own, "base_model_name_or_path", "base_model_revision"):
        fields.pop(name, None)
    return fields


def make_inputs(model, t: int, images: int, batch: int) -> dict:
    """A prompt of `t` text tokens, 35 of them before the images, as in the paper's runs."""
    side, device, dtype = model.config.vision_config.image_size, model.device, model.dtype
    if model.config.base_model_type == "llava":
        inputs = {"pixel_values": torch.randn(batch * images, 3, side, side, device=device, dtype=dtype)}
    else:  # a square image of 2 x 2 tiles and the overview
        pixels = torch.randn(batch * images, 5, 3, side, side, device=device, dtype=dtype)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor([[2 * side, 2 * side]] * batch * images)}
    with torch.inference_mode():
        features = model.get_image_features(**inputs)
    v = sum(len(feature) for feature in getattr(features, "pooler_output", features)) // batch
    ids = torch.randint(3, 30000, (batch, t + v), device=device)
    ids[:, 35 : 35 + v] = model.config.image_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}


def timed(function, device: str) -> float:
    """Seconds of one call, with the device's work finished."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(models: dict, inputs: dict, device: str, repeats: int) -> dict:
    """Per model and stage, the seconds of `repeats` calls; the models take turns, so that drift hits all of them."""
    text = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    visual_mask = inputs["input_ids"] == next(iter(models.values())).config.image_token_id
    embeds = torch.randn(*visual_mask.shape, models["stock"].config.text_config.hidden_size)
    embeds = embeds.to(device, models["stock"].dtype)
    token = inputs["input_ids"][:, -1:]
    times = {name: {"language_model": [], "time_to_first_token": [], "decoding_step": []} for name in models}
    peaks = {}
    with torch.inference_mode():
        for round_ in range(repeats + 2):
            for name, model in models.items():
                prompt = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
                if name != "stock":
                    prompt["visual_mask"] = visual_mask
                if device.startswith("cuda"):
                    torch.cuda.reset_peak_memory_stats()
                language_model = timed(lambda: model.model(**prompt, use_cache=True), device)  # noqa: B023
                found = {}
                first = timed(lambda: found.update(model(**inputs, use_cache=True, logits_to_keep=1)), device)  # noqa: B023
                cache = found["past_key_values"]
                step = timed(lambda: model(input_ids=token, past_key_values=cache), device)  # noqa: B023
                if device.startswith("cuda"):
                    peaks[name] = torch.cuda.max_memory_allocated()
                if round_ >= 2:  # the first rounds warm up
                    for stage, seconds in zip(times[name], (language_model, first, step), strict=True):
                        times[name][stage].append(seconds)
    return {"times": times, "peak_memory_bytes": peaks}


def benchmark(name: str, images: int, arguments) -> dict:
    config = model_config(name)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    stock, shortv = build_models(config, arguments.device, getattr(torch, arguments.dtype))
    inputs = make_inputs(shortv, arguments.text_tokens, images, arguments.batch)
    v = int((inputs["input_ids"][0] == config.image_token_id).sum())
    measured = measure({"stock": stock, "shortv": shortv}, inputs, arguments.device, arguments.repeats)
    row = {
        "model": name,
        "text_tokens": arguments.text_tokens,
        "visual_tokens": v,
        "batch": arguments.batch,
        "shortv_layers": config.shortv_layers,
        "bound": 1 / flops_ratio(arguments.text_tokens, v, config, N=len(config.shortv_layers)),
        "peak_memory_bytes": measured["peak_memory_bytes"],
    }
    for stage in ("language_model", "time_to_first_token", "decoding_step"):
        seconds = {each: measured["times"][each][stage] for each in ("stock", "shortv")}
        row[stage] = {
            each: {"median_s": statistics.median(values), "quartiles_s": statistics.quantiles(values, n=4)[::2]}
            for each, values in seconds.items()
        }
        row[stage]["speed_up"] = row[stage]["stock"]["median_s"] / row[stage]["shortv"]["median_s"]
    return row


def conditions(arguments) -> dict:
    device = platform.processor() or platform.machine()
    if arguments.device.startswith("cuda"):
        device = torch.cuda.get_device_name()
    return {
        "command": " ".join(["python", "scripts/benchmark.py", *sys.argv[1:]]),
        "device": device,
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "attention": "sdpa",
        "mode": "eager",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "repeats": arguments.repeats,
    }


def print_table(results: list[dict]):
    print("| model | v | N | language model | bound | time to first token | decoding step |")
    print("|---|---|---|---|---|---|---|")
    for row in results:
        cells = [row["model"], row["visual_tokens"], len(row["shortv_layers"])]
        for stage in ("language_model", "time_to_first_token", "decoding_step"):
            stock, shortv = (1000 * row[stage][each]["median_s"] for each in ("stock", "shortv"))
            cells.append(f"{row[stage]['speed_up']:.2f}x ({stock:.0f} → {shortv:.0f} ms)")
        cells.insert(4, f"{row['bound']:.2f}x")
        print("| " + " | ".join(str(cell) for cell in cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cpu-small"], choices=["cpu-small", *REPOS])
    parser.add_argument("--images", nargs="+", type=int, help="images per prompt; default 1, cpu-small also 5")
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    results = []
    for name in arguments.models:
        for images in arguments.images or ([1, 5] if name == "cpu-small" else [1]):
            print(f"{name}, {images} image(s) ...", file=sys.stderr)
            results.append(benchmark(name, images, arguments))
    report = {"conditions": conditions(arguments), "results": results}
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["conditions"]))
    print_table(results)


if __name__ == "__main__":
    main()
