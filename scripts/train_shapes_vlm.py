"""Train a demonstration model: a small LLaVA that answers questions about pictures of coloured shapes, or with
`--kind video` a small LLaVA-OneVision that answers questions about clips of moving ones.

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
import os
import time
from pathlib import Path

import torch
from demo_models.picture import BOS, EOS, PAD, PatchHeads, PictureTask, answer_logits, write_json
from demo_models.video import VideoTask
from safetensors.torch import save_file
from torch import nn

from shortv_hf.data import outputs
from shortv_hf.layer_contribution import rank_layers


# --------------------------------------------------------------------------------------------------------- training


class Run:
    """A resumable run: model, optimizer, stage and step, in `run_dir/checkpoint.pt`."""

    def __init__(self, args, task: PictureTask):
        self.args, self.task = args, task
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.model = task.build_model(args.seed).to(self.device)
        self.heads = PatchHeads(task.label_classes).to(self.device)
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
        features = self.task.tower_features(self.model.model, batch["pixel_values"])
        return self.heads.loss(features, batch["labels"])

    def projector_loss(self, batch: dict):
        model = self.model.model
        with torch.no_grad():
            features = self.task.tower_features(model, batch["pixel_values"])
            targets = self.task.targets(batch["labels"], model.get_input_embeddings().weight)
        loss = nn.functional.mse_loss(model.multi_modal_projector(features).float(), targets) / targets.square().mean()
        return loss, 1 - loss

    def answer_loss(self, batch: dict):
        logits, labels, _ = answer_logits(self.model, batch, self.dtype)
        return nn.functional.cross_entropy(logits, labels), (logits.argmax(-1) == labels).float().mean()

    @torch.no_grad()
    def report_accuracy(self):
        """Print the accuracy on single questions outside the training seeds, answers complete."""
        self.model.eval()
        for name, rows in self.task.evaluation_rows():
            batch = torch.utils.data.default_collate([row for row, _ in rows])
            batch = {key: tensor.to(self.device) for key, tensor in batch.items()}
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16):
                logits, labels, conversation = answer_logits(self.model, batch, self.dtype)
            wrong = set(conversation[logits.argmax(-1) != labels].tolist())
            right: dict[str, list[bool]] = {"all": []}
            for number in conversation.unique().tolist():
                question_type = rows[number // 100][1][number % 100 - 1]
                for key in "all", question_type:
                    right.setdefault(key, []).append(number not in wrong)
            shares = ", ".join(f"{key} {sum(v) / len(v):.0%}" for key, v in right.items())
            print(f"    {len(right['all'])} single questions{name and f' about {name}'}: {shares}", flush=True)
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


def train(args, task: PictureTask):
    run = Run(args, task)
    model = run.model.model
    run.train_stage(
        "tower",
        task.tower_data(),
        args.tower_steps,
        args.tower_batch,
        [(model.vision_tower, args.tower_lr), (run.heads.head, args.tower_lr)],
        run.tower_loss,
        lambda: None,
    )
    run.finish_stage("tower", "projector")
    run.train_stage(
        "projector",
        task.tower_data(),
        args.projector_steps,
        args.tower_batch,
        [(model.multi_modal_projector, args.tower_lr)],
        run.projector_loss,
        lambda: None,
    )
    run.finish_stage("projector", "answers")
    model.vision_tower.requires_grad_(task.tower_share > 0)
    run.train_stage(
        "answers",
        task.packed_data(run.first_seed("answers"), args.batch),
        args.steps,
        args.batch,
        [
            *([(model.vision_tower, task.tower_share * args.lr)] if task.tower_share else []),
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
    "model.image_newline": "image_newline",
}


def legacy_key(name: str) -> str:
    for old, new in LEGACY_KEYS.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    raise ValueError(f"unknown weight {name}")


def write_repo(task: PictureTask, state: dict, output: Path, shortv_layers: list[int]):
    """Weights in half precision, config, generation config and processor files."""
    task.write_processor(output)
    weights = {
        legacy_key(name): tensor.half().contiguous().cpu()
        for name, tensor in state.items()
        if not name.endswith("position_ids")
    }
    save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
    (output / "model.safetensors").chmod(0o644)
    write_config(task, output, shortv_layers)
    tokens = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "max_new_tokens": 64}
    write_json(output / "generation_config.json", tokens)


def write_config(task: PictureTask, output: Path, shortv_layers: list[int]):
    fields = {
        **task.config_fields(),
        "shortv_layers": shortv_layers,
        "visual_reduction": None,
        "base_model_name_or_path": None,
        "base_model_revision": None,
    }
    config = task.config_class.from_dict(json.loads(json.dumps(fields)))  # refuses what the class does not accept
    own = {
        "architectures": [task.model_class.__name__],
        "auto_map": config.to_dict()["auto_map"],
        "model_type": config.model_type,
    }
    write_json(output / "config.json", {**own, **fields})


def export(args, task: PictureTask):
    """Write the repo, rank its layers, and print its accuracy with no layer, the chosen ones and all layers frozen."""
    state = torch.load(args.run_dir / "checkpoint.pt", map_location="cpu", weights_only=True)
    write_repo(task, state["model"], args.output, [])
    model = task.model_class.from_pretrained(args.output, dtype=torch.float32).eval()
    model.to(args.device)
    samples = task.samples(args.output, args.samples)
    ranking = rank_layers(model, samples, data=f"{task.data_name}, {args.samples}, seed 0")
    ranking.save(args.output / "ranking.json")
    write_config(task, args.output, ranking.layers(args.frozen))
    results = {"questions": args.questions, "frozen_layers": ranking.layers(args.frozen)}
    for field, cases in task.evaluations(args.output, args.questions).items():
        results[field] = {}
        for name, layers in (("dense", []), ("shortv", ranking.layers(args.frozen)), ("all_frozen", ranking.order)):
            model.set_shortv_layers(layers)
            results[field][name] = task.accuracy(model, args.output, cases)
            print(f"{field} {name} {layers}")
            for question_type, share in results[field][name].items():
                print(f"    {question_type:10} {share:.1%}", flush=True)
    progress = state["progress"]
    results["training"] = {
        "script": f"scripts/train_shapes_vlm.py --kind {args.kind}",
        f"{task.rows} seen": f"{progress['pictures']:,}",
        "minutes": round(progress["seconds"] / 60),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    write_json(args.output / "results.json", results)
    task.write_examples(args.output)
    size = sum(file.stat().st_size for file in args.output.iterdir())
    print(f"{results['training']}; {args.output}: {size / 1e6:.1f} MB")


TASKS = {"picture": PictureTask, "video": VideoTask}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=TASKS, default="picture", help="which of the two demonstration models")
    parser.add_argument("--run-dir", type=Path, required=True, help="checkpoints; an interrupted run resumes from it")
    parser.add_argument(
        "--output", type=Path, help="folder that --export writes; default: that of the model in hub_configs"
    )
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
    parser.add_argument("--tower-steps", type=int, help="default: depends on --kind")
    parser.add_argument("--projector-steps", type=int, help="default: depends on --kind")
    parser.add_argument("--tower-batch", type=int, default=32)
    parser.add_argument("--tower-lr", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, help="of the last stage; default: depends on --kind")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="last part of each stage in which the rate falls")
    parser.add_argument("--log-every", type=int, default=50)
    parser.add_argument("--eval-every", type=int, default=400)
    args = parser.parse_args()
    task = TASKS[args.kind]()
    for name, steps in task.steps.items():
        if getattr(args, name) is None:
            setattr(args, name, steps)
    args.output = args.output or Path(__file__).parent.parent / "hub_configs" / task.repo
    try:
        if args.export:
            outputs.check_folder(args.output, args.overwrite)
        else:
            outputs.check_folder(args.run_dir, own=(args.run_dir / "checkpoint.pt").is_file())
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    (export if args.export else train)(args, task)


if __name__ == "__main__":
    main()
