"""Model cards, written from data: the repo's config, the paper's tables, and what this project measured itself.

The loading examples name the repo `ORG/<name>`; [`with_repo_id`] puts the real id there when a repo is published.
"""

import re
from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData
from transformers import PretrainedConfig

from ..configuration_shortv import frozen_text
from ..flops.equations import flops_ratio, prefill_flops, visual_tokens_of
from ..layer_contribution.ranking import LayerRanking
from ..search.result import SearchResult
from ..upstream import TESTED
from .names import is_hub_id
from .paper import DATASETS, RESULTS, PaperModel, paper_model
from .provenance import provenance_of


CITATION = """\
@inproceedings{yuan2025shortv,
  title={ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers},
  author={Yuan, Qianhao and Zhang, Qingyu and Liu, Yanjiang and Chen, Jiawei and Lu, Yaojie and Lin, Hongyu and Zheng, Jia and Han, Xianpei and Sun, Le},
  booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
  pages={329--339},
  year={2025}
}"""
UNMEASURED = "This project has measured neither speed nor quality of this model itself."
TAGS = ["shortv", "visual-token-freezing", "efficient-inference"]


def with_repo_id(card: str, repo_id: str) -> str:
    """The card with `repo_id` in its examples, in place of `ORG/<name>`."""
    return re.sub(r"\bORG/[\w.-]+", repo_id, card)


def reference_card(
    config: PretrainedConfig,
    name: str,
    *,
    base: str | None = None,
    base_revision: str | None = None,
    license: str | None = None,
    of_the_paper: bool = False,
    picture: str | None = None,
    measured: Sequence[dict] = (),
    ranking: LayerRanking | SearchResult | None = None,
    ranking_picture: str | None = None,
) -> ModelCard:
    """Card of a repo made from an original checkpoint.

    Args:
        config: the ShortV config.
        name: of the repo, without its owner.
        base, base_revision: the original checkpoint (Hub id or directory) and its commit; by default what `config`
            references. Given for repos that carry a copy of the weights.
        license: of the base checkpoint, as the Hub abbreviates it; left out if unknown.
        of_the_paper: the frozen layers are the paper's, so its results belong on the card.
        picture: file in the repo that shows the frozen layers.
        measured: reports of `shortv bench` cut down to this model:
            `[{"conditions": {...}, "results": [{...}]}]`.
        ranking: the ranking, or the search, that the layers come from; `ranking_picture` is a file in the repo that shows it.

    Raises:
        ValueError: `of_the_paper` with a base or a number of layers that the paper does not have.
    """
    carries_weights = config.base_model_name_or_path is None
    base = base or config.base_model_name_or_path
    base_revision = base_revision or config.base_model_revision
    on_the_hub = is_hub_id(base)
    n_layers, n_frozen = config.get_text_config().num_hidden_layers, len(config.shortv_layers)
    paper = paper_model(base) if of_the_paper else None
    if of_the_paper and (paper is None or n_frozen != len(paper.shortv_layers)):
        raise ValueError(f"the paper has no results for {base} with {n_frozen} of {n_layers} layers frozen")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, config.base_model_type.replace("_", "-")],
        license=license,
        base_model=base if on_the_hub else None,
        datasets=DATASETS if of_the_paper else None,
    )
    if on_the_hub:
        # What the Hub assumes: none of its four relations says "same weights".
        data["base_model_relation"] = "finetune"
    title = paper.title if paper else base.rstrip("/").split("/")[-1] if base else name
    where = f"[`{base}`](https://huggingface.co/{base})" if on_the_hub else "a checkpoint in a local directory"
    commit = f" at commit `{base_revision}`" if base_revision else ""
    if base is None:
        weights = "The weights are this repo's own."
    elif carries_weights:
        weights = f"The weights are an unchanged copy of those of {where}{commit}."
    else:
        weights = f"This repo holds no weights. They are read from {where}{commit}."
    if config.visual_reduction is not None:
        weights += f" Visual tokens are also reduced: `visual_reduction = {config.visual_reduction}`."
    license_note = f"; the weights are under the license of the base checkpoint (`{license}`)" if license else ""
    sections = [
        f"# {title} with visual tokens frozen in {frozen_text(config.shortv_layers, n_layers)} (ShortV)",
        f"ShortV ([ICCV 2025](https://arxiv.org/abs/2504.00502)) makes the prefill of a multimodal model cheaper without "
        f"training: in decoder layers that change visual tokens to no effect, visual tokens keep their hidden states, "
        f"and only text tokens pay for queries, output projection and FFN.\n\n{weights} Frozen layers, the most "
        f"ineffective first: {', '.join(map(str, config.shortv_layers)) or 'none'}.",
        f"![Which tokens each decoder layer computes]({picture})" if picture else None,
        _loading(name, "float16"),
        _trust(name),
        "## Results\n\n" + "\n\n".join(_results(config, paper, measured)),
        provenance_of(ranking).section(config, ranking_picture) if ranking else None,
        _limits(config),
        f"## License and citation\n\nThe code in this repo is under Apache 2.0{license_note}.\n\n"
        f"```bibtex\n{CITATION}\n```",
    ]
    return _card(data, sections)


# What the cards of the demonstration models say by base model type: what they are, what they are about, what their
# layers were chosen on.
DEMOS = {
    "llava": ("LLaVA", "synthetic pictures of coloured shapes,", "pictures"),
    "llava_onevision": (
        "LLaVA-OneVision",
        "short synthetic videos of moving shapes, and about one or several pictures of shapes,",
        "videos",
    ),
}


def demo_card(
    config: PretrainedConfig,
    name: str,
    results: dict,
    picture: str | None = None,
    ranking: LayerRanking | None = None,
) -> ModelCard:
    """Card of a demonstration model, which was trained from scratch on pictures or on videos of coloured shapes.

    Args:
        config: its ShortV config.
        name: of the repo, without its owner.
        results: content of `results.json`, written by the script that evaluates the model:
            - `questions` (int): held-out questions asked;
            - `frozen_layers` (list[int]): what "shortv" froze; must be the config's;
            - `accuracy` (dict): "dense", "shortv", "all_frozen" → dict of "overall" and every question type to the
              share of right answers, 0 to 1; the types are the same in all three;
            - `picture_accuracy` (dict, optional): the same of questions about pictures, for a model of videos;
            - `training` (dict, optional): what to say about the training, label → value.
        picture: file in the repo that shows the frozen layers.
        ranking: that the layers come from.

    Raises:
        ValueError: fields are missing, shares are not between 0 and 1, or the layers are not the config's.
    """
    _check_demo_results(results, config)
    n_layers, n_frozen = config.get_text_config().num_hidden_layers, len(config.shortv_layers)
    columns = {
        "dense": "no layer frozen",
        "shortv": f"{n_frozen} of {n_layers} frozen",
        "all_frozen": "all layers frozen",
    }
    architecture, subject, data_kind = DEMOS[config.base_model_type]
    tables = [_shares(results[field], columns) for field in ("accuracy", "picture_accuracy") if field in results]
    training = "".join(f"\n- {label}: {value}" for label, value in (results.get("training") or {}).items())
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=[*TAGS, config.base_model_type.replace("_", "-"), "demo"],
        license="apache-2.0",
        language="en",
    )
    sections = [
        f"# A small {architecture} that demonstrates ShortV: visual tokens frozen in {frozen_text(config.shortv_layers, n_layers)}",
        f"This model was trained from scratch to answer questions about {subject} and about "
        "nothing else. It shows what [ShortV](https://arxiv.org/abs/2504.00502) does in seconds and on any machine: "
        "freezing visual tokens in the right layers leaves the answers as they are. The repo holds its own weights. "
        f"Frozen layers, the most ineffective first: {', '.join(map(str, config.shortv_layers))}. They were chosen on "
        f"{data_kind} of the same kind, apart from those of the evaluation.",
        f"![Which tokens each decoder layer computes]({picture})" if picture else None,
        _loading(name, "float32", video=data_kind == "videos"),
        _trust(name),
        f"## Results\n\nShare of right answers to {results['questions']} held-out questions (the whole answer has to be "
        f"right; greedy decoding), measured by this project's `scripts/train_shapes_vlm.py --export`:\n\n"
        + "\n\nAbout pictures:\n\n".join(tables)
        + (f"\n\nTraining:\n{training}" if training else ""),
        provenance_of(ranking).section(config, None) if ranking else None,
        _limits(config),
        f"## License and citation\n\nCode and weights are under Apache 2.0.\n\n```bibtex\n{CITATION}\n```",
    ]
    return _card(data, sections)


def _shares(accuracy: dict, columns: dict[str, str]) -> str:
    types = ["overall", *sorted(set(accuracy["dense"]) - {"overall"})]
    rows = [[kind, *(f"{accuracy[column][kind]:.1%}" for column in columns)] for kind in types]
    return markdown_table(["question type", *columns.values()], rows)


def _check_demo_results(results: dict, config: PretrainedConfig):
    for field in ("questions", "frozen_layers", "accuracy"):
        if field not in results:
            raise ValueError(f"the results of the demonstration model lack {field!r}")
    if results["frozen_layers"] != config.shortv_layers:
        raise ValueError(
            f"the results are of layers {results['frozen_layers']}, the config's are {config.shortv_layers}"
        )
    for field in ("accuracy", "picture_accuracy"):
        if field in results:
            _check_shares(field, results[field])


def _check_shares(field: str, accuracy: dict):
    for variant in ("dense", "shortv", "all_frozen"):
        if "overall" not in accuracy.get(variant, {}) or set(accuracy[variant]) != set(accuracy["dense"]):
            raise ValueError(f"{field}[{variant!r}] needs 'overall' and the question types of the others")
        for kind, share in accuracy[variant].items():
            if not 0 <= share <= 1:
                raise ValueError(f"{field}[{variant!r}][{kind!r}] is {share!r}; shares are between 0 and 1")


PICTURE_EXAMPLE = """\
image = load_image("photo.jpg")  # a path or a URL
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt").to(model.device, model.dtype)"""
VIDEO_EXAMPLE = """\
video, _ = load_video("example.mp4", backend="pyav")  # eight frames, a path or a URL
messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens in the video?"}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(videos=[video], text=prompt, return_tensors="pt").to(model.device, model.dtype)"""


def _loading(name: str, dtype: str, video: bool = False) -> str:
    needed = "`torch`, `torchvision`, `pillow`, `av`" if video else "`torch`, `pillow`"
    loader = "video_utils import load_video" if video else "image_utils import load_image"
    return f"""\
## Load it

On Transformers 5.x and 4.57, with {needed} and `accelerate` beside them:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.{loader}

repo = "ORG/{name}"
revision = "main"  # better: the hash of the commit whose code you have read
model = AutoModelForImageTextToText.from_pretrained(
    repo, revision=revision, trust_remote_code=True, dtype="{dtype}", device_map="auto"
)
processor = AutoProcessor.from_pretrained(repo, revision=revision, trust_remote_code=True)

{VIDEO_EXAMPLE if video else PICTURE_EXAMPLE}
print(processor.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

`device_map="auto"` needs `accelerate`. On Transformers 4.57, `AutoModelForVision2Seq` loads it too (5.x removed that
class). `pipeline("image-text-to-text", model=repo, revision=revision, trust_remote_code=True)` works on both.
`model.set_shortv_layers([...])` changes the frozen layers at run time; `[]` is the dense model.

Tested with Transformers {TESTED[0]} to {TESTED[1]}. Under a newer one, the code first compares a small layer with the stock
one and raises an error if they differ. **Upgrade:** repos whose code is older than `shortv_hf` 0.2.0 (they have no
`upstream.py`) answer wrongly on Transformers 5.24 and newer; build them again."""


def _trust(name: str) -> str:
    return f"""\
## What `trust_remote_code` runs

The `.py` files of this repo, and no others. They are copies of files of the package `shortv_hf` and import PyTorch,
Transformers and Python's standard library only. The base checkpoint, if there is one, is read as data: safetensors and
JSON, never code. Pin `revision` to a commit hash, and what you have read is what runs.

To run none of it, install the package: after `import shortv_hf` the same lines load this repo without
`trust_remote_code`, with the installed code. `shortv check-repo ORG/{name}` compares the two."""


def _results(config: PretrainedConfig, paper: PaperModel | None, measured: Sequence[dict]) -> list[str]:
    v, frozen = visual_tokens_of(config), {"shortv_layers": config.shortv_layers}
    dense, sparse = prefill_flops(64, v, config, N=0), prefill_flops(64, v, config, **frozen)
    unit, scale = ("TFLOPs", 1e12) if dense > 1e11 else ("GFLOPs", 1e9)
    parts = []
    if paper is not None:
        rows = [[name, str(a), str(b)] for name, a, b in zip(RESULTS, paper.dense, paper.shortv, strict=True)]
        parts.append(
            "**Reported by the paper** (its Table 2; the authors' code and the original checkpoints), not repeated here. "
            "MMBench is English, MMMU the validation set, Flickr30K is CIDEr, the average is normalized:\n\n"
            + markdown_table(["", "dense", f"{len(config.shortv_layers)} layers frozen"], rows)
        )
        parts.append(
            f"The paper reports {paper.speed_up:.2f}× to the first token on one A100 (its Tables 3 and 4). The layers are those "
            "of its Table 8, chosen by its authors on 20 samples each of GQA and Flickr30K."
        )
    parts.append(
        f"**Computed** (Eq. 3-5 of the paper): the language model's prefill of 64 text and {v} visual tokens takes "
        f"{sparse / scale:.2f} instead of {dense / scale:.2f} {unit}, {flops_ratio(64, v, config, **frozen):.1%}"
        f"{'.' if config.visual_reduction is None else ', by the frozen layers alone.'}"
    )
    rows = []
    for report in measured:
        where = report["conditions"]
        for result in report["results"]:
            if result["method"] != f"ShortV N={len(config.shortv_layers)}":
                continue  # the stock class, other numbers of layers, other methods
            stages = ("prefill", "time_to_first_token", "output_token")
            rows.append(
                [
                    f"{where['device']}, {where['dtype']}, {result['mode']}, torch {where['torch']}, "
                    f"Transformers {where['transformers']}",
                    f"{result['batch']}, {result['text_tokens']} + {result['visual_tokens']}",
                    *(f"{result[stage]['speed_up']:.2f}×" if stage in result else "" for stage in stages),
                ]
            )
    if rows:
        header = [
            "conditions",
            "batch, text + visual tokens",
            "prefill",
            "time to first token",
            "time per output token",
        ]
        parts.append(
            "**Measured by this project** (`shortv bench`: this architecture with random weights, against the "
            "stock class in its faster mode, in turn in one run, medians):\n\n" + markdown_table(header, rows)
        )
    else:
        parts.append(UNMEASURED)
    return parts


def _limits(config: PretrainedConfig) -> str:
    cache = "Only the prefill gets cheaper; decoding steps and the KV cache are those of the dense model."
    if config.visual_reduction is not None:
        cache = "Frozen layers make the prefill cheaper; dropped visual tokens shorten the KV cache too. Answers can differ."
    return f"""\
## Limits

- {cache}
- What is right or wrong about the base model's answers stays so; freezing layers can add errors. Check it on your task.
- Inference in batches works with padding on either side.
- To compile, compile the text model: `model.model.language_model.compile(dynamic=True)`. A graph of the whole forward
  has to assume more text tokens than there are, except for one row of LLaVA-1.5."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _card(data: ModelCardData, sections: list[str | None]) -> ModelCard:
    text = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n", ignore_metadata_errors=False)
