"""Doctor: what of this machine a sweep depends on, whether it is there, and what to do if not.

python -m quest_dist.doctor [--json] [--ray] [--output-dir DIR] [--tracking-uri URI]
"""
