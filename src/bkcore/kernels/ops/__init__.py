"""The operators, one per file: what each computes, its contract, and its derivative.

`bkcore.kernels.backends.interface` names their arguments, and the backends compute them.
"""
