"""A training run, from its config to a checkpoint that is served under the same policy."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.config import CacheConfig
from runtime.errors import ConfigError
from runtime.progress import doing, tell
from runtime.retention import with_separator_ids
from runtime.training.attention import Kind, announced
from runtime.training.config import SETTINGS_MAY_CHANGE, TrainingConfig
from runtime.training.corpus import IGNORED, Samples, pack, read_documents
from runtime.training.export import export
from runtime.training.report import Reporter, plot
from runtime.training.source import Trainee, directory_of, encode, open_trainee
from runtime.training.visibility import Rule, attended_share, mark, rules

DESCRIPTION = "training.json"
"""The config of the run that a folder holds."""


@dataclass(frozen=True)
class Trained:
    model: Path
    """The directory to serve."""
    steps: int
    loss: float
    """The last training loss, nats per token."""
    validation_loss: float | None
    tokens: int
    """Of the corpus."""
    attended_share: float
    """What the policy shows of a sample's first document, over everything."""


def train(config: TrainingConfig, resume: bool = False) -> Trained:
    """Train, and write output.directory. `resume`: go on from the newest checkpoint there.

    Raises ConfigError for what cannot be run, NumericsError where the loss is none.
    """
    from transformers.trainer_utils import get_last_checkpoint
    from transformers.utils import logging

    logging.disable_progress_bar()
    _need("accelerate")
    folder = directory_of(config)
    is_first = is_first_process()
    if is_first:
        _check_folder(config, folder, resume)
    texts = list(read_documents(config.data.files, config.data.text_field))
    if not texts:
        raise ConfigError("data.files", list(config.data.files), "there is no text in them", "Name others.")
    trainee = open_trainee(config, texts)
    cache = _resolved(config, trainee)
    training, validation = _samples(config, trainee, texts)
    policy = rules(cache, config.strided, trainee.spec.num_layers, config.data.length)
    trainee.spec.check_cache(config.cache)
    share = _share(policy, training)
    announcement = (
        f"{trainee.model.num_parameters() / 1e6:.2f} million parameters, policy {config.policy} "
        f"(attends to {share:.1%}), {training.tokens.size:,} tokens in {len(training):,} samples, "
        f"{len(validation):,} for validation"
    )
    if is_first:
        tell(announcement)
    trainer = _trainer(config, trainee, policy, training, validation, folder)
    if is_first and not resume:  # what is refused leaves nothing behind
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).write_text(json.dumps(config.model_dump(mode="json"), indent=2) + "\n")
    newest = get_last_checkpoint(str(folder / "checkpoints")) if resume else None
    trainer.train(resume_from_checkpoint=newest)
    validation_loss = _validated(trainer) if len(validation) else None
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    model = folder / "model"
    if is_first:
        plot(folder)
        export(config, trainee, cache, model)
    return Trained(
        model,
        trainer.state.global_step,
        losses[-1] if losses else float("nan"),
        validation_loss,
        training.tokens.size,
        share,
    )


def _validated(trainer: Any) -> float:
    """The validation loss of the weights as they are."""
    history, step = trainer.state.log_history, trainer.state.global_step
    known = [record["eval_loss"] for record in history if "eval_loss" in record and record["step"] == step]
    return float(known[-1] if known else trainer.evaluate()["eval_loss"])


def is_first_process() -> bool:
    """Whether this is the one of the processes that torchrun has started that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def _need(package: str) -> None:
    import importlib.util

    if importlib.util.find_spec(package) is None:
        remedy = f"Install the extra: pip install 'outrider[train]' (it brings {package})."
        raise ConfigError("train", package, "is not installed", remedy)


def _check_folder(config: TrainingConfig, folder: Path, resume: bool) -> None:
    """See that the folder is empty or, to resume, of this run. Raises ConfigError."""
    description = folder / DESCRIPTION
    settings = config.model_dump(mode="json")
    if not resume:
        if folder.exists() and any(folder.iterdir()):
            remedy = "Name another, remove it, or go on with what is there (--resume)."
            raise ConfigError("output.directory", str(folder), "is not empty", remedy)
        return
    if not description.exists():
        problem = f"has no {DESCRIPTION}, so there is no run to go on with"
        raise ConfigError("output.directory", str(folder), problem, "Leave out --resume, or name the run's folder.")
    before, now = _flat(json.loads(description.read_text())), _flat(settings)
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and key not in SETTINGS_MAY_CHANGE:
            problem = f"the run in {folder} has {before.get(key)!r}, and would become another run"
            raise ConfigError(key, now.get(key), problem, "Set it back, or begin a run in another output.directory.")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by `section.key`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _resolved(config: TrainingConfig, trainee: Trainee) -> CacheConfig:
    """The cache section with separators as token ids."""
    from tempfile import TemporaryDirectory

    from runtime.tokenizer import Tokenizer

    if config.cache.separators is None:
        return config.cache
    with TemporaryDirectory() as folder:
        trainee.tokenizer.save_pretrained(folder)
        return with_separator_ids(config.cache, Tokenizer(folder))


def _samples(config: TrainingConfig, trainee: Trainee, texts: list[str]) -> tuple[Samples, Samples]:
    """(for training, for validation)"""
    data = config.data
    end = [] if trainee.end_id is None else [trainee.end_id]
    fill = trainee.end_id or 0

    def packed(documents: list[str]) -> Samples:
        ids = ([*tokens, *end] for tokens in encode(trainee.tokenizer, documents))
        return pack(ids, data.length, fill, trainee.sink_id)

    with doing("encoding the corpus"):
        training = packed(texts)
        if data.validation_files:
            others = read_documents(data.validation_files, data.text_field, "data.validation_files")
            validation = packed(list(others))
        else:
            count = round(len(training) * data.validation_share)
            training, validation = (
                training.part(0, len(training) - count),
                training.part(len(training) - count, len(training)),
            )
    at_once = config.training.batch_size
    if len(training) < at_once:
        problem = f"has {len(training)} samples of {data.length} tokens, fewer than training.batch_size = {at_once}"
        raise ConfigError("data.files", list(data.files), problem, "Name more text, or lower one of the two.")
    return training, validation


def _share(policy: tuple[Rule, ...], samples: Samples) -> float:
    first = samples.documents[0] == samples.documents[0, 0]
    tokens, positions = (column[0][first].astype(np.int64) for column in (samples.tokens, samples.positions))
    return attended_share(policy, tokens, positions)


def _trainer(
    config: TrainingConfig,
    trainee: Trainee,
    policy: tuple[Rule, ...],
    training: Samples,
    validation: Samples,
    folder: Path,
) -> Any:
    from transformers import Trainer, TrainingArguments

    settings, output = config.training, config.output
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("training.device", "cuda", "torch finds no CUDA device here", "Set it to auto or cpu.")
    on_cuda = settings.device != "cpu" and torch.cuda.is_available()
    kind: Kind = "flex" if settings.attention == "flex" or (settings.attention == "auto" and on_cuda) else "dense"
    if kind == "flex" and not on_cuda:
        raise ConfigError("training.attention", "flex", "is for CUDA devices", "Set it to auto or dense.")
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        bf16=settings.dtype == "bfloat16",
        use_cpu=not on_cuda,
        seed=settings.seed,
        data_seed=settings.seed,
        save_steps=output.save_every,
        save_total_limit=output.keep,
        eval_strategy="steps" if len(validation) else "no",
        eval_steps=output.evaluate_every,
        logging_steps=output.log_every,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        label_names=["labels"],
        prediction_loss_only=True,
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    if arguments.n_gpu > 1:
        remedy = "Start one process per GPU: torchrun --nproc-per-node=N -m cluster.cli.commands train ..."
        raise ConfigError("training.device", settings.device, f"{arguments.n_gpu} GPUs in one process", remedy)

    if settings.gradient_checkpointing:
        trainee.model.gradient_checkpointing_enable({"use_reentrant": False})

    class PolicyTrainer(Trainer):
        """Announces each batch's marks around the model's computation."""

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            documents = inputs.pop("documents").cpu().numpy()
            tokens, positions = (inputs[name].cpu().numpy() for name in ("input_ids", "position_ids"))
            with announced(mark(policy, tokens, positions, documents, inputs["input_ids"].device), kind):
                return super().compute_loss(model, inputs, *args, **options)

        @torch.no_grad()
        def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
            """The mean over tokens, where transformers takes that over batches."""
            self.model.eval()
            sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                count = (inputs["labels"] != IGNORED).sum()
                with self.compute_loss_context_manager():
                    sums += torch.stack([self.compute_loss(self.model, inputs) * count, count])
            total, count = self.accelerator.reduce(sums).tolist()
            found = {"eval_loss": total / count}
            self.log(found)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    from transformers.trainer_callback import PrinterCallback

    per_step = settings.batch_size * settings.accumulate * config.data.length * max(1, arguments.world_size)
    trainer = PolicyTrainer(
        model=trainee.model,
        args=arguments,
        train_dataset=_Rows(training),
        eval_dataset=_Rows(validation) if len(validation) else None,
        data_collator=_batch,
        processing_class=trainee.tokenizer,
        callbacks=[Reporter(folder, per_step)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _Rows(torch.utils.data.Dataset[tuple[np.ndarray, ...]]):
    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[np.ndarray, ...]:
        samples = self.samples
        return samples.tokens[index], samples.positions[index], samples.documents[index], samples.labels[index]


def _batch(rows: list[tuple[np.ndarray, ...]]) -> dict[str, torch.Tensor]:
    """[B, T] int64 each."""
    columns = (torch.from_numpy(np.stack(column).astype(np.int64)) for column in zip(*rows, strict=True))
    return dict(zip(("input_ids", "position_ids", "documents", "labels"), columns, strict=True))
