"""The backends, one package each; their interface; and the choice between them."""

from bkcore.deprecated import called_module

called_module(__name__, "bkcore.kernels.describe_backends")
