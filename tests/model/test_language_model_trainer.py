"""transformers' own Trainer, with what makes it compute the loss outside of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from bkcore.errors import InputError, LifecycleError
from bkcore.model import LanguageModel, ResNetBKForCausalLM

IDS = torch.randint(1, 61, (8, 14), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([14, 9, 14, 5, 11, 14, 14, 2])


def items(*, padded: bool = False) -> list[dict[str, Tensor]]:
    if not padded:
        return [{"input_ids": row, "labels": row} for row in IDS]
    masks = (torch.arange(14) < LENGTHS[:, None]).long()
    return [
        {"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)}
        for row, mask in zip(IDS, masks, strict=True)
    ]


def new(**options: Any) -> ResNetBKForCausalLM:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "n_layers": 1, "num_experts": 4, "expert_size": 8}
    return LanguageModel(vocab_size=61, **{**sizes, **options})


def trainer(model: Any, folder: Any, *, padded: bool = False, **options: Any) -> Trainer:
    given = ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    arguments: dict[str, Any] = {"use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 8}
    arguments |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments |= {"learning_rate": 1e-2, "logging_steps": 1, "log_level": "error"}
    arguments |= {name: value for name, value in options.items() if name not in given}
    data = items(padded=padded)
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data,
        **{name: options[name] for name in given if name in options},
    )


def first_loss(trained: Trainer) -> float:
    trained.train()
    return next(entry["loss"] for entry in trained.state.log_history if "loss" in entry)


@torch.no_grad()
def expected(model: ResNetBKForCausalLM, *, padded: bool = False, shifted: bool = True) -> float:
    """The smoothed loss of all items, computed by hand."""
    batch = {name: torch.stack([x[name] for x in items(padded=padded)]) for name in items()[0]}
    mask = torch.stack([x["attention_mask"] for x in items(padded=True)]) if padded else None
    logits, labels = model(batch["input_ids"], attention_mask=mask).logits, batch["labels"]
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=0.05)
    return float(loss)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunked", [False, True])
def test_smoothed_labels_are_shifted(tmp_path, padded, chunked):
    """In training, with any number of parts, and in evaluation."""
    loss = expected(new(), padded=padded)
    assert abs(loss - expected(new(), padded=padded, shifted=False)) > 0.1
    for parts in (1, 4):
        options = {
            "label_smoothing_factor": 0.05,
            "gradient_accumulation_steps": parts,
            "per_device_train_batch_size": 8 // parts,
            "padded": padded,
        }
        trained = trainer(new(chunked_loss=chunked), tmp_path, **options)
        assert trained.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert first_loss(trained) == pytest.approx(loss, rel=1e-5)


def test_subclasses_are_known_too(tmp_path):
    """FSDP2 makes one of whatever it shares."""

    class Subclass(ResNetBKForCausalLM):
        pass

    model = Subclass(new().config)
    loss = expected(model.eval())
    trained = trainer(model, tmp_path, label_smoothing_factor=0.05)
    assert first_loss(trained) == pytest.approx(loss, rel=1e-5)


def test_a_compiled_model_refuses_what_would_not_shift(tmp_path):
    torch._dynamo.reset()
    options: dict[str, Any] = {"torch_compile": True, "torch_compile_backend": "eager"}
    with pytest.raises(InputError, match="leave out torch_compile, or label_smoothing_factor"):
        trainer(new(), tmp_path, label_smoothing_factor=0.05, **options).train()
    compiled = first_loss(trainer(new(), tmp_path, **options))
    assert compiled == pytest.approx(first_loss(trainer(new(), tmp_path)), rel=1e-5)


def test_a_loss_of_ones_own_has_the_balance_to_add(tmp_path):
    def own(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        return loss / num_items_in_batch + outputs.aux_loss

    results = []
    ways: list[dict[str, Any]] = [{}, {"compute_loss_func": own}]
    for options in ways:
        model = new(load_balancing=1.0)
        loss = first_loss(trainer(model, tmp_path, **options))
        results.append([torch.tensor(loss), *(p.detach() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_metrics_see_logits_and_nothing_else(tmp_path, smoothing):
    seen = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    model = new(chunked_loss=True)
    options = {"label_smoothing_factor": smoothing, "compute_metrics": metrics}
    trained = trainer(model, tmp_path, **options)
    trained.evaluate()
    with torch.no_grad():
        logits = model.eval()(IDS).logits
    torch.testing.assert_close(torch.from_numpy(seen[0][0]), logits)
    assert torch.equal(torch.from_numpy(seen[0][1]), IDS)
    trainer(
        model,
        tmp_path,
        **options,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
    ).evaluate()
    assert torch.equal(torch.from_numpy(seen[1][0]), logits.argmax(-1))
    # A state that is asked for is no prediction.
    with_state: Any = [{**item, "use_cache": True} for item in items()]
    trained.data_collator = lambda rows: {
        "input_ids": torch.stack([row["input_ids"] for row in rows]),
        "labels": torch.stack([row["labels"] for row in rows]),
        "use_cache": True,
    }
    predictions: Any = trained.predict(with_state).predictions
    assert predictions.shape == (8, 14, 61)


@pytest.mark.parametrize(
    "options",
    [
        {"include_num_input_tokens_seen": "non_padding"},
        {"neftune_noise_alpha": 5.0},
        {"train_sampling_strategy": "group_by_length"},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"average_tokens_across_devices": False},
        {"bf16": True},
        {"bf16_full_eval": True},
        {"optim": "adafactor"},
    ],
    ids=lambda options: "-".join(map(str, options)),
)
def test_it_trains_with_every_option(tmp_path, options):
    model = new()
    trained = trainer(model, tmp_path, padded=True, **options)
    loss = first_loss(trained)
    noisy = 0.05 if "neftune_noise_alpha" in options else 1e-3
    assert loss == pytest.approx(first_loss(trainer(new(), tmp_path, padded=True)), rel=noisy)
    assert trained.evaluate()["eval_loss"] < loss
    model.configure_quantization("ptq_int8")  # nothing of it stays in the way
    model.calibrate_quantization([IDS])


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_a_quantized_model_is_evaluated_but_not_trained(tmp_path, smoothing):
    model = new()
    model.configure_quantization("ptq_int8")
    model.calibrate_quantization([IDS])
    trained = trainer(model, tmp_path, label_smoothing_factor=smoothing)
    assert trained.evaluate()["eval_loss"] > 0
    with pytest.raises(LifecycleError, match="its weights are codes, which cannot be trained"):
        trained.train()


def test_adapters_of_peft_are_trained(tmp_path):
    peft = pytest.importorskip("peft")
    for task in ("CAUSAL_LM", None):
        options = {"target_modules": ["in_proj", "up"], "task_type": task}
        adapted = peft.get_peft_model(new(), peft.LoraConfig(**options))
        trained = trainer(adapted, tmp_path, label_smoothing_factor=0.05)
        assert first_loss(trained) == pytest.approx(expected(new()), rel=1e-5)
        assert trained.evaluate()["eval_loss"] < expected(new())
