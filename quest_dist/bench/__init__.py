"""Benchmarks that anyone can run, both sides of a comparison in one run.

python -m quest_dist.bench NAME --json FILE
"""
