"""Training towards the next-token distributions of another model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from bkcore.errors import CheckpointError, InputError
from bkcore.model import LanguageModel, ResNetBKForCausalLM
from bkcore.text import TokenWindows
from bkcore.training import Schedule, distillation, train
from bkcore.training.distillation import Teacher, divergence, fingerprint

TOKENS = torch.randint(0, 50, (30 * 16,), generator=torch.Generator().manual_seed(0))
WINDOWS = TokenWindows(TOKENS, 16)
IDS = TOKENS[:64].view(4, 16)
SCHEDULE: dict[str, Any] = {"steps": 6, "batch_size": 4, "learning_rate": 5e-3, "save_every": 2}


def small(seed: int, **options: Any) -> ResNetBKForCausalLM:
    torch.manual_seed(seed)
    sizes = {"d_model": 16, "n_layers": 1, "n_seq": 16, "num_experts": 2, "expert_size": 16}
    return LanguageModel(vocab_size=50, **{**sizes, **options})


def sharp(seed: int) -> ResNetBKForCausalLM:
    """A model that is sure of something, as one that begins is not."""
    model = small(seed)
    with torch.no_grad():
        model.get_parameter("embedding.weight").mul_(20)
    return model.eval()


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


class Stop(Exception):
    pass


class NoLabels(TokenWindows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = super().__getitem__(index)
        return {"input_ids": item["input_ids"], "labels": torch.full_like(item["labels"], -100)}


def test_the_divergence_is_that_of_the_definition() -> None:
    model, teacher = sharp(0).double(), sharp(1).double()
    loss = divergence(model, Teacher(teacher), IDS).detach()
    with torch.no_grad():
        p, q = (m(IDS).logits.softmax(-1) for m in (teacher, model))
    expected = (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    assert float(loss) > 0.1
    assert abs(divergence(model, Teacher(model), IDS).item()) < 1e-14


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 2**-11)])
def test_its_gradient_is_the_difference_of_the_distributions(
    dtype: torch.dtype, rounding: float
) -> None:
    class Table(nn.Module):
        """Logits that do not depend on the ids."""

        def __init__(self, seed: int) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.table = nn.Parameter(torch.randn(16, 50, generator=generator))

        def forward(self, input_ids: Tensor) -> Any:
            class Output:
                logits = self.table.expand(len(input_ids), -1, -1)

            return Output

    model, teacher = Table(0).to(dtype), Table(1).to(dtype)
    divergence(model, Teacher(teacher), IDS).backward()  # type: ignore[arg-type]
    wanted = teacher.table.softmax(-1)
    expected = (model.table.softmax(-1) - wanted) / 16
    assert model.table.grad is not None
    # Probabilities in float32 are taught in float16; and a sum of them over a row is not quite 1.
    error = (model.table.grad - expected).abs() * 16
    assert bool((error <= rounding * (wanted + model.table.softmax(-1)) + 1e-15).all())
    assert teacher.table.grad is None


def test_a_model_comes_nearer_to_its_teacher() -> None:
    model, teacher = small(0), sharp(1)
    before = divergence(model, Teacher(teacher), IDS).item()
    log = train(
        model, WINDOWS, Schedule(**SCHEDULE | {"steps": 60, "log_every": 1}), teacher=teacher
    )
    assert divergence(model.eval(), Teacher(teacher), IDS).item() < 0.5 * before
    assert log[0]["loss"] == pytest.approx(before, rel=0.2)


def test_the_teacher_stays_as_it_is() -> None:
    teacher = sharp(1).train()
    before = weights(teacher)
    train(small(0), WINDOWS, Schedule(**SCHEDULE), teacher=teacher)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert not any(parameter.grad is not None for parameter in teacher.parameters())
    assert not teacher.training


def test_labels_and_load_balancing_have_no_part_in_it() -> None:
    model, other = small(0), small(0, load_balancing=5.0)
    train(model, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1))
    train(other, NoLabels(TOKENS, 16), Schedule(**SCHEDULE), teacher=sharp(1))
    assert same(model, other)


def test_dropout_is_off_until_the_end() -> None:
    model, other = small(0), small(0, dropout=0.5)
    train(model, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1))
    train(other, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1))
    assert same(model, other)
    assert {layer.p for layer in other.modules() if isinstance(layer, nn.Dropout)} == {0.5}


def test_dropout_is_back_after_an_interruption() -> None:
    def stop(step: int) -> None:
        raise Stop

    model = small(0, dropout=0.5)
    with pytest.raises(Stop):
        train(model, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1), on_step=stop)
    assert {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)} == {0.5}


def test_a_chunked_loss_and_parts_of_a_batch_change_nothing() -> None:
    model, chunked, parts = (small(0).double() for _ in range(3))
    chunked.config.chunked_loss = True
    train(model, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1).double())
    train(chunked, WINDOWS, Schedule(**SCHEDULE), teacher=sharp(1).double())
    assert same(model, chunked)
    schedule = Schedule(**SCHEDULE, gradient_accumulation=2)
    train(parts, WINDOWS, schedule, teacher=sharp(1).double())
    for a, b in zip(model.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_other_models_can_learn_and_teach() -> None:
    def gpt2() -> PreTrainedModel:
        sizes: dict[str, Any] = {
            "n_embd": 16,
            "n_layer": 1,
            "n_head": 2,
            "n_positions": 16,
            "vocab_size": 50,
        }
        return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    model, teacher = gpt2(), sharp(1)
    before = divergence(model, Teacher(teacher), IDS).item()
    train(model, WINDOWS, Schedule(**SCHEDULE | {"steps": 30}), teacher=teacher)
    assert divergence(model, Teacher(teacher), IDS).item() < before
    pupil = small(0)
    before = divergence(pupil, Teacher(model), IDS).item()
    train(pupil, WINDOWS, Schedule(**SCHEDULE | {"steps": 30}), teacher=model)
    assert divergence(pupil, Teacher(model), IDS).item() < before


class Counted(ResNetBKForCausalLM):
    """A model that counts the windows that it was asked about."""

    windows = 0

    def forward(self, input_ids: Tensor, **options: Any) -> Any:  # type: ignore[override]
        self.windows += len(input_ids)
        return super().forward(input_ids, **options)


def counted() -> Counted:
    teacher = Counted(sharp(1).config)
    teacher.load_state_dict(sharp(1).state_dict())
    return teacher


def test_a_window_that_comes_again_is_not_asked_for_again() -> None:
    teacher = counted()
    train(small(0), WINDOWS, Schedule(**SCHEDULE | {"steps": 21}), teacher=teacher)
    assert teacher.windows == 30  # of 84


def test_what_is_remembered_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where there is room for some windows only."""
    schedule = Schedule(**SCHEDULE | {"steps": 21})
    models, asked = [], []
    for room in (2**30, 12 * 16 * 50 * 2, 0):
        monkeypatch.setattr(distillation, "_ROOM", room)
        model, teacher = small(0), counted()
        train(model, WINDOWS, schedule, teacher=teacher)
        models.append(model)
        asked.append(teacher.windows)
    assert same(models[0], models[1])
    assert same(models[0], models[2])
    assert asked[0] == 30 < asked[1] < asked[2] == 84


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 2), (torch.float64, 8)])
def test_what_is_remembered_takes_two_bytes_a_number(dtype: torch.dtype, size: int) -> None:
    model: Any = sharp(1)
    teacher = Teacher(model.to(dtype), remembers=True)
    for _ in range(2):
        teacher.says(IDS)
    kept = [said for said, _ in teacher._said.values()]
    assert sum(said.numel() * said.element_size() for said in kept) == 4 * 16 * 50 * size
    assert teacher._room == distillation._ROOM - 4 * 16 * 50 * size


def test_nothing_is_kept_of_windows_that_come_once() -> None:
    teacher = Teacher(sharp(1))
    teacher.says(IDS)
    assert not teacher._said


def test_who_cannot_teach_is_refused() -> None:
    model = small(0)
    with pytest.raises(InputError, match="the teacher is the model itself"):
        train(model, WINDOWS, Schedule(**SCHEDULE), teacher=model)
    twin = small(1)
    twin.layers = model.layers
    with pytest.raises(InputError, match="shares parameters with the model"):
        train(model, WINDOWS, Schedule(**SCHEDULE), teacher=twin)
    torch.manual_seed(0)
    other = LanguageModel(60, 16, 1, 16, num_experts=2, expert_size=16)
    with pytest.raises(InputError, match="a vocabulary of 60 tokens, but the model of 50"):
        train(model, WINDOWS, Schedule(**SCHEDULE), teacher=other)


def test_a_fingerprint_tells_codes_and_configurations_apart() -> None:
    def quantized(mode: str, sequences: int = 4) -> ResNetBKForCausalLM:
        model = sharp(1)
        model.configure_quantization(mode)
        model.calibrate_quantization([IDS[:sequences]])
        return model

    assert fingerprint(quantized("ptq_int8")) == fingerprint(quantized("ptq_int8"))
    other = sharp(1)
    other.config.embedding_multiplier = 1.0
    codes = [quantized("ptq_int8"), quantized("ptq_int4"), quantized("ptq_int8", sequences=1)]
    everyone = [sharp(1), sharp(2), other, *codes]
    assert len({fingerprint(teacher) for teacher in everyone}) == 6


def test_it_resumes_with_the_same_teacher_and_no_other(tmp_path: Path) -> None:
    def stop(step: int) -> None:
        if step == 3:
            raise Stop

    schedule = Schedule(**SCHEDULE)
    with pytest.raises(Stop):
        train(small(0), WINDOWS, schedule, output=tmp_path, teacher=sharp(1), on_step=stop)
    for teacher in (sharp(2), None):
        with pytest.raises(CheckpointError, match="teacher"):
            train(small(0), WINDOWS, schedule, output=tmp_path, teacher=teacher)
    resumed, whole = small(5), small(0)
    train(resumed, WINDOWS, schedule, output=tmp_path, teacher=sharp(1))
    train(whole, WINDOWS, schedule, teacher=sharp(1))
    assert same(resumed, whole)
