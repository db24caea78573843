"""Benchmarks: samples of token ids out of data sources, and scores out of decoded text.

Nothing below this package imports torch or transformers.
"""
