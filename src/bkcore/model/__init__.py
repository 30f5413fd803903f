"""The ResNet-BK language model."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bkcore.deprecated import moved_names
from bkcore.model.certificate import CoreCertificate, core_certificates
from bkcore.model.config import ResNetBKConfig
from bkcore.model.language_model import LanguageModel, ResNetBKForCausalLM
from bkcore.model.state import StreamState

AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)
AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)
# The Trainer's label smoothing looks a model up by these names to see that it must shift labels.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[ResNetBKConfig.model_type] = ResNetBKForCausalLM.__name__

__all__ = [
    "CoreCertificate",
    "LanguageModel",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "StreamState",
    "core_certificates",
]

__getattr__ = moved_names(__name__)
