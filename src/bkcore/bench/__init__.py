"""Benchmarks of bkcore against what a user might run instead."""
