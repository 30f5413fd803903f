"""The operators, one a file: what each computes, its contract, and its derivative.

`bkcore.kernels.backends.interface` names their arguments, and the backends compute them.
"""
