"""The ResNet-BK language model."""

from transformers import AutoConfig, AutoModelForCausalLM

from bkcore.model.certificate import CoreCertificate, core_certificates
from bkcore.model.config import ResNetBKConfig
from bkcore.model.language_model import LanguageModel, ResNetBKForCausalLM
from bkcore.model.state import StreamState

AutoConfig.register(ResNetBKConfig.model_type, ResNetBKConfig, exist_ok=True)
AutoModelForCausalLM.register(ResNetBKConfig, ResNetBKForCausalLM, exist_ok=True)

__all__ = [
    "CoreCertificate",
    "LanguageModel",
    "ResNetBKConfig",
    "ResNetBKForCausalLM",
    "StreamState",
    "core_certificates",
]
