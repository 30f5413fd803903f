"""Measuring the speed of what bkcore computes, against what else a user might run."""
