"""The order of the training windows: a function of the seed and the step, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from bkcore.errors import DataError


class WindowOrder(Sampler[int]):
    """Indices of windows for one process, from any step on.

    Every epoch is a new permutation of all windows, drawn from (seed, epoch); the windows that
    fill no whole batch at its end are left out of that epoch. A batch is cut into parts of equal
    length, and each part into the shares of the processes: the batch of a step is the same
    whatever the numbers of these are. An epoch takes 8 bytes of memory a window.

    Args:
        windows: number of windows to draw from, at least one batch.
        batch_size: windows a step, a multiple of `parts * processes`.
        steps: steps of the whole training.
        seed: of the permutations, not negative.
        parts: accumulated parts of a batch.
        process, processes: which share of each part this one gets.

    Attributes:
        start: the step to begin with; what comes before is not even drawn.

    Raises:
        DataError: there are fewer windows than a batch.
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
                f"There are {windows} training windows, fewer than one batch of {batch_size}. "
                "Give more text, shorter windows or a smaller batch_size."
            )
        self.windows, self.batch_size, self.steps, self.seed = windows, batch_size, steps, seed
        self.parts, self.process, self.processes = parts, process, processes
        self.start = 0

    def __len__(self) -> int:
        """Indices of the whole training, whatever `start` is."""
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
        # A SeedSequence keeps (seed, epoch) apart from (seed + 1, epoch - 1) and the like.
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1)
        generator = torch.Generator().manual_seed(int(state[0]))
        return torch.randperm(self.windows, generator=generator)

    def _share(self, batch: Tensor) -> Tensor:
        return batch.view(self.parts, self.processes, -1)[:, self.process].flatten()
