"""The order of the training windows, which depends only on the seed and the step."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from bkcore.errors import DataError


class WindowOrder(Sampler[int]):
    """Indices of windows for one process, starting at any step.

    Every epoch is a new permutation of all windows, drawn from (seed, epoch). Windows at its end
    that do not fill a batch are left out of that epoch. A batch is divided into equal parts, and
    each part among the processes, so the batch of a step does not depend on how many parts or
    processes there are. An epoch takes 8 bytes of memory per window.

    Args:
        windows: number of windows to draw from, at least one batch.
        batch_size: windows per step, a multiple of `parts * processes`.
        steps: steps of the whole training.
        seed: seed of the permutations, not negative.
        parts: accumulated parts of a batch.
        process, processes: the index of this process, and how many share each part.

    Attributes:
        start: the step to begin with; earlier indices are not even drawn.

    Raises:
        DataError: if there are fewer windows than a batch.
    """

    def __init__(
        self,
        windows: int,
        batch_size: int,
        steps: int,
        seed: int,
        *,
        parts: int = 1,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        if windows < batch_size:
            raise DataError(
                f"the text has {windows} training windows, fewer than one batch of {batch_size}; "
                "give more text, shorter windows or a smaller batch_size"
            )
        self.windows, self.batch_size, self.steps, self.seed = windows, batch_size, steps, seed
        self.parts, self.process, self.processes = parts, process, processes
        self.start = 0

    def __len__(self) -> int:
        """How many indices the whole training has, whatever `start` is."""
        return self.steps * self.batch_size // self.processes

    def __iter__(self) -> Iterator[int]:
        batches = self.windows // self.batch_size
        step = self.start
        while step < self.steps:
            epoch, first = divmod(step, batches)
            last = min(batches, first + self.steps - step)
            permutation = self._permutation(epoch)[first * self.batch_size : last * self.batch_size]
            for batch in permutation.split(self.batch_size):
                yield from self._share(batch).tolist()
            step += last - first

    def _permutation(self, epoch: int) -> Tensor:
        # Adding the two would make (seed, epoch) equal to (seed + 1, epoch - 1); this does not.
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        return torch.randperm(self.windows, generator=generator)

    def _share(self, batch: Tensor) -> Tensor:
        return batch.view(self.parts, self.processes, -1)[:, self.process].flatten()
