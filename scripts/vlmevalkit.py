"""VLMEvalKit on ShortV models: several in one run, of any family, dense and frozen, with any token reduction.

    python scripts/vlmevalkit.py --shortv Dense MODEL layers= --shortv ShortV MODEL --data MME MMStar \\
        --lmu-data data --work-dir out

`--shortv NAME MODEL [OPTION=VALUE ...]` may be given several times. NAME is what VLMEvalKit calls the model and its files;
MODEL is a Hub id or directory, of a ShortV repo or an original checkpoint. The options:

    layers=31,29,30                 frozen layers; `layers=` freezes none; default: those of the model's config
    reduction=fastv:k=2,ratio=0.5   token reduction, in the forms of the `shortv` command; `none` turns it off
    prompt=letter                   ask multiple choice as VLMEvalKit asks LLaVA: question, options, and "Answer with the
                                    option's letter from the given choices directly."; to VLMEvalKit, every TSV file of
                                    your own is multiple choice; default: the data set's prompt, the same for all models
    max_new_tokens=512              longest answer
    dtype=auto, device=auto         as in the `shortv` command

Options that are not below are for VLMEvalKit's run.py. Its prompt goes into the model's chat template as one turn of a user,
with pictures in their places among the text; frames of a video are pictures. Answers are greedy, one at a time.

VLMEvalKit exits with 0 after a failure. This exits with 1 unless every model has answered every data set and, but for
`--mode infer`, the answers were scored. And VLMEvalKit takes up answers that it finds in the work directory, whatever the
options of the model were when it gave them; here that needs `--reuse`.

VLMEvalKit (`pip install ms-vlmeval`) needs an environment of its own: see hub_configs/README.md.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shortv_hf.command_line.options import load_config, parse_layers, parse_reduction
from shortv_hf.data.images import load_image
from shortv_hf.data.inputs import encode_messages, to_device
from shortv_hf.data.prompts import user_message
from shortv_hf.hub.loading import load, place


CHOICES = {"prompt": ("vlmevalkit", "letter"), "dtype": ("auto", "float32", "bfloat16", "float16")}
OPTIONS = ("layers", "reduction", "max_new_tokens", "device", *CHOICES)
OTHER_MODELS = (
    "--config",
    "--base-url",
    "--api-mode",
)  # of run.py: they ask something else in the place of our models
RANK = int(os.environ.get("RANK", 0))  # of torchrun, one process for each GPU; the first one writes the results


@dataclass(frozen=True)
class Model:
    """A model of the run. `fields` replace those of its config."""

    name: str
    path: str
    fields: dict
    max_new_tokens: int = 512
    prompt: str = "vlmevalkit"
    dtype: str = "auto"
    device: str = "auto"


def parse_model(words: Sequence[str]) -> Model:
    """The model that the words after `--shortv` say. Reads its config, no weights.

    Raises:
        ValueError: they are no name, model and options; the model does not take the options.
        OSError: the model cannot be found.
    """
    if len(words) < 2 or "=" in words[1]:
        raise ValueError(f"--shortv takes NAME MODEL [OPTION=VALUE ...], got {' '.join(words)}")
    name, path, *options = words
    if not re.fullmatch(r"\w[\w.+-]*", name):  # a path would lead VLMEvalKit's files to where it points
        raise ValueError(f"{name!r} is the name of folders and files; use letters, digits and any of _ . + -")
    given: dict = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals or key not in OPTIONS:
            raise ValueError(f"{name}: {option!r} is not OPTION=VALUE with one of {', '.join(OPTIONS)}")
        if key in given:
            raise ValueError(f"{name}: {key} is given twice")
        if key in CHOICES and value not in CHOICES[key]:
            raise ValueError(f"{name}: {key} is one of {', '.join(CHOICES[key])}, got {value!r}")
        given[key] = value
    if "max_new_tokens" in given:
        if not re.fullmatch("[1-9][0-9]*", given["max_new_tokens"]):
            raise ValueError(f"{name}: max_new_tokens is a number from 1 on, got {given['max_new_tokens']!r}")
        given["max_new_tokens"] = int(given["max_new_tokens"])
    place(given.get("device", "auto"))
    config = load_config(path)
    fields = parse_reduction(given.pop("reduction", None), config)
    if "layers" in given:
        fields["shortv_layers"] = parse_layers(given.pop("layers"), "layers=")
    type(config).from_pretrained(path, **fields)  # an error now, not after hours of the models before
    return Model(name, path, fields, **given)


def encode(turns: Sequence[dict], processor) -> dict:
    """Model inputs of turns in VLMEvalKit's form, `{"role": ..., "content": [{"type": "text", "value": ...}, ...]}`; the
    value of an "image" is a path or URL.

    Raises:
        ValueError: a picture cannot be read.
    """
    messages, images = [], []
    for turn in turns:
        content = []
        for part in turn["content"]:
            if part["type"] == "image":
                images.append(load_image(part["value"]))
                content.append({"type": "image"})
            else:
                content += user_message(part["value"], (), processor)["content"]
        messages.append({"role": turn["role"], "content": content})
    return encode_messages(messages, processor, images)


def answer(model, processor, turns: Sequence[dict], max_new_tokens: int) -> str:
    inputs = to_device(model, encode(turns, processor))
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def register(models: Sequence[Model]):
    """Tell VLMEvalKit of the models. Each is loaded when its turn comes.

    Raises:
        ValueError: VLMEvalKit has a model of that name.
        ImportError: it, or a package that it needs, is missing.
    """
    from vlmeval.config import supported_VLM
    from vlmeval.dataset import DATASET_TYPE
    from vlmeval.vlm import LLaVA_Next
    from vlmeval.vlm.base import BaseModel

    class ShortV(BaseModel):
        INTERLEAVE = True
        allowed_types = ["text", "image"]
        build_prompt = LLaVA_Next.build_prompt

        def __init__(self, settings: Model, use_vllm: bool = False):  # given to models with "Qwen2-VL" in their names
            super().__init__()
            self.settings = settings
            self.model, self.processor = load(
                settings.path, device=settings.device, dtype=settings.dtype, **settings.fields
            )

        def use_custom_prompt(self, dataset):
            return self.settings.prompt == "letter" and DATASET_TYPE(dataset) == "MCQ"

        def generate_inner(self, message, dataset=None):
            return self.chat_inner([{"role": "user", "content": message}])

        def chat_inner(self, messages, dataset=None):
            return answer(self.model, self.processor, messages, self.settings.max_new_tokens)

    for model in models:
        if model.name in supported_VLM:
            raise ValueError(f"VLMEvalKit has a model named {model.name}; choose another name")
        supported_VLM[model.name] = partial(ShortV, model)


def problem(folder: Path, data: str) -> str | None:
    """Why VLMEvalKit has no result of a data set in a model's `folder`; `None` if it has one."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))["datasets"][data]
    except (OSError, KeyError):
        return "it was not asked"
    if "error_message" in status:  # empty for a bare NotImplementedError
        return status["error_message"] or "no error message; of a TSV file that it cannot score, ask for --mode infer"
    if not (folder / status["prediction_file"]).is_file():
        return f"no answers were written ({status.get('skip_reason', 'VLMEvalKit does not say why')})"
    return None if status["status"] == "done" else f"it ended at {status['status']!r}"


def check_folder(model: Model, folder: Path, may_hold_answers: bool):
    """Raises `ValueError` if results in `folder` would be in the model's directory, or be those of another run."""
    if Path(model.path).is_dir() and folder.is_relative_to(Path(model.path).resolve()):
        raise ValueError(f"{folder} is in the directory of the model; choose another --work-dir")
    if not may_hold_answers and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is there, and VLMEvalKit would take its answers for those of {model.name} as it is now; choose "
            "another --work-dir, or --reuse to go on with them"
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--shortv",
        nargs="+",
        action="append",
        required=True,
        metavar=("NAME", "MODEL"),
        help="a model and its options, see above",
    )
    parser.add_argument(
        "--data", nargs="+", required=True, help="VLMEvalKit's data sets, or of TSV files in --lmu-data"
    )
    parser.add_argument("--work-dir", type=Path, required=True, help="results go into a folder for each model in it")
    parser.add_argument(
        "--lmu-data",
        type=Path,
        default=os.environ.get("LMUData"),
        help="where VLMEvalKit keeps data sets; default: LMUData of the environment",
    )
    parser.add_argument("--mode", choices=("all", "infer", "eval"), default="all", help="infer: do not score")
    parser.add_argument("--judge", default="exact_matching", help="default: %(default)s, which asks no other model")
    parser.add_argument("--reuse", action="store_true", help="go on with answers that are in the work directory")
    args, others = parser.parse_known_args()
    if refused := sorted({word.partition("=")[0] for word in others} & set(OTHER_MODELS)):
        parser.error(f"{refused[0]} is about other models; use VLMEvalKit's own command")
    if args.lmu_data is None:  # VLMEvalKit would make a folder in the home directory
        parser.error("--lmu-data is needed, or LMUData in the environment")
    work_dir = args.work_dir.resolve()
    try:
        models = [parse_model(words) for words in args.shortv]
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(f"the names of the models are to differ, got {', '.join(names)}")
        for model in models:
            check_folder(model, work_dir / model.name, args.reuse or args.mode == "eval" or RANK > 0)
    except (OSError, ValueError) as error:
        parser.error(str(error).splitlines()[0])
    args.lmu_data.mkdir(parents=True, exist_ok=True)  # one that is not there is ignored, too
    os.environ["LMUData"] = str(args.lmu_data.resolve())
    os.environ.pop("MMEVAL_ROOT", None)  # VLMEvalKit prefers it to --work-dir
    try:
        register(models)
    except ImportError as error:
        raise SystemExit(f"vlmevalkit: VLMEvalKit does not work here ({error}); see hub_configs/README.md") from error
    except ValueError as error:
        parser.error(str(error))
    from vlmeval.run import main as run

    sys.argv = ["run.py", *others, "--model", *names, "--data", *args.data, "--work-dir", str(work_dir)]
    sys.argv += ["--mode", args.mode, "--judge", args.judge, *(["--reuse"] if args.reuse else [])]
    run()
    if RANK == 0:
        pairs = [(name, data) for name in names for data in args.data]
        problems = [(name, data, why) for name, data in pairs if (why := problem(work_dir / name, data))]
        for name, data, why in problems:
            print(f"vlmevalkit: no result of {name} on {data}: {why}", file=sys.stderr)
        if problems:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
