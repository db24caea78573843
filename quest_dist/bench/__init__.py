"""Benchmarks that anyone can run: `python -m quest_dist.bench NAME --json FILE`; both sides in one run."""
