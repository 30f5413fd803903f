"""Training of language models."""

from bkcore.deprecated import moved_names
from bkcore.training.resuming import best_checkpoint
from bkcore.training.schedule import Schedule
from bkcore.training.sharding import save_whole, shard
from bkcore.training.trainer import train

__all__ = ["Schedule", "best_checkpoint", "save_whole", "shard", "train"]

__getattr__ = moved_names(__name__)
