"""Measuring language models: perplexity with its protocol, and paired comparisons."""
