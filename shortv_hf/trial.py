"""What `check_repo` runs in a process of its own: loads a repo as a stranger does and asks it two questions.

    python -c "$(cat trial.py)" REPO COMMIT DEVICE

Prints, as its last line, JSON: a list of {"name", "problem", "note"}. It ends at the first problem.
"""

import json
import sys


def main(repo: str, commit: str, device: str):
    sys.modules["shortv_hf"] = None  # importing the package fails
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    options = {"trust_remote_code": True, **({"revision": commit} if commit else {})}
    found = {}

    def load():
        config = AutoConfig.from_pretrained(repo, **options)
        found["processor"] = AutoProcessor.from_pretrained(repo, **options)
        found["model"], found["info"] = AutoModelForImageTextToText.from_pretrained(
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
        with torch.inference_mode():
            if not model(**inputs).logits.isfinite().all():
                raise ValueError("the logits are not finite")
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        n_prompt = inputs["input_ids"].shape[1]
        return f"{n_prompt} tokens in, {output.shape[1] - n_prompt} out"

    checks = []
    for name, check in (
        ("loads in a fresh process", load),
        ("weights", check_weights),
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
