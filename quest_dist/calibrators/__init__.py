"""Calibrators: one module for each kind of artefact, named by its methods as `calibration`.

A module has `VERSION` (raised when what it makes changes), `SETTINGS` (the method's settings that
go into the making), `SEQUENCES` and `LENGTH` (how much text it reads, in tokens; the first may be a
setting of its own, `sequences`), and `make(loaded, tokens, settings) -> tensors` with `tokens`
int64 [SEQUENCES, LENGTH].
"""
