"""Optimizers: AdamW, or Muon for the matrices inside a model and AdamW for the rest.

Muon (Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024) steps along
the orthogonal matrix nearest to the running mean of the gradients, so that a weight learns equally
in all directions. It is meant for maps between hidden features. AdamW (Loshchilov and Hutter,
"Decoupled weight decay regularization", ICLR 2019) trains everything else: embeddings, whose rows
are used one at a time, convolutions, vectors, and what QAT trains through codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkcore.errors import InputError

ADAMW_BETAS = (0.9, 0.98)


class MuonWithAdamW(Optimizer):
    """Muon and AdamW as one optimizer, as the `Trainer` needs it, with a rate that suits both.

    Muon's rate is scaled by 0.2 sqrt(larger side), which makes its steps as large as AdamW's (Liu
    et al., "Muon is scalable for LLM training", 2025).

    Args:
        model: the model whose parameters are trained; none may be sharded.
        decayed: names of the parameters with weight decay; Muon's always have it.
        learning_rate, weight_decay: of both optimizers.

    Raises:
        InputError: if the head is the model's only linear layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        decayed: Iterable[str],
        learning_rate: float,
        weight_decay: float,
    ) -> None:
        hidden = _hidden_matrices(model)
        if not hidden:
            raise InputError(
                "Muon trains the weights of linear layers, but this model has none except its "
                "head; train it with optimizer 'adamw'"
            )
        names, chosen = set(decayed), {id(parameter) for parameter in hidden}
        others: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if id(parameter) not in chosen:
                others[name in names].append(parameter)
        self._muon = Muon(
            hidden,
            lr=learning_rate,
            weight_decay=weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self._adamw = AdamW(
            [
                {"params": others[True], "weight_decay": weight_decay},
                {"params": others[False], "weight_decay": 0.0},
            ],
            lr=learning_rate,
            betas=ADAMW_BETAS,
            fused=True,
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        """Share one list of parameter groups, so that a rate set here reaches both optimizers."""
        self.param_groups = [*self._muon.param_groups, *self._adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; closures are not supported."""
        assert closure is None
        self._muon.step()
        self._adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """The states of both optimizers, by name."""
        return {"muon": self._muon.state_dict(), "adamw": self._adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`."""
        self._muon.load_state_dict(state_dict["muon"])
        self._adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


def _hidden_matrices(model: PreTrainedModel) -> list[Tensor]:
    """Weights of linear layers except the head: the maps between hidden features."""
    return [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not model.get_output_embeddings()
    ]
