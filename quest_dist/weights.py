"""Weights: which files a model's weights may be read from: its own safetensors, nothing else.

transformers reads what an index or a configuration names, and unpickles what is no safetensors; so
both are looked at first. Standard library and huggingface_hub only, the latter for repositories.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
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
