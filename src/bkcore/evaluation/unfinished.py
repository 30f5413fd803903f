"""The scores of an interrupted evaluation, in a file from which the next try continues."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from bkcore.errors import CheckpointError
from bkcore.evaluation.perplexity import Scores
from bkcore.outputs import to_json, write_text
from bkcore.reading import parse_json, read_bytes, shortened

_BYTES = 256 << 20
"""The largest file that is read; the scores of ten million windows take this much."""

_SECONDS = 1.0
"""The most work, in seconds, that a kill can lose, plus at most one batch."""


class Unfinished:
    """The file of one evaluation, named by a hash of everything its scores depend on.

    Args:
        folder: for such files; created when needed.
        identity: what the scores depend on, in JSON values.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        name = hashlib.sha256(
            json.dumps(identity, sort_keys=True, allow_nan=False).encode()
        ).hexdigest()[:16]
        self.path = folder / f"unfinished-{name}.json"
        self._saved = time.monotonic()

    def load(self) -> tuple[Scores, list[list[int]]] | None:
        """The scores, and the tokens that each expert of each layer served; None if there are none.

        Raises:
            CheckpointError: if the file is damaged.
        """
        try:
            content = parse_json(read_bytes(self.path, _BYTES))
            scores, load = Scores.from_dict(content["scores"]), content["expert_load"]
            if not _are_counts(load):
                raise ValueError("its expert_load is not a list of counts for each layer")
            return scores, load
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({shortened(error)}); "
                "delete it to score from the beginning"
            ) from error

    def is_due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved >= _SECONDS

    def save(self, scores: Scores, expert_load: list[list[int]]) -> None:
        """Write the file, completely or not at all.

        Raises:
            OutputError: if it cannot be written.
        """
        content = {"scores": scores.as_dict(), "expert_load": expert_load}
        write_text(to_json(content, indent=None), self.path)
        self._saved = time.monotonic()


def _are_counts(load: object) -> bool:
    layers = load if isinstance(load, list) else [None]
    return all(
        isinstance(layer, list) and all(type(count) is int and count >= 0 for count in layer)
        for layer in layers
    )
