"""Weights: which files a model's weights may be read from: its own safetensors, nothing else; and
what tells the weights of two folders apart.

transformers reads what an index or a configuration names, and unpickles what is no safetensors; so
both are looked at first. Standard library and huggingface_hub only, the latter for repositories.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
#: What else of a folder prompts and answers depend on.
BESIDE = (
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
SAMPLED = 4096  # bytes read at a place of a tensor
#: What an AWQ checkpoint must say of itself to be read here.
AWQ_GROUPS = (32, 64, 128)
AWQ: Mapping[str, Any] = {
    "quant_method": "awq",
    "bits": 4,
    "version": "gemm",
    "zero_point": True,
}


def check_folder(folder: Path, where: str) -> None:
    """Raise ValueError, which begins with `where`, unless a folder's weights are its own
    safetensors."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{where} has no config.json, so it holds no model")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{where} has no .safetensors weights (other formats are refused)")
    for name in (CONFIG, INDEX):
        if (folder / name).is_file():
            _check(folder / name, where)


def check_repository(repo: str, revision: str) -> None:
    """Raise ValueError where a repository's index or configuration names other weights.

    What is not in it, or not in the cache of a machine without network, is not looked at.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    for name in (CONFIG, INDEX):
        try:
            path = huggingface_hub.hf_hub_download(repo, name, revision=revision)
        except EntryNotFoundError:  # in the repository, or in the cache
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"model {repo}: cannot be loaded ({reason})") from error
        _check(Path(path), f"model.repo={repo!r}")


def _check(path: Path, where: str) -> None:
    try:
        read: Any = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} cannot be loaded: {path.name} is no JSON ({error})") from None
    if not isinstance(read, dict):
        raise ValueError(f"{where} cannot be loaded: {path.name} is not a JSON object")
    if path.name == CONFIG:
        named = [read["transformers_weights"]] if "transformers_weights" in read else []
    else:
        shards = read.get("weight_map")
        named = list(shards.values()) if isinstance(shards, dict) else [shards]
    for name in named:
        own = isinstance(name, str) and name.endswith(".safetensors")
        if not own or "/" in name or "\\" in name:
            raise ValueError(
                f"{where}: {path.name} names the weights {name!r}; only its own .safetensors"
                " files are read"
            )


def check_all_read(read_in: Mapping[str, Any], layers: int | None) -> None:
    """Raise ValueError where a model of `layers` layers (None: not known) has weights that its
    files lack, which transformers makes up, or they hold more layers, which it leaves out.

    `read_in` is what from_pretrained says of its loading.
    """
    if missing := sorted(read_in["missing_keys"]):
        raise ValueError(
            f"its configuration asks for {len(missing)} weights that its files lack, such as"
            f" {missing[0]}"
        )
    numbered = ((key, re.search(r"\blayers\.(\d+)\.", key)) for key in read_in["unexpected_keys"])
    more = sorted(key for key, found in numbered if found and layers and int(found[1]) >= layers)
    if more:
        raise ValueError(f"its configuration has {layers} layers, but its files hold {more[0]}")


def fingerprint(folder: Path) -> str:
    """Digest a model's configuration, tokenizer and chat template, and of each weights file the
    header, and the first and the middle bytes of every tensor.

    Training changes a tensor nearly everywhere, so this tells models apart that differ in one,
    without reading gigabytes. A few numbers that were changed by hand it may not see.
    """
    sha = hashlib.sha256()
    for name in BESIDE:
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        sha.update(f"{name} {len(content)} ".encode() + content)
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            length = min(int.from_bytes(file.read(8), "little"), size)
            header = file.read(length)
            sha.update(f"{path.name} {size} ".encode() + header)
            for start in _places(header):
                file.seek(8 + length + start)
                sha.update(file.read(SAMPLED))
    return sha.hexdigest()[:16]


def _places(header: bytes) -> list[int]:
    """Where the tensors of a safetensors header begin, and their middles; none where it is no such
    header, which loading will say."""
    try:
        tensors: dict[str, Any] = json.loads(header)
        spans = [what["data_offsets"] for name, what in tensors.items() if name != "__metadata__"]
        return [place for begin, end in spans for place in (begin, (begin + end) // 2)]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return []


def quantisation(folder: Path) -> Any:
    """What a folder's config.json says of quantisation; None where its weights are full."""
    return json.loads((folder / CONFIG).read_bytes()).get("quantization_config")


def awq_group(said: Any, where: str) -> int:
    """The group size of a checkpoint whose config says so; ValueError, which begins with `where`,
    for what is not read here."""
    if not isinstance(said, Mapping):
        raise ValueError(f"{where}: its config.json has no quantization_config; use full weights")
    for key, wanted in AWQ.items():
        found = said.get(key)
        if (found.lower() if isinstance(found, str) else found) != wanted:
            raise ValueError(
                f"{where}: quantization_config.{key} is {found!r}; only {wanted!r} is read"
            )
    group = said.get("group_size")
    if group not in AWQ_GROUPS:
        choices = ", ".join(map(str, AWQ_GROUPS))
        raise ValueError(
            f"{where}: quantization_config.group_size is {group!r}; choose from {choices}"
        )
    return int(group)
