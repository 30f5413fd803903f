"""The demo: train a model on text, quantize it in every mode, and evaluate what was saved."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from bkcore.display.progress import Plan
from bkcore.errors import DataError
from bkcore.evaluation.checkpoints import save_checkpoint
from bkcore.evaluation.evaluate import Evaluation, Setting, check_length, evaluate_in_new_process
from bkcore.evaluation.rows import parameter_shares, row
from bkcore.evaluation.samples import samples_of
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.outputs import prepare_folder
from bkcore.quantization.config import MODES
from bkcore.text import (
    Corpus,
    TokenWindows,
    encode,
    origin_of,
    spread,
    train_tokenizer,
)
from bkcore.training import Schedule, train
from bkcore.training.qat import train_through_codes
from bkcore.training.schedule import schedule_for_codes

_CALIBRATION_BATCHES = 8

CONTROL = "float32 control"
"""The control: float32 after as many more steps on the text as QAT takes."""


@dataclass(frozen=True)
class DemoSettings:
    """Sizes and lengths of the demo.

    A small vocabulary and many experts keep the float16 head of mixed precision at about a
    twentieth of the parameters.
    """

    vocab_size: int = 2048
    window: int = 256
    batch_size: int = 16
    seed: int = 0
    model: dict[str, Any] = field(
        default_factory=lambda: {
            "d_model": 128,
            "n_layers": 3,
            "num_experts": 16,
            "experts_per_token": 2,
            "expert_size": 384,
        }
    )
    training: Schedule = field(
        default_factory=lambda: Schedule(
            steps=240, batch_size=16, optimizer="muon", learning_rate=5e-3
        )
    )
    qat_steps: int = 45

    def qat(self, mode: str) -> Schedule:
        """How a QAT mode trains.

        Codes of 8 bits lie sixteen times as close as those of 4 bits. In so few steps, a rate that
        mends INT4 would only disturb INT8.
        """
        rate = 2e-4 if mode == "qat_int4" else 5e-6
        return schedule_for_codes(self.qat_steps, self.batch_size, rate)

    @property
    def training_tokens(self) -> int:
        """How many tokens the float model is trained on."""
        return self.training.steps * self.training.batch_size * self.window


def run_demo(
    corpus: Corpus,
    output: Path,
    console: Console,
    settings: DemoSettings | None = None,
) -> dict[str, Any]:
    """Train, calibrate, quantize, save, load in a new process and evaluate, in every mode.

    Args:
        corpus: the text to train on and to evaluate on.
        output: folder for the checkpoints, one subfolder each for float32 and the modes.
        console: for the progress bar.
        settings: sizes and lengths.

    Returns:
        `rows`, one for float32 and one for each mode; `control`, the float model after as much
        extra training as QAT had; and the `protocol`.

    Raises:
        DataError: if the text is too small; raised before any training.
        InputError: if `output` cannot be written, or the validation text is a single window; raised
            before any training.
    """
    settings = settings or DemoSettings()
    for folder in folders(output):
        prepare_folder(folder)
    with Plan(_stages(settings, corpus), console) as plan:
        return _Demo(settings, corpus, output, plan).run()


def folders(output: Path) -> list[Path]:
    """The folders of all checkpoints of a demo."""
    return [_folder(output, name) for name in ("float32", *MODES, CONTROL)]


def _folder(output: Path, name: str) -> Path:
    return output / name.replace(" ", "-")


def _stages(settings: DemoSettings, corpus: Corpus) -> dict[str, float]:
    """The stages, with about how many seconds each takes on two cores."""
    step = 0.4
    evaluate = 8 + len(corpus.valid) / 60_000
    stages = {
        "train tokenizer": 3 + len(corpus.train) / 2e6,
        "train float32": step * settings.training.steps,
        "evaluate float32": evaluate,
    }
    for mode in MODES:
        stages[f"quantize {mode}"] = 6.0
        if mode.startswith("qat"):
            stages[f"train {mode}"] = 1.1 * step * settings.qat_steps
        stages[f"evaluate {mode}"] = evaluate
    stages[f"train {CONTROL}"] = step * settings.qat_steps
    stages[f"evaluate {CONTROL}"] = evaluate
    return stages


class _Demo:
    """A run of the demo: the state that its stages share."""

    def __init__(self, settings: DemoSettings, corpus: Corpus, output: Path, plan: Plan) -> None:
        self.settings = settings
        self.corpus = corpus
        self.output = output
        self.plan = plan
        self.setting = Setting(
            corpus.valid, "valid", settings.window, settings.batch_size, torch.get_num_threads()
        )

    def run(self) -> dict[str, Any]:
        with self.plan.stage("train tokenizer"):
            self.tokenizer = train_tokenizer(self.corpus.train, self.settings.vocab_size)
            self.windows = self._windows()
            check_length(encode(self.tokenizer, self.corpus.valid), self.settings.window)
        self._train_float()
        reference = self._evaluate("float32")
        rows = [row("float32", reference, reference)]
        for mode in MODES:
            self._quantize(mode)
            rows.append(row(mode, self._evaluate(mode), reference))
        self._train_control()
        control = row(CONTROL, self._evaluate(CONTROL), reference)
        return {"rows": rows, "control": control, "protocol": self._protocol(reference)}

    def _windows(self) -> TokenWindows:
        tokens = encode(self.tokenizer, self.corpus.train)
        needed = self.settings.window * max(self.settings.batch_size, _CALIBRATION_BATCHES)
        if len(tokens) < needed:
            raise DataError(
                f"the training text has {len(tokens)} tokens; the demo needs at least {needed}"
            )
        return TokenWindows(tokens, self.settings.window)

    def _train_float(self) -> None:
        torch.manual_seed(self.settings.seed)
        model = LanguageModel(
            vocab_size=len(self.tokenizer), n_seq=self.settings.window, **self.settings.model
        )
        self._train(model, self.settings.training, "float32")
        self._save(model, "float32", samples_of(self.windows))

    def _train(self, model: ResNetBKForCausalLM, schedule: Schedule, name: str) -> None:
        with self.plan.stage(f"train {name}") as advance:
            train(
                model,
                self.windows,
                schedule,
                seed=self.settings.seed,
                on_step=lambda step: advance(step / schedule.steps),
            )
        model.config.training_text = origin_of(self.corpus)

    def _quantize(self, mode: str) -> None:
        with self.plan.stage(f"quantize {mode}"):
            model = ResNetBKForCausalLM.from_pretrained(self.output / "float32")
            model.configure_quantization(mode)
            batch_size = self.settings.batch_size
            picks = spread(self.windows, _CALIBRATION_BATCHES * batch_size)
            model.calibrate_quantization(picks.split(batch_size))
        if mode.startswith("qat"):
            teacher = ResNetBKForCausalLM.from_pretrained(self.output / "float32")
            schedule = self.settings.qat(mode)
            with self.plan.stage(f"train {mode}") as advance:
                train_through_codes(
                    model,
                    self.windows,
                    schedule,
                    teacher,
                    seed=self.settings.seed,
                    on_step=lambda step: advance(step / schedule.steps),
                )
        self._save(model, mode)

    def _train_control(self) -> None:
        model = ResNetBKForCausalLM.from_pretrained(self.output / "float32")
        self._train(model, self.settings.qat("qat_int4"), CONTROL)
        self._save(model, CONTROL)

    def _save(self, model: ResNetBKForCausalLM, name: str, samples: Tensor | None = None) -> None:
        save_checkpoint(self._folder(name), model, self.tokenizer, samples)

    def _folder(self, name: str) -> Path:
        return _folder(self.output, name)

    def _evaluate(self, name: str) -> Evaluation:
        reference = None if name == "float32" else self._folder("float32")
        with self.plan.stage(f"evaluate {name}") as advance:
            return evaluate_in_new_process(
                self._folder(name),
                self.setting,
                reference,
                lambda progress: advance(progress.fraction, progress),
            )

    def _protocol(self, reference: Evaluation) -> dict[str, Any]:
        return {
            **reference.protocol.as_dict(),
            "corpus": self.corpus.name,
            "training_tokens": self.settings.training_tokens,
            "threads": self.setting.threads,
            "settings": asdict(self.settings),
            "parameters": parameter_shares(self.output / "float32"),
            "bytes": "files of the model on disk, tokenizer apart",
            "speed": "forward passes, batches of batch_size windows; speedup is the median ratio "
            "of pairs timed in alternation with float32",
        }

    tokenizer: PreTrainedTokenizerFast
    windows: TokenWindows
