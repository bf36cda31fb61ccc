"""What `check_repo` runs in a process of its own: loads a repo as a stranger does, compares its tokens with its base's, and
asks it for two answers, each checked against a run without a cache.

    python -c "$(cat trial.py)" REPO COMMIT DEVICE

Prints, as its last line, JSON: a list of {"name", "problem", "note"}. It ends at the first problem.
"""

import json
import sys
from typing import Any


TEXTS = (
    "What is this?",
    "USER: <image>\nWhat color is the square? ASSISTANT:",
    "USER: Hi ASSISTANT: A cat.</s>USER: And now? ASSISTANT:",
    "[INST] <image>\nDescribe it in one sentence. [/INST]",
    "<|im_start|>user\n<image>\nHow many?<|im_end|>\n<|im_start|>assistant\n",
    "  two spaces before, two after  ",
    "line one\nline two\n\n\ttab",
    "<image> <image>\nthe first, or the second?",
    "naïve café, Straße, Ελληνικά, 中文, 日本語, हिन्दी",
    "emoji 🙂👍🏽, dash – and “quotes”",
    "def f(x): return x**2  # 3.14159, 1,000,000",
    "http://localhost/a?b=c&d=%20",
)


TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt",
)  # fmt: skip


VISUAL_PARTS = ("image", "video", "vision", "vision_start", "vision_end", "boi", "eoi")
TOKEN_TYPES = {"mm_token_type_ids", "token_type_ids"}  # inputs that say of each token whether it is text, which is 0


def visual_ids(config) -> list[int]:
    """The ids that a config names for pictures and videos: placeholders, and what stands around them."""
    names = [f"{part}_token_{kind}" for part in VISUAL_PARTS for kind in ("id", "index")]
    return sorted({value for name in names if isinstance(value := getattr(config, name, None), int)})


def check_decoding(model, inputs: dict, steps: int = 8) -> str:
    """Greedy tokens on a cache, and the same sequence without one: the logits must be equal up to rounding, and every
    layer of the cache must have seen the sequence.

    Args:
        inputs: of a prompt, without padding.

    Raises:
        ValueError: they are not; says how far apart.
    """
    import torch
    from transformers import Cache

    options = {
        "use_cache": True,
        "max_new_tokens": steps,
        "min_new_tokens": steps,
        "do_sample": False,
        "num_beams": 1,
        "suppress_tokens": visual_ids(model.config),  # which no model takes back
    }
    with torch.inference_mode():
        output = model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
        ids, cache = output.sequences, next((value for value in output.values() if isinstance(value, Cache)), None)
        n_layers = model.config.get_text_config().num_hidden_layers
        seen = {layer: 0 if cache is None else int(cache.get_seq_length(layer)) for layer in range(n_layers)}
        wrong = [layer for layer, length in seen.items() if length != ids.shape[1] - 1]
        if wrong:
            found = f"layer {wrong[0]} has seen {seen[wrong[0]]} of {ids.shape[1] - 1} tokens"
            raise ValueError(f"the cache lacks tokens in {len(wrong)} of {n_layers} layers: {found}")
        whole = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in TOKEN_TYPES & whole.keys():  # what was generated is text
            whole[name] = torch.nn.functional.pad(whole[name], (0, steps))
        logits = model(**whole, use_cache=False, logits_to_keep=steps + 1).logits
        logits = logits[:, -steps - 1 : -1].float()  # Qwen2-VL of 4.57 keeps all
    cached = torch.stack(output.logits, dim=1).float().to(logits.device)
    if not logits.isfinite().all():
        raise ValueError("the logits are not finite")
    off = float((cached - logits).abs().mean() / logits.std())
    if off > (1e-3 if model.dtype == torch.float32 else 0.05):
        raise ValueError(
            f"{steps} tokens decoded on a cache have other logits than without: {off:.1%} of their spread"
        )
    return f"{ids.shape[1] - steps} tokens in, {steps} out, equal with and without a cache"


def main(repo: str, commit: str, device: str):
    sys.modules["shortv_hf"] = None  # type: ignore[assignment]  # importing the package fails
    import shutil
    import tempfile
    from pathlib import Path

    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
    from transformers.utils.hub import cached_file

    options = {"trust_remote_code": True, **({"revision": commit} if commit else {})}
    found: dict[str, Any] = {}

    def load():
        config = found["config"] = AutoConfig.from_pretrained(repo, **options)
        found["processor"] = AutoProcessor.from_pretrained(repo, **options)
        found["model"], found["info"] = AutoModelForImageTextToText.from_pretrained(  # type: ignore[misc]  # a pair, with the info
            repo, dtype="auto", device_map=device, output_loading_info=True, **options
        )
        module = type(found["model"]).__module__
        if not module.startswith("transformers_modules."):
            raise ValueError(f"the model class comes from {module}, not from the repo")
        return f"{type(config).__name__}, {type(found['processor']).__name__}, {type(found['model']).__name__}"

    def check_weights():
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs"):
            entries = sorted(map(str, found["info"].get(kind) or ()))
            if entries:
                raise ValueError(f"{len(entries)} {kind.replace('_', ' ')}, such as {entries[0]}")
        return f"{len(found['model'].state_dict())} tensors, none missing, none left over"

    def answer(image):
        model, processor = found["model"], found["processor"]
        content = [{"type": "image"}] if image else []
        content.append({"type": "text", "text": "What is this?"})
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, return_tensors="pt", **({"images": image} if image else {}))
        inputs = inputs.to(model.device, model.dtype)
        reduction = model.model._active_reduction()
        if reduction is not None and reduction.looks_at_last_token:  # without a cache, every step chooses anew
            with model.using(visual_reduction=None):
                return f"{check_decoding(model, inputs)}, {reduction.method} off"
        return check_decoding(model, inputs)

    def compare_tokens():
        """With the base; of a repo without one, with its own files read as those of the original model type."""
        config = found["config"]
        tokenizer: Any = getattr(found["processor"], "tokenizer", None)
        hub = {"revision": commit} if commit else {}
        with tempfile.TemporaryDirectory() as folder:
            base, base_options = config.base_model_name_or_path, {"revision": config.base_model_revision}
            if base is None:
                base, base_options = folder, {}
                (Path(folder) / "config.json").write_text(json.dumps({"model_type": config.base_model_type}))
                for name in TOKENIZER_FILES:
                    file = cached_file(repo, name, _raise_exceptions_for_missing_entries=False, **hub)
                    if file is not None:
                        shutil.copy(file, folder)
            elif (
                cached_file(base, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False, **base_options)
                is None
            ):
                return f"{base} holds no tokenizer to compare with"
            expected = AutoTokenizer.from_pretrained(base, **base_options)
        for name in ("padding_side", "all_special_tokens"):
            ours, theirs = getattr(tokenizer, name), getattr(expected, name)
            if sorted(ours) != sorted(theirs):
                raise ValueError(f"the repo's tokenizer has {name} {ours!r}, its base's {theirs!r}")
        for text in TEXTS:
            if tokenizer(text)["input_ids"] != expected(text)["input_ids"]:
                raise ValueError(
                    f"the repo cuts {text!r} into {tokenizer(text)['input_ids']}, its base into "
                    f"{expected(text)['input_ids']}: build it again"
                )
        return f"{len(TEXTS)} texts, the same ids as the base's"

    checks = []
    for name, check in (
        ("loads in a fresh process", load),
        ("weights", check_weights),
        ("tokenizer", compare_tokens),
        ("text-only prompt", lambda: answer(None)),
        ("image prompt", lambda: answer(Image.new("RGB", (64, 48), (200, 30, 30)))),
    ):
        try:
            checks.append({"name": name, "note": check()})
        except Exception as error:  # whatever it is, it is the verdict
            message = " ".join(str(error).split())  # in one line
            checks.append({"name": name, "problem": f"{type(error).__name__}: {message[:400]}"})
            break
    print(json.dumps(checks))


if __name__ == "__main__":
    main(*sys.argv[1:])
