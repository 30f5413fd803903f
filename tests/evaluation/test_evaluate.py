"""Evaluating a checkpoint: progress with error bars, and no score lost to an interruption."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from bkcore.errors import CheckpointError, OutputError
from bkcore.evaluation.evaluate import Progress, Setting, evaluate_checkpoint
from bkcore.evaluation.perplexity import perplexity_per_token, standard_error
from tests.evaluation.helpers import TEXT, full


def setting(folder: Path | None) -> Setting:
    return Setting(TEXT, "valid", 32, 4, 1, folder)


class Interruption(BaseException):
    """Stands for KeyboardInterrupt, which pytest would take for itself."""


def interrupted(checkpoint: Path, folder: Path, batches: int) -> None:
    """Evaluate until some batches are scored."""
    seen: list[Progress] = []

    def stop(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == batches:
            raise Interruption

    with pytest.raises(Interruption):
        evaluate_checkpoint(checkpoint, setting(folder), None, stop)


def test_progress_converges_to_the_result(checkpoint: Path) -> None:
    seen: list[Progress] = []
    found = evaluate_checkpoint(checkpoint, setting(None), None, seen.append)
    perplexity = perplexity_per_token(found.scores)
    assert [each.fraction for each in seen] == sorted({each.fraction for each in seen})
    assert seen[-1] == Progress(1.0, perplexity, perplexity * standard_error(found.scores))
    # 4.5 standard errors, and the first estimates are of few windows.
    for each in seen[2:]:
        assert each.error is not None
        assert abs(each.perplexity - perplexity) < 4.5 * each.error
    assert str(seen[-1]).startswith(f"perplexity {perplexity:.2f} ± ")


def test_an_interrupted_evaluation_continues(checkpoint: Path, tmp_path: Path) -> None:
    batches: list[Progress] = []
    whole = evaluate_checkpoint(checkpoint, setting(None), None, batches.append)
    interrupted(checkpoint, tmp_path, batches=3)
    assert len(list(tmp_path.iterdir())) == 1
    interrupted(checkpoint, tmp_path, batches=2)
    seen: list[Progress] = []
    found = evaluate_checkpoint(checkpoint, setting(tmp_path), None, seen.append)
    assert torch.equal(found.scores.nll, whole.scores.nll)
    assert found.expert_load == whole.expert_load
    assert seen == batches[5:]  # nothing is scored twice
    # Whoever asked says when the result is safe; until then it costs nothing to have it again.
    assert list(tmp_path.iterdir()) == [found.kept]
    again = evaluate_checkpoint(checkpoint, setting(tmp_path), None, seen.append)
    assert torch.equal(again.scores.nll, whole.scores.nll)
    assert again.expert_load == whole.expert_load
    assert seen == batches[5:]


def test_other_settings_or_weights_start_afresh(checkpoint: Path, tmp_path: Path) -> None:
    interrupted(checkpoint, tmp_path, batches=3)
    other = Setting(TEXT, "valid", 16, 4, 1, tmp_path)
    found = evaluate_checkpoint(checkpoint, other)
    assert torch.equal(
        found.scores.nll,
        evaluate_checkpoint(checkpoint, Setting(TEXT, "valid", 16, 4, 1)).scores.nll,
    )
    assert found.kept is not None
    found.kept.unlink()
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path) -> None:
    interrupted(checkpoint, tmp_path, batches=3)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-10])
    with pytest.raises(CheckpointError, match=r"unfinished-.*is damaged"):
        evaluate_checkpoint(checkpoint, setting(tmp_path))


def test_a_reference_gives_the_divergence(checkpoint: Path, tmp_path: Path) -> None:
    same = evaluate_checkpoint(checkpoint, setting(None), checkpoint)
    assert same.kl_nats == 0
    assert 0 < same.kl_tokens <= same.scores.total_tokens
    assert evaluate_checkpoint(checkpoint, setting(None)).kl_nats is None


@pytest.mark.parametrize(
    "load", [[], [[1, 2]], [[1, 2, 3], [4, 5, 6]], [[1, 2, "x"]], [[1, 2, -3]], {"0": 1}, 3]
)
def test_a_load_of_other_experts(checkpoint: Path, tmp_path: Path, load: Any) -> None:
    interrupted(checkpoint, tmp_path, batches=3)
    (path,) = tmp_path.iterdir()
    path.write_text(json.dumps({**json.loads(path.read_text()), "expert_load": load}))
    with pytest.raises(CheckpointError, match="delete it to score from the beginning"):
        evaluate_checkpoint(checkpoint, setting(tmp_path))


def test_a_pipe_is_no_unfinished_evaluation(checkpoint: Path, tmp_path: Path) -> None:
    interrupted(checkpoint, tmp_path, batches=3)
    (path,) = tmp_path.iterdir()
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="not a regular file"):
        evaluate_checkpoint(checkpoint, setting(tmp_path))


def test_scores_that_cannot_be_kept(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("bkcore.outputs.os.replace", full)
    with pytest.raises(OutputError, match=r"unfinished-.* could not be written: No space left"):
        interrupted(checkpoint, tmp_path, batches=3)
    assert not list(tmp_path.iterdir())


def test_the_threads_of_a_setting_are_for_its_evaluation_only(checkpoint: Path) -> None:
    before, seen = torch.get_num_threads(), []

    def look(progress: Progress) -> None:
        seen.append(torch.get_num_threads())

    evaluate_checkpoint(checkpoint, Setting(TEXT, "valid", 32, 40, before + 1), None, look)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before
