"""The demonstration model of pictures, for `train_shapes_vlm.py`: its tokenizer, architecture and data."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_hf.data import outputs, scoring, shapes
from shortv_hf.data.sources import load_samples


IMAGE_SIZE, PATCH = 64, 8
GRID = IMAGE_SIZE // PATCH
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD, BOS, EOS, IMAGE_TOKEN, UNK = range(len(SPECIAL_TOKENS))
VOCABULARY = 128
WIDTH, N_LAYERS = 128, 12
IGNORE = -100

# Each user turn ends with "ASSISTANT:", each answer with "</s>"; pictures come before the text of their turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- ' ' -}}{%- else -%}{{- message.role.upper() + ': ' -}}{%- endif -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{- '<image>\\n' -}}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- if message.role == 'assistant' -%}{{- '</s>' -}}{%- elif message.role == 'user' and (not loop.last or add_generation_prompt) -%}
{{- ' ASSISTANT:' -}}
{%- else -%}{{- ' ' -}}{%- endif -%}
{%- endfor -%}
"""


# ------------------------------------------------------------------------------------------- tokenizer, processor


def build_tokenizer(texts: list[str] | None = None, special_tokens: tuple[str, ...] = SPECIAL_TOKENS) -> Tokenizer:
    """A word-level tokenizer of the words in `texts`, those of the generator of pictures by default, in lower case."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in texts or shapes.all_texts() for word, _ in split.pre_tokenize_str(text.lower())}
    words |= {"user", "assistant", "system", ":", ".", "?", ","}
    vocabulary = {word: index for index, word in enumerate([*special_tokens, *sorted(words)])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special_tokens])
    return tokenizer


PIXELS = {  # what image processors do
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    "resample": 3,
    "do_center_crop": False,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}


def tokenizer_config(processor_class: str) -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 512,
        "padding_side": "left",
        "processor_class": processor_class,
    }


def write_processor(folder: Path):
    """The files of a `LlavaProcessor`, written by hand so that Transformers 4.57 and 5.x both read them."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files = {
        "tokenizer_config.json": tokenizer_config("LlavaProcessor"),
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            **PIXELS,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
        },
    }
    for name, content in files.items():
        write_json(folder / name, content)


def write_json(file: Path, content: dict):
    outputs.write_text(file, json.dumps(content, indent=2) + "\n")


# ------------------------------------------------------------------------------------------------------------ model


def config_fields() -> dict:
    """The architecture: CLIP tower, projector, Llama decoder."""
    return {
        "dtype": "float16",
        "image_seq_length": GRID**2,
        "image_token_index": IMAGE_TOKEN,
        "pad_token_id": PAD,
        "projector_hidden_act": "gelu",
        "text_config": {
            "model_type": "llama",
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
            "hidden_size": WIDTH,
            "initializer_range": 0.05,
            "intermediate_size": 2 * WIDTH,
            "max_position_embeddings": 512,
            "num_attention_heads": 4,
            "num_hidden_layers": N_LAYERS,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-05,
            "vocab_size": VOCABULARY,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": WIDTH,
            "image_size": IMAGE_SIZE,
            "intermediate_size": 4 * WIDTH,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "patch_size": PATCH,
            "projection_dim": WIDTH,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }


def build_model(seed: int) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    fields = config_fields()
    fields.pop("dtype")
    fields["vision_config"] = CLIPVisionConfig(**fields["vision_config"]).to_dict()
    fields["text_config"] = LlamaConfig(**fields["text_config"]).to_dict()
    model = LlavaForConditionalGeneration(LlavaConfig(**fields))
    with torch.no_grad():  # attention starts from similarity, and the head from the meaning of the embeddings
        for layer in model.model.language_model.layers:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
    return model


class PatchHeads(nn.Module):
    """What stage 1 predicts for each patch about the object that covers its middle: one of `classes[i]` for label i.

    The first label is 0 where no object is.
    """

    def __init__(self, classes: Sequence[int]):
        super().__init__()
        self.classes = list(classes)
        self.head = nn.Linear(WIDTH, sum(classes))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and share of patches with every label right. `features [B, P, h]`, `labels [B, P, n]`."""
        parts = self.head(features).float().split(self.classes, dim=-1)
        loss = sum(nn.functional.cross_entropy(p.flatten(0, 1), labels[..., i].flatten()) for i, p in enumerate(parts))
        right = torch.stack([p.argmax(-1) for p in parts], -1) == labels
        covered = labels[..., 0] > 0
        return loss, right.all(-1)[covered].float().mean()


class WordTargets:
    """What stage 2 wants the projector to give for each patch: the weighted sum of the embeddings of the words for its
    labels. `tables[i][v]` has the words, with their weights, for value v of label i."""

    def __init__(self, tokenizer: Tokenizer, tables: Sequence[Sequence[dict[str, float]]]):
        self.tables = []
        for rows in tables:
            table = torch.zeros(len(rows), VOCABULARY)
            for row, words in zip(table, rows, strict=True):
                for word, weight in words.items():
                    row[tokenizer.token_to_id(word)] = weight
            self.tables.append(table)

    def __call__(self, labels: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """`labels [B, P, n]`, `embeddings [V, h]` to targets `[B, P, h]`."""
        words = sum(table.to(labels.device)[labels[..., i]] for i, table in enumerate(self.tables))
        return words @ embeddings


def word_table(names: Iterable[str], nothing: str = "") -> list[dict[str, float]]:
    """The words of each name, after those for the value 0."""
    return [dict.fromkeys(name.split(), 1.0) for name in (nothing, *names)]


def patch_labels(scene: shapes.Scene) -> np.ndarray:
    """Labels of stage 1, `[P, 5]`: colour, shape, size and place of the object (0: none), and 1 at its centre."""
    labels = np.zeros((GRID, GRID, 5), dtype=np.int64)
    for obj in scene.objects:
        left, top, right, bottom = (edge * GRID - 0.5 for edge in obj.box())
        area = slice(math.ceil(top), math.floor(bottom) + 1), slice(math.ceil(left), math.floor(right) + 1)
        labels[area][..., 0] = list(shapes.COLORS).index(obj.color) + 1
        labels[area][..., 1] = shapes.SHAPES.index(obj.shape) + 1
        labels[area][..., 2] = list(shapes.SIZES).index(obj.size) + 1
        labels[area][..., 3] = obj.place + 1
        labels[int(obj.y * GRID), int(obj.x * GRID), 4] = 1
    return labels.reshape(-1, 5)


# ------------------------------------------------------------------------------------------------------------- data


def pixels(scene: shapes.Scene) -> torch.Tensor:
    """The picture as the processor would give it."""
    picture = shapes.draw(scene, 2 * IMAGE_SIZE).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


class TowerData(torch.utils.data.Dataset):
    """Stages 1 and 2: picture and patch labels by seed."""

    def __getitem__(self, seed: int):
        scene = shapes.make_scene(random.Random(seed))
        return {"pixel_values": pixels(scene), "labels": torch.from_numpy(patch_labels(scene))}


class PackedData(torch.utils.data.Dataset):
    """Stage 3: a picture and as many independent conversations about it as fit in one row.

    `segments` is 0 for the shared start of the row (`<s> USER: <image>`), k in its k-th conversation, -1 in padding;
    every conversation starts at the same position. `labels` holds the next token where it belongs to an answer.
    """

    # Up to this number of pictures: the shares of conversations that are captions, listings and comparisons. Single
    # questions alone teach a model to guess among the objects it sees; to say all about an object teaches what belongs
    # together, and to name the relation of two objects teaches more than yes or no.
    MIX = (
        (5_000, 0.15, 0.15, 0.0),
        (19_500, 0.05, 0.15, 0.0),
        (26_000, 0.15, 0.50, 0.0),
        (52_000, 0.08, 0.27, 0.30),
        (math.inf, 0.05, 0.15, 0.10),
    )
    # How often each type of question is asked: what is learnt last is asked most.
    WEIGHTS = {"color": 1, "shape": 1, "size": 1, "count": 2, "existence": 1.5, "place": 2, "relation": 3}

    n_conversations, text_tokens = 12, 144  # of a row, at most; what does not fit is left out

    def __init__(self, tokenizer: Tokenizer, first_seed: int = 0):
        self.tokenizer = tokenizer
        self.first_seed = first_seed

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def __getitem__(self, seed: int):
        rng = random.Random(seed)
        scene = shapes.make_scene(rng)
        shares = next(shares for limit, *shares in self.MIX if seed - self.first_seed < limit)
        turns = [shapes.conversation(scene, rng, *shares, weights=self.WEIGHTS) for _ in range(self.n_conversations)]
        return self.row(scene, turns)

    def single_questions(self, seed: int) -> tuple[dict, list[str]]:
        """A row of nothing but single questions, for evaluation, and the types of these."""
        rng = random.Random(seed)
        scene = shapes.make_scene(rng)
        asked = shapes.questions(scene, rng, self.n_conversations)
        return self.row(scene, [[(q.text, q.answer)] for q in asked]), [q.type for q in asked]

    def row(self, scene: shapes.Scene, conversations: list[list[tuple[str, str]]]) -> dict:
        return {"pixel_values": pixels(scene), **self.pack([IMAGE_TOKEN] * GRID**2, conversations)}

    def pack(self, placeholders: list[int], conversations: list[list[tuple[str, str]]]) -> dict:
        prefix = [BOS, *self.encode("USER:"), *placeholders]
        ids = list(prefix)
        length = len(ids) + self.text_tokens
        segments, positions, labels = [0] * len(ids), list(range(len(ids))), [IGNORE] * len(ids)
        for number, turns in enumerate(conversations, 1):
            tokens, is_answer = [], []
            for turn, (prompt, answer) in enumerate(turns):
                prompt_ids = self.encode(f"{'USER: ' if turn else ''}{prompt} ASSISTANT:")
                answer_ids = [*self.encode(answer), EOS]
                tokens += prompt_ids + answer_ids
                is_answer += [False] * len(prompt_ids) + [True] * len(answer_ids)
            if len(ids) + len(tokens) > length:
                continue
            ids += tokens
            segments += [number] * len(tokens)
            positions += range(len(prefix), len(prefix) + len(tokens))
            labels += [tokens[i] if is_answer[i] else IGNORE for i in range(1, len(tokens))] + [IGNORE]
        padding = length - len(ids)
        row = {
            "input_ids": ids + [PAD] * padding,
            "segments": segments + [-1] * padding,
            "position_ids": positions + [0] * padding,
            "labels": labels + [IGNORE] * padding,
        }
        return {name: torch.tensor(values) for name, values in row.items()}


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask `[B, 1, L, L]`: a conversation sees the shared start and itself."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, None, :], segments[:, None, :, None]
    visible = causal & ((keys == 0) | (keys == queries))
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def answer_logits(model: nn.Module, batch: dict, dtype: torch.dtype):
    """Logits and labels of all answer tokens in a packed batch, with the index of the conversation of each."""
    inputs = {name: tensor for name, tensor in batch.items() if name not in ("segments", "labels")}
    if "image_sizes" in inputs:  # the pictures of all rows follow one another
        inputs |= {name: inputs[name].flatten(0, 1) for name in ("pixel_values", "image_sizes")}
    mask = block_mask(batch["segments"], dtype)
    hidden = model.model(**inputs, attention_mask=mask, use_cache=False).last_hidden_state
    chosen = batch["labels"] != IGNORE
    rows = torch.arange(len(hidden), device=hidden.device)[:, None] * 100 + batch["segments"]
    return model.lm_head(hidden[chosen]).float(), batch["labels"][chosen], rows[chosen]


# ------------------------------------------------------------------------------------------------------------- task


class PictureTask:
    """All in which the two demonstration models differ, for that of pictures."""

    repo = "shortv-shapes-demo"
    data_name, rows = "shapes", "pictures"  # what `ranking.json` and `results.json` call them
    config_class, model_class = ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
    steps = {"tower_steps": 1500, "projector_steps": 300, "steps": 3300}  # defaults of the options of these names
    tower_share = 0.1  # of the learning rate, in the last stage
    label_classes = (len(shapes.COLORS) + 1, len(shapes.SHAPES) + 1, len(shapes.SIZES) + 1, len(shapes.PLACES) + 1, 2)

    def __init__(self):
        self.tokenizer = build_tokenizer()
        names = (
            (shapes.COLORS, "<image>"),
            (shapes.SHAPES, ""),
            (shapes.SIZES, ""),
            (shapes.PLACES, ""),
            (["object"], ""),
        )
        self.targets = WordTargets(self.tokenizer, [word_table(*pair) for pair in names])

    def config_fields(self) -> dict:
        return config_fields()

    def build_model(self, seed: int) -> nn.Module:
        return build_model(seed)

    def write_processor(self, folder: Path):
        write_processor(folder)

    def tower_features(self, model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
        """What the projector gets of pictures `[B, 3, H, W]`: `[B, P, h]`."""
        return model.vision_tower(pixel_values).last_hidden_state[:, 1:]

    def tower_data(self) -> torch.utils.data.Dataset:
        return TowerData()

    def packed_data(self, first_seed: int, batch_size: int) -> PackedData:
        return PackedData(self.tokenizer, first_seed)

    def evaluation_rows(self) -> Iterator[tuple[str, list[tuple[dict, list[str]]]]]:
        """Names and rows of single questions outside the training seeds, which are not those of the final test."""
        data = PackedData(self.tokenizer)
        yield "", [data.single_questions(shapes.HELD_OUT_SEED - 1 - index) for index in range(64)]

    def samples(self, folder: Path, n: int) -> Iterable[dict]:
        """Model inputs that the layers are ranked on."""
        return load_samples("shapes", AutoProcessor.from_pretrained(folder), n)

    def evaluations(self, folder: Path, n: int) -> dict[str, list]:
        """Held-out questions, under the name of the field of `results.json` that they are for."""
        return {"accuracy": scoring.held_out_cases(n)}

    def accuracy(self, model: nn.Module, folder: Path, cases: list) -> dict[str, float]:
        """Share of right answers, in all and by type."""
        return scoring.accuracy(scoring.answer(model, AutoProcessor.from_pretrained(folder), cases), cases)

    def write_examples(self, folder: Path):
        scenes = (scene for scene, _ in shapes.held_out_questions(1000, seed=1))
        shapes.draw(next(scene for scene in scenes if len(scene.objects) == 4), 336).save(folder / "example.png")
