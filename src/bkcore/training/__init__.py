"""Training of language models."""

from typing import TYPE_CHECKING

from bkcore.lazy import lazy_names

if TYPE_CHECKING:
    from bkcore.training.resuming import best_checkpoint
    from bkcore.training.schedule import Schedule
    from bkcore.training.sharding import save_whole, shard
    from bkcore.training.trainer import train
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "resuming": "best_checkpoint",
            "schedule": "Schedule",
            "sharding": "save_whole shard",
            "trainer": "train",
        },
    )

__all__ = ["Schedule", "best_checkpoint", "save_whole", "shard", "train"]


def __dir__() -> list[str]:
    return __all__
