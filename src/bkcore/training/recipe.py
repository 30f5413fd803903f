"""The recipe that `bkcore train` reads from a YAML file, checked before anything else happens."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from bkcore.arguments import did_you_mean
from bkcore.errors import InputError
from bkcore.reading import read_bytes, shortened, shown
from bkcore.training.schedule import Schedule

# Fields set by other sections or the tokenizer, and fields that a new training cannot have.
_NOT_CHOSEN = {"vocab_size", "n_seq", "quantization"}


class _Loader(yaml.SafeLoader):
    """Reads 5e-3 as a number, as YAML 1.2 does; PyYAML follows 1.1 and does not.

    Refuses aliases: a few aliases of aliases can expand beyond any memory, and no recipe needs one.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe takes no aliases (*name); write the value again")
        return super().compose_node(parent, index)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Recipe:
    """The recipe of a whole training.

    Attributes:
        vocab_size, min_frequency: of the tokenizer, as in `bkcore.text.train_tokenizer`.
        model: fields of `ResNetBKConfig`, without the vocabulary, the window and quantization.
        window: tokens per training window, at least 2, and targets per window in evaluation.
        schedule: how long and how fast to train.
        evaluation_batch_size: windows per batch in evaluation, at least 1.
        seed: seed of the weights and of the order of the windows, not negative.
    """

    model: dict[str, Any]
    schedule: Schedule
    vocab_size: int = 4096
    min_frequency: int = 2
    window: int = 256
    evaluation_batch_size: int = 16
    seed: int = 0

    @property
    def tokens_a_step(self) -> int:
        """Tokens that a training step reads."""
        return self.schedule.batch_size * self.window

    def as_dict(self) -> dict[str, Any]:
        """Return the recipe as plain JSON values."""
        return asdict(self)


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe.

    The file has the sections `tokenizer` (`vocab_size`, `min_frequency`), `model` (fields of
    `ResNetBKConfig`) and `training` (fields of `Schedule`, and `window`, `evaluation_batch_size`
    and `seed`). Fields with a default may be left out.

    Raises:
        InputError: if the file cannot be read, or has an unknown section or name, or a value that
            is not allowed.
    """
    content = _section(_parse(path), {"tokenizer", "model", "training"}, f"{path}")
    tokenizer = _section(content.get("tokenizer"), {"vocab_size", "min_frequency"}, "tokenizer")
    own = {"window", "evaluation_batch_size", "seed"}
    schedule = {field.name for field in fields(Schedule)}
    training = _section(content.get("training"), own | schedule, "training")
    missing = sorted({"steps", "batch_size", "learning_rate"} - training.keys())
    if missing:
        raise InputError(f"{path}: the section 'training' lacks {missing}")
    recipe = Recipe(
        model=_section(content.get("model"), None, "model"),
        schedule=Schedule(**{k: v for k, v in training.items() if k in schedule}),
        **tokenizer,
        **{k: v for k, v in training.items() if k in own},
    )
    _check_numbers(recipe)
    _check_model(recipe)
    return recipe


def _parse(path: Path) -> Any:
    try:
        return yaml.load(read_bytes(path).decode(), _Loader)
    except OSError as error:
        raise InputError(f"the recipe {path} cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date or number
        raise InputError(f"the recipe {path} is not YAML: {shortened(error)}") from error
    except RecursionError as error:
        raise InputError(f"the recipe {path} is nested too deeply") from error


def _section(content: Any, known: set[str] | None, name: str) -> dict[str, Any]:
    """Check that a section is a mapping, with these names if given; an absent one is empty."""
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InputError(f"{name} must be a mapping from names to values, not {shown(content)}")
    if known is not None:
        _check_names(content, known, name)
    return content


def _check_names(content: dict[str, Any], known: set[str], name: str) -> None:
    unknown = sorted(str(key) for key in content.keys() - known)
    if unknown:
        raise InputError(
            f"{name} has no {shown(unknown)}; it takes {sorted(known)}"
            f"{did_you_mean(unknown, known)}"
        )


def _check_numbers(recipe: Recipe) -> None:
    for name, least in (
        ("vocab_size", 257),
        ("min_frequency", 1),
        ("window", 2),
        ("evaluation_batch_size", 1),
        ("seed", 0),
    ):
        value = getattr(recipe, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, not {shown(value)}")


def _check_model(recipe: Recipe) -> None:
    """Check the model's fields; last, because importing transformers takes seconds."""
    from bkcore.model import ResNetBKConfig

    inherited = set(ResNetBKConfig.__mro__[1].__annotations__)
    known = set(ResNetBKConfig.__annotations__) - inherited - _NOT_CHOSEN - {"model_type"}
    _check_names(recipe.model, known, "model")
    for name, value in recipe.model.items():
        _check_kind(name, value, getattr(ResNetBKConfig, name))
    ResNetBKConfig(vocab_size=recipe.vocab_size, n_seq=recipe.window, **recipe.model)


def _check_kind(name: str, value: Any, default: Any) -> None:
    kinds = {bool: "true or false", int: "an integer", float: "a number", str: "a word"}
    taken = (int, float) if type(default) is float else type(default)
    if type(default) in kinds and (
        not isinstance(value, taken) or isinstance(value, bool) != isinstance(default, bool)
    ):
        raise InputError(f"{name} must be {kinds[type(default)]}, not {shown(value)}")
