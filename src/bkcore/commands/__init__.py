"""The commands of `bkcore`, one file each: options, work and output.

Slow imports are inside the functions, so that `bkcore --help` is quick.
"""
