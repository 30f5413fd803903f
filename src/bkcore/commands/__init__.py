"""The commands of `bkcore`, a file each: the options, what is done with them, what is printed.

What takes long to import is imported inside of the functions, so that `bkcore --help` is quick.
"""
