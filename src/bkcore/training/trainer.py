"""Training with transformers' `Trainer`; a killed run resumes and reaches exactly the same weights.

Added to the Trainer: an order of the windows that can start at any step (`WindowOrder`), resume
checkpoints that are known to be complete (`resuming`), evaluation by a function, Muon
(`optimizer`), a teacher (`distillation`), weight decay for matrices only, a time limit
(`callbacks`), a stop when training diverges, and the faster products of `onednn`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_callback import PrinterCallback

from bkcore.deprecated import moved_names
from bkcore.errors import DivergenceError, InputError, LifecycleError
from bkcore.training import resuming
from bkcore.training.callbacks import Clock, callbacks, curve
from bkcore.training.distillation import (
    Teacher,
    check_teacher,
    divergence,
    fingerprint,
    without_dropout,
)
from bkcore.training.onednn import onednn_products
from bkcore.training.optimizer import ADAMW_BETAS, MuonWithAdamW
from bkcore.training.order import WindowOrder
from bkcore.training.schedule import Schedule
from bkcore.training.sharding import is_sharded

Evaluation = Callable[[PreTrainedModel], Mapping[str, float]]
"""Scores a model; one of the numbers must be `loss`, where lower is better."""

__getattr__ = moved_names(__name__)


def train(
    model: PreTrainedModel,
    dataset: Dataset[Any],
    schedule: Schedule,
    *,
    seed: int = 0,
    output: Path | None = None,
    resume: bool = True,
    evaluation: Evaluation | None = None,
    teacher: PreTrainedModel | None = None,
    on_step: Callable[[int], None] | None = None,
    on_log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train a model on windows of tokens, in place, on the CPU.

    Under `torchrun`, every process trains on its share of each batch, and gradients are averaged.
    The batch of a step is the same for any number of processes.

    Args:
        model: a transformers model whose forward takes `input_ids` and `labels`, either whole or
            sharded by `shard`. The training text recorded in its configuration is cleared.
        dataset: has a `len`, and items with `input_ids` and `labels`, all of the same length. They
            are shuffled, and repeated as long as needed.
        schedule: how long and how fast to train.
        seed: for the order of the windows and for randomness in the model; not negative. It also
            seeds the global generators.
        output: folder for resume checkpoints, `checkpoint-STEP`. The last one is kept, and with
            `evaluation` also the best. If the folder holds a complete one, training continues from
            it; on one process it then reaches the same weights bit for bit as an uninterrupted run.
        resume: False deletes the checkpoints in `output` and starts afresh. Only folders that
            training itself wrote and marked are ever deleted.
        evaluation: called every `schedule.evaluate_every` steps and at the end, in the first
            process only. At the end `model` has the best weights, not the last ones. Needs
            `output`.
        teacher: another model, whole. The model is trained on the teacher's next-token
            distributions at every position instead of `labels`, with `nn.Dropout` layers off and
            without load balancing; windows must have no padding. The teacher is left in `eval()`
            mode and otherwise unchanged. Each window costs an extra forward pass, and the logits of
            all positions of both models. Answers for repeated windows are remembered, up to 2 GiB.
        on_step: called with the number of steps done.
        on_log: called with every new entry of the log.

    Returns:
        The log: dictionaries with `step`, `loss` (mean since the last entry, in nats per token,
        including load balancing; with a teacher, the divergence from it), `grad_norm` and
        `learning_rate`. With `evaluation` there are also entries with `step` and its numbers, as
        `eval_loss` and so on. The log of a resumed run is complete.

    Raises:
        InputError: if arguments exclude each other, the batch does not divide among the processes,
            a sharded model is to be trained with Muon, or the teacher is the model itself, shares
            parameters with it, is sharded, or has another vocabulary.
        LifecycleError: if the model is already quantized.
        DataError: if there are fewer windows than a batch.
        DivergenceError: if the loss or a weight is NaN or infinite, or diverged weights make the
            model refuse to compute. The model is then unusable, and no checkpoint holds it.
        CheckpointError: if `output` holds a damaged checkpoint, one of another model or of a
            training with other settings or windows, or something else with the name of a
            checkpoint; or if a checkpoint cannot be written.
    """
    processes = PartialState(cpu=True)
    _check_trainable(model)
    _check_arguments(model, schedule, output, evaluation)
    if teacher is not None:
        check_teacher(model, teacher)
        teacher.eval()
    _check_divides(schedule, processes.num_processes)
    order = WindowOrder(
        len(dataset),  # type: ignore[arg-type]
        schedule.batch_size,
        schedule.steps,
        seed,
        parts=schedule.gradient_accumulation,
        process=processes.process_index,
        processes=processes.num_processes,
    )
    if hasattr(model.config, "training_text"):
        model.config.training_text = None  # only the caller knows the text of the windows
    run = _description(model, dataset, order, schedule, teacher)
    start = (
        None
        if output is None
        else resuming.start_of(output, resume, run, schedule.steps, processes)
    )
    if start is not None and resuming.is_over(start, schedule):
        state = resuming.state_of(start)
    else:
        order.start = 0 if start is None else resuming.step_of(start)
        clock = Clock(0.0 if start is None else resuming.minutes_of(start))
        with tempfile.TemporaryDirectory() as unused:
            trainer = _Trainer(
                model=model,
                args=_arguments(schedule, seed, output, unused, evaluation),
                train_dataset=dataset,
                # The Trainer requires a data set to evaluate; ours uses a function instead.
                eval_dataset=None if evaluation is None else dataset,
                callbacks=callbacks(schedule, clock, on_step, on_log),
                optimizers=(_muon(model, schedule), None),
            )
            repeated = schedule.steps * schedule.batch_size > order.windows
            asked = None if teacher is None else Teacher(teacher, remembers=repeated)
            trainer.take(order, run, clock, evaluation, asked)
            with onednn_products(), nullcontext() if teacher is None else without_dropout(model):
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            trainer.check_weights()
        state = trainer.state
    if output is not None:
        resuming.load_weights(model, resuming.best_checkpoint(output))
    return curve(state.log_history)


class _Trainer(Trainer):
    def take(
        self,
        order: WindowOrder,
        run: dict[str, Any],
        clock: Clock,
        evaluation: Evaluation | None,
        teacher: Teacher | None,
    ) -> None:
        self._order, self._run, self._clock, self._evaluation = order, run, clock, evaluation
        self._teacher = teacher
        self.pop_callback(PrinterCallback)
        # All parts of a batch have the same size, so the mean of their means is the overall mean.
        self.model_accepts_loss_kwargs = False
        # A sharded model averages its own gradients and must not be wrapped again.
        assert self.model is not None
        self.is_distributed_loading_by_transformers = is_sharded(self.model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Decay only matrices: gates, norms, step sizes and Mamba's rates have natural scales."""
        return _decayed(model)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """All steps as one epoch: `WindowOrder` repeats the windows and starts at its `start`."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            sampler=self._order,
            collate_fn=self.data_collator,
            # Its own generator, so that creating an iterator draws nothing from that of dropout.
            generator=torch.Generator(),
        )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        try:
            loss = super().training_step(*args, **kwargs)
        except InputError as error:
            if self.state.global_step == 0 or self._computes():
                raise
            raise self._diverged(str(error)) from error
        if not bool(torch.isfinite(loss)):
            raise self._diverged(f"the loss is {loss.item()}")
        return loss

    def _computes(self) -> bool:
        """Whether the model can compute at all; if so, it was the data that it refused."""
        assert self.model is not None
        token = torch.zeros(1, 1, dtype=torch.long, device=self.args.device)
        try:
            with torch.no_grad():
                self.model(input_ids=token)
        except InputError:
            return False
        return True

    def check_weights(self) -> None:
        """Raise `DivergenceError` if a weight is not finite."""
        assert self.model is not None
        for name, parameter in self.model.named_parameters():
            here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if not bool(torch.isfinite(here).all()):
                raise self._diverged(f"{name} is not finite")

    def _diverged(self, what: str) -> DivergenceError:
        return DivergenceError(
            f"the training diverged after {self.state.global_step} steps: {what}; the learning "
            f"rate was probably too high, with a peak of {self.args.learning_rate:g}"
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._teacher is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not bool(torch.as_tensor(inputs.get("attention_mask", 1)).all()):
            raise InputError("training with a teacher needs whole windows, without padding")
        return divergence(model, self._teacher, inputs["input_ids"])

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self._evaluation is not None
        assert isinstance(self.model, PreTrainedModel)
        metrics = None
        if self.is_world_process_zero():
            found = self._evaluation(self.model)
            metrics = {f"eval_{name}": float(value) for name, value in found.items()}
        # All processes get the same result, so that they agree on which model is the best.
        metrics = broadcast_object_list([metrics])[0]
        assert metrics is not None
        self.log(metrics)
        best = self.state.best_metric
        if best is None or metrics["eval_loss"] < best:
            self.control.should_save = True
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        if self.control.should_training_stop:  # out of patience; saved, so that a restart stops too
            self.control.should_save = True
        return metrics

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Reduce the gradients after every accumulated part, since whole gradients take memory.

        The Trainer's own method needs a configuration that only its own sharding creates.
        """
        yield

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.check_weights()
        output = Path(str(self.args.output_dir))
        checkpoint = output / f"checkpoint-{self.state.global_step}"
        with resuming.writing(checkpoint) if self.args.should_save else nullcontext():
            if self.args.should_save:
                resuming.begin(checkpoint)
            self.accelerator.wait_for_everyone()  # now each process writes its random state
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if not self.args.should_save:
                return
            (checkpoint / TRAINING_ARGS_NAME).unlink()  # a pickle that nothing reads
            resuming.mark_complete(checkpoint, self._run, self._clock.minutes)
        best = self.state.best_global_step
        resuming.remove_all_but(output, {self.state.global_step, best or 0}, self._run)

    def _load_from_checkpoint(self, checkpoint: str, model: nn.Module | None = None) -> None:
        with resuming.reading(Path(checkpoint)):
            super()._load_from_checkpoint(checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else resuming.reading(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else resuming.reading(Path(checkpoint)):
            super()._load_rng_state(checkpoint)


def _decayed(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() >= 2 and not name.endswith(("log_scales", "A_log"))
    ]


def _muon(model: PreTrainedModel, schedule: Schedule) -> MuonWithAdamW | None:
    """The optimizer for the Trainer; None for AdamW, which the Trainer creates itself."""
    if schedule.optimizer == "adamw":
        return None
    if is_sharded(model):
        raise InputError(
            "Muon needs whole matrices, but those of a sharded model are in pieces; train it with "
            "optimizer 'adamw'"
        )
    decayed = _decayed(model)
    return MuonWithAdamW(model, decayed, schedule.learning_rate, schedule.weight_decay)


def _arguments(
    schedule: Schedule,
    seed: int,
    output: Path | None,
    unused: str,
    evaluation: Evaluation | None,
) -> TrainingArguments:
    parts = schedule.gradient_accumulation * PartialState(cpu=True).num_processes
    stable_decay = schedule.scheduler == "warmup_stable_decay"
    decay_steps = round(schedule.decay_fraction * schedule.steps)
    return TrainingArguments(
        output_dir=unused if output is None else str(output),
        use_cpu=True,
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size // parts,
        gradient_accumulation_steps=schedule.gradient_accumulation,
        learning_rate=schedule.learning_rate,
        lr_scheduler_type=schedule.scheduler,
        lr_scheduler_kwargs={"num_decay_steps": decay_steps} if stable_decay else None,
        warmup_steps=schedule.warmup_steps,
        weight_decay=schedule.weight_decay,
        adam_beta1=ADAMW_BETAS[0],
        adam_beta2=ADAMW_BETAS[1],
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        seed=seed,
        ignore_data_skip=True,  # WindowOrder itself starts at the right step
        restore_callback_states_from_checkpoint=True,
        logging_steps=schedule.interval("log_every"),
        save_strategy="no" if output is None else "steps",
        save_steps=schedule.interval("save_every"),
        eval_strategy="no" if evaluation is None else "steps",
        eval_steps=schedule.interval("evaluate_every"),
        metric_for_best_model=None if evaluation is None else "eval_loss",
        greater_is_better=False,
        report_to="none",
        disable_tqdm=True,
        log_level_replica="passive",  # as for the first process: the caller's level stays
    )


def _check_trainable(model: nn.Module) -> None:
    # Looked up by name, because training takes any transformers model.
    if getattr(model, "quantization_state", None) == "quantized":
        raise LifecycleError(
            "the model is quantized, and its weights are codes, which cannot be trained; train the "
            "float model, or use a QAT mode and train before convert()"
        )


def _check_arguments(
    model: PreTrainedModel,
    schedule: Schedule,
    output: Path | None,
    evaluation: Evaluation | None,
) -> None:
    if evaluation is not None and output is None:
        raise InputError("evaluation keeps the best checkpoint; name an output folder for it")
    if is_sharded(model) and output is not None:
        raise InputError(
            "resume checkpoints of a sharded model are not supported; train without output, and "
            "save the model with save_whole()"
        )
    if evaluation is None and schedule.patience is not None:
        raise InputError("patience counts evaluations; give an evaluation, or no patience")


def _check_divides(schedule: Schedule, processes: int) -> None:
    if schedule.batch_size % (schedule.gradient_accumulation * processes):
        raise InputError(
            f"batch_size {schedule.batch_size} does not divide among {processes} processes and "
            f"{schedule.gradient_accumulation} parts; change one of them"
        )


def _description(
    model: PreTrainedModel,
    dataset: Dataset[Any],
    order: WindowOrder,
    schedule: Schedule,
    teacher: PreTrainedModel | None,
) -> dict[str, Any]:
    """What identifies a training, in the form that JSON gives back."""
    config = {
        f"model.{name}": value
        for name, value in model.config.to_diff_dict().items()
        if name != "transformers_version"
    }
    sample = [dataset[place] for place in (0, order.windows // 2, order.windows - 1)]
    digest = hashlib.sha256()
    for item in sample:
        digest.update(item["input_ids"].numpy().tobytes() + item["labels"].numpy().tobytes())
    description = {
        **schedule.fixed(),
        **config,
        "seed": order.seed,
        "windows": order.windows,
        "sha256 of three windows": digest.hexdigest(),
        "processes": order.processes,
    }
    if teacher is not None:
        description["sha256 of the teacher"] = fingerprint(teacher)
    return dict(json.loads(json.dumps(description, allow_nan=False)))
