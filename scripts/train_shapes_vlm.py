"""Train the demonstration model: a small LLaVA that answers questions about pictures of coloured shapes.

    python scripts/train_shapes_vlm.py --run-dir RUN              # train; the same command resumes an interrupted run
    python scripts/train_shapes_vlm.py --run-dir RUN --export --overwrite  # write and evaluate the demonstration model

Three stages, as for large LLaVA models. First the vision tower alone learns to say, for each patch, which object
covers it (linear heads that are thrown away afterwards). Then the projector alone learns to turn each patch into the
sum of the embeddings of the words for that object. Then the whole model learns conversations about pictures. Each
picture's tokens are shared by several independent conversations in one row: a block mask lets a conversation see the
picture and itself, never its neighbours, so each question is answered from the picture alone. The loss is taken on
answers only.
"""

import argparse
import json
import math
import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from shortv_hf import ShortVLlavaConfig, ShortVLlavaForConditionalGeneration
from shortv_hf.data import outputs, shapes
from shortv_hf.data import scoring as evaluation
from shortv_hf.data.sources import load_samples
from shortv_hf.layer_contribution import rank_layers


IMAGE_SIZE, PATCH = 64, 8
GRID = IMAGE_SIZE // PATCH
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<image>", "<unk>")
PAD, BOS, EOS, IMAGE_TOKEN, UNK = range(len(SPECIAL_TOKENS))
VOCABULARY = 128
WIDTH, N_LAYERS = 128, 12
TEXT_TOKENS = 144  # per picture in a training row
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


def build_tokenizer() -> Tokenizer:
    """A word-level tokenizer of the generator's vocabulary, in lower case."""
    split = pre_tokenizers.Whitespace()
    words = {word for text in shapes.all_texts() for word, _ in split.pre_tokenize_str(text.lower())}
    words |= {"user", "assistant", "system", ":", ".", "?", ","}
    vocabulary = {word: index for index, word in enumerate([*SPECIAL_TOKENS, *sorted(words)])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("colour", "color")])
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def write_processor(folder: Path):
    """The files of a `LlavaProcessor`, written by hand so that Transformers 4.57 and 5.x both read them."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    files = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 512,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
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
    """What stage 1 predicts for each patch: the object that covers its middle, and whether it holds the centre."""

    CLASSES = (len(shapes.COLORS) + 1, len(shapes.SHAPES) + 1, len(shapes.SIZES) + 1, len(shapes.PLACES) + 1, 2)

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(WIDTH, sum(self.CLASSES))

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and share of patches with every label right. `features [B, P, h]`, `labels [B, P, 5]`."""
        parts = self.head(features).float().split(self.CLASSES, dim=-1)
        loss = sum(nn.functional.cross_entropy(p.flatten(0, 1), labels[..., i].flatten()) for i, p in enumerate(parts))
        right = torch.stack([p.argmax(-1) for p in parts], -1) == labels
        covered = labels[..., 0] > 0
        return loss, right.all(-1)[covered].float().mean()


class WordTargets:
    """What stage 2 wants the projector to give for each patch: the sum of the embeddings of the words for its labels
    (colour, shape, size, place, and "object" at the centre); for background the embedding of `<image>`."""

    def __init__(self, tokenizer: Tokenizer):
        names = (shapes.COLORS, shapes.SHAPES, shapes.SIZES, shapes.PLACES)
        tables = [[("<image>",), *((name,) for name in names[0])]]
        tables += [[(), *(tuple(name.split()) for name in group)] for group in names[1:]]
        tables.append([(), ("object",)])
        self.tables = []
        for rows in tables:
            table = torch.zeros(len(rows), VOCABULARY)
            for row, words in zip(table, rows, strict=True):
                row[[tokenizer.token_to_id(word) for word in words]] = 1
            self.tables.append(table)

    def __call__(self, labels: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        """`labels [B, P, 5]`, `embeddings [V, h]` to targets `[B, P, h]`."""
        words = sum(table.to(labels.device)[labels[..., i]] for i, table in enumerate(self.tables))
        return words @ embeddings


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

    def __init__(self, first_seed: int = 0, single_questions: bool = False):
        self.first_seed = first_seed
        self.tokenizer = build_tokenizer()
        self.prefix = [BOS, *self.encode("USER:"), *[IMAGE_TOKEN] * GRID**2]
        self.single_questions = single_questions  # for evaluation: nothing but single questions

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def conversations(self, scene: shapes.Scene, rng: random.Random, seed: int):
        if self.single_questions:
            return [[(question.text, question.answer)] for question in shapes.questions(scene, rng, 12)]
        shares = next(shares for limit, *shares in self.MIX if seed - self.first_seed < limit)
        return [shapes.conversation(scene, rng, *shares, weights=self.WEIGHTS) for _ in range(12)]

    def question_types(self, seed: int) -> list[str]:
        """Types of the single questions about one picture."""
        rng = random.Random(seed)
        return [question.type for question in shapes.questions(shapes.make_scene(rng), rng, 12)]

    def __getitem__(self, seed: int):
        rng = random.Random(seed)
        scene = shapes.make_scene(rng)
        ids = list(self.prefix)
        length = len(ids) + TEXT_TOKENS
        segments, positions, labels = [0] * len(ids), list(range(len(ids))), [IGNORE] * len(ids)
        for number, turns in enumerate(self.conversations(scene, rng, seed), 1):
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
            positions += range(len(self.prefix), len(self.prefix) + len(tokens))
            labels += [tokens[i] if is_answer[i] else IGNORE for i in range(1, len(tokens))] + [IGNORE]
        padding = length - len(ids)
        row = {
            "input_ids": ids + [PAD] * padding,
            "segments": segments + [-1] * padding,
            "position_ids": positions + [0] * padding,
            "labels": labels + [IGNORE] * padding,
        }
        return {"pixel_values": pixels(scene), **{name: torch.tensor(values) for name, values in row.items()}}


def block_mask(segments: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Additive causal mask `[B, 1, L, L]`: a conversation sees the shared start and itself."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, None, :], segments[:, None, :, None]
    visible = causal & ((keys == 0) | (keys == queries))
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def answer_logits(model: LlavaForConditionalGeneration, batch: dict, dtype: torch.dtype):
    """Logits and labels of all answer tokens in a packed batch, with the index of the conversation of each."""
    hidden = model.model(
        input_ids=batch["input_ids"],
        pixel_values=batch["pixel_values"],
        attention_mask=block_mask(batch["segments"], dtype),
        position_ids=batch["position_ids"],
        use_cache=False,
    ).last_hidden_state
    chosen = batch["labels"] != IGNORE
    rows = torch.arange(len(hidden), device=hidden.device)[:, None] * 100 + batch["segments"]
    return model.lm_head(hidden[chosen]).float(), batch["labels"][chosen], rows[chosen]


# --------------------------------------------------------------------------------------------------------- training


class Run:
    """A resumable run: model, optimizer, stage and step, in `run_dir/checkpoint.pt`."""

    def __init__(self, args):
        self.args = args
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.model, self.heads = build_model(args.seed).to(self.device), PatchHeads().to(self.device)
        self.targets = WordTargets(build_tokenizer())
        self.progress = {"stage": "tower", "step": 0, "pictures": 0, "seconds": 0.0}
        self.file = args.run_dir / "checkpoint.pt"
        self.optimizer_states = None
        if self.file.is_file():
            state = torch.load(self.file, map_location=self.device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.heads.load_state_dict(state["heads"])
            self.progress, self.optimizer_states = state["progress"], state["optimizers"] or None
            print(f"resuming: {self.progress}", flush=True)

    def save(self, optimizers):
        self.args.run_dir.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "heads": self.heads.state_dict(), "progress": self.progress}
        state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
        temporary = self.file.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.file)

    def first_seed(self, stage: str) -> int:
        """Seed of a stage's first picture; those that follow count up."""
        return self.args.seed * 100_000_000 + {"tower": 0, "projector": 25_000_000, "answers": 50_000_000}[stage]

    def train_stage(
        self, stage: str, data, steps: int, batch_size: int, parameters: list[tuple], loss_function, report
    ):
        """Train `parameters` (pairs of module, learning rate) for `steps`; `loss_function(batch)` gives loss, metric."""
        if self.progress["stage"] != stage:
            return
        optimizers = make_optimizers(parameters)
        if self.optimizer_states is not None:
            for optimizer, state in zip(optimizers, self.optimizer_states, strict=True):
                peaks = [group["peak"] for group in optimizer.param_groups]
                optimizer.load_state_dict(state)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["peak"] = peak  # so that a resumed run may have another rate
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        first_seed = self.first_seed(stage)
        seeds = range(first_seed + self.progress["step"] * batch_size, first_seed + steps * batch_size)
        loader = torch.utils.data.DataLoader(data, batch_size, sampler=seeds, num_workers=self.args.workers)
        started = saved = time.monotonic()
        first_step, seconds = self.progress["step"], self.progress["seconds"]
        losses, metrics = [], []
        self.model.train()
        for batch in loader:
            step = self.progress["step"] = self.progress["step"] + 1
            for group in groups:
                group["lr"] = group["peak"] * schedule(step / steps, step, self.args.decay)
            batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                loss, metric = loss_function(batch)
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.detach())
            metrics.append(metric.detach())
            now = time.monotonic()
            self.progress["pictures"] += batch_size
            self.progress["seconds"] = seconds + now - started
            if step % self.args.log_every == 0 or step == steps:
                left = (now - started) / (step - first_step) * (steps - step)
                print(
                    f"{stage} {step}/{steps}  loss {torch.stack(losses).mean():.4f}  "
                    f"right {torch.stack(metrics).mean():.1%}  "
                    f"{(step - first_step) * batch_size / (now - started):.1f} pictures/s  "
                    f"{left / 60:.0f} min left",
                    flush=True,
                )
                losses, metrics = [], []
            if step % self.args.eval_every == 0 or step == steps:
                report()
            if now - saved > 60 or step == steps:
                self.save(optimizers)
                saved = now

    def finish_stage(self, stage: str, next_stage: str):
        if self.progress["stage"] == stage:
            self.progress.update(stage=next_stage, step=0)
            self.optimizer_states = None
            self.save([])

    def tower_loss(self, batch: dict):
        features = self.model.model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
        return self.heads.loss(features, batch["labels"])

    def projector_loss(self, batch: dict):
        model = self.model.model
        with torch.no_grad():
            features = model.vision_tower(batch["pixel_values"]).last_hidden_state[:, 1:]
            targets = self.targets(batch["labels"], model.get_input_embeddings().weight)
        loss = nn.functional.mse_loss(model.multi_modal_projector(features).float(), targets) / targets.square().mean()
        return loss, 1 - loss

    def answer_loss(self, batch: dict):
        logits, labels, _ = answer_logits(self.model, batch, self.dtype)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()

    @torch.no_grad()
    def report_accuracy(self, n_pictures: int = 64):
        """Print the accuracy on single questions about pictures outside the training seeds, answers complete."""
        self.model.eval()
        data = PackedData(single_questions=True)
        rows = [data[shapes.HELD_OUT_SEED - 1 - index] for index in range(n_pictures)]  # not those of the final test
        batch = {name: torch.stack([row[name] for row in rows]).to(self.device) for name in rows[0]}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
            logits, labels, conversation = answer_logits(self.model, batch, self.dtype)
        wrong = set(conversation[logits.argmax(-1) != labels].tolist())
        right = {name: [] for name in ("all", *shapes.QUESTION_TYPES)}
        for number in conversation.unique().tolist():
            name = data.question_types(shapes.HELD_OUT_SEED - 1 - number // 100)[number % 100 - 1]
            for key in "all", name:
                right[key].append(number not in wrong)
        shares = ", ".join(f"{name} {sum(v) / max(1, len(v)):.0%}" for name, v in right.items())
        print(f"    {len(right['all'])} single questions: {shares}", flush=True)
        self.model.train()


def make_optimizers(parameters: list[tuple]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of linear layers, AdamW for embeddings, convolutions, heads, biases and norms.

    `parameters` are pairs of module and peak learning rate, which every group holds as "peak".
    """
    muon, adam = [], []
    for module, rate in parameters:
        is_head = isinstance(module, nn.Linear)
        matrices = [] if is_head else [m.weight for m in module.modules() if isinstance(m, nn.Linear)]
        chosen = {id(weight) for weight in matrices}
        others = [p for p in module.parameters() if p.requires_grad and id(p) not in chosen]
        if matrices:
            muon.append({"params": matrices, "peak": rate})
        for weights, decay in ([p for p in others if p.ndim > 1], 0.05), ([p for p in others if p.ndim < 2], 0.0):
            if weights:
                adam.append({"params": weights, "peak": rate, "weight_decay": decay})
    optimizers = [torch.optim.AdamW(adam, betas=(0.9, 0.98))]
    if muon:
        optimizers.append(torch.optim.Muon(muon, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def schedule(done: float, step: int, decay: float, warmup: int = 200) -> float:
    """Share of the peak learning rate: warm-up, constant, linear decay to 2 % over the last part `decay`."""
    return min(1.0, step / warmup, max(0.02, (1 - done) / decay))


def train(args):
    run = Run(args)
    model = run.model.model
    run.train_stage(
        "tower",
        TowerData(),
        args.tower_steps,
        args.tower_batch,
        [(model.vision_tower, args.tower_lr), (run.heads.head, args.tower_lr)],
        run.tower_loss,
        lambda: None,
    )
    run.finish_stage("tower", "projector")
    run.train_stage(
        "projector",
        TowerData(),
        args.projector_steps,
        args.tower_batch,
        [(model.multi_modal_projector, args.tower_lr)],
        run.projector_loss,
        lambda: None,
    )
    run.finish_stage("projector", "answers")
    run.train_stage(
        "answers",
        PackedData(run.first_seed("answers")),
        args.steps,
        args.batch,
        [
            (model.vision_tower, 0.1 * args.lr),
            (model.multi_modal_projector, args.lr),
            (model.language_model, args.lr),
            (run.model.lm_head, args.lr),
        ],
        run.answer_loss,
        run.report_accuracy,
    )
    run.finish_stage("answers", "done")


# -------------------------------------------------------------------------------------------- export and evaluation


LEGACY_KEYS = {  # module names to the layout of the `llava-hf` checkpoints, which both Transformers lines read
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.vision_model.": "vision_tower.vision_model.",  # 4.x
    "model.vision_tower.": "vision_tower.vision_model.",  # 5.x
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def legacy_key(name: str) -> str:
    for old, new in LEGACY_KEYS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"unknown weight {name}")


def write_repo(state: dict, output: Path, shortv_layers: list[int]):
    """Weights in half precision, config, generation config and processor files."""
    write_processor(output)
    weights = {
        legacy_key(name): tensor.half().contiguous().cpu()
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    write_config(output, shortv_layers)
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 64}
    write_json(output / "generation_config.json", tokens)


def write_config(output: Path, shortv_layers: list[int]):
    fields = {
        **config_fields(),
        "shortv_layers": shortv_layers,
        "visual_reduction": None,
        "base_model_name_or_path": None,
        "base_model_revision": None,
    }
    config = ShortVLlavaConfig.from_dict(json.loads(json.dumps(fields)))  # refuses what the class does not accept
    own = {
        "architectures": ["ShortVLlavaForConditionalGeneration"],
        "auto_map": config.to_dict()["auto_map"],
        "model_type": config.model_type,
    }
    write_json(output / "config.json", {**own, **fields})


def export(args):
    """Write the repo, rank its layers, and print its accuracy with no layer, the chosen ones and all layers frozen."""
    state = torch.load(args.run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    write_repo(state["model"], args.output, [])
    model = ShortVLlavaForConditionalGeneration.from_pretrained(args.output, dtype=torch.float32).eval()
    model.to(args.device)
    processor = AutoProcessor.from_pretrained(args.output)
    ranking = rank_layers(
        model, load_samples("shapes", processor, args.samples), data=f"shapes, {args.samples}, seed 0"
    )
    ranking.save(args.output / "ranking.json")
    write_config(args.output, ranking.layers(args.frozen))
    cases = evaluation.held_out_cases(args.questions)
    results = {"questions": args.questions, "frozen_layers": ranking.layers(args.frozen), "accuracy": {}}
    for name, layers in (("dense", []), ("shortv", ranking.layers(args.frozen)), ("all_frozen", ranking.order)):
        model.set_shortv_layers(layers)
        results["accuracy"][name] = evaluation.accuracy(evaluation.answer(model, processor, cases), cases)
        print(f"{name} {layers}")
        for question_type, share in results["accuracy"][name].items():
            print(f"    {question_type:10} {share:.1%}", flush=True)
    progress = state["progress"]
    results["training"] = {
        "script": "scripts/train_shapes_vlm.py",
        "pictures seen": f"{progress['pictures']:,}",
        "minutes": round(progress["seconds"] / 60),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    write_json(args.output / "results.json", results)
    scenes = (scene for scene, _ in shapes.held_out_questions(1000, seed=1))
    shapes.draw(next(scene for scene in scenes if len(scene.objects) == 4), 336).save(args.output / "example.png")
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{results['training']}; {args.output}: {size / 1e6:.1f} MB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_output = Path(__file__).parent.parent / "hub_configs" / "shortv-shapes-demo"
    parser.add_argument("--run-dir", type=Path, required=True, help="checkpoints; an interrupted run resumes from it")
    parser.add_argument("--output", type=Path, default=default_output, help="folder that --export writes")
    parser.add_argument("--overwrite", action="store_true", help="--export: replace the model that --output holds")
    parser.add_argument("--export", action="store_true", help="write and evaluate the repo instead of training")
    parser.add_argument("--frozen", type=int, default=8, help="--export: number of frozen layers in the config")
    parser.add_argument("--samples", type=int, default=200, help="--export: samples that the layers are ranked on")
    parser.add_argument("--questions", type=int, default=1400, help="--export: held-out questions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast; faster where the hardware has bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pictures; use some with a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--projector-steps", type=int, default=300)
    parser.add_argument("--tower-batch", type=int, default=32)
    parser.add_argument("--tower-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=3300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="last part of each stage in which the rate falls")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=400)
    args = parser.parse_args()
    try:
        if args.export:
            outputs.check_folder(args.output, args.overwrite)
        else:
            outputs.check_folder(args.run_dir, own=(args.run_dir / "checkpoint.pt").is_file())
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    (export if args.export else train)(args)


if __name__ == "__main__":
    main()
