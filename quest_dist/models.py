"""Models: a configured name becomes a loaded model with its tokenizer, limits and prompt format.

Three sources: `bundled` (weights inside an installed package), `hub` (repository and revision) and
`local` (a folder). Weights are read from safetensors only and no code of a repository is ever run.

Importing this module imports neither torch nor transformers: `check` and `identity` answer in the
driver, and only `load`, in a worker, pays for the libraries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quest_dist import artefacts, bundled, weights
from quest_dist.spec import digest
from quest_dist.suggest import did_you_mean
from quest_dist.tasks.prompt import CHAT_CHOICES, Language, chat_format

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SOURCES = ("bundled", "hub", "local")
DTYPES = ("bfloat16", "float32", "float16")
#: How a decoder's linear layers are held: as stored, in `dtype`; in 4 bits, rounded to the nearest
#: or after activation-aware scaling; as an AWQ checkpoint stores them in 4 bits.
WEIGHT_FORMATS = ("full", "rtn4", "awq4", "stored4")
AWQ = {"group": 128}
KEYS = {
    "source": "bundled",
    "repo": None,
    "revision": "main",
    "path": None,
    "dtype": "bfloat16",
    "chat": "none",
    "bos": None,
    "eos": None,
    "max_length": None,
    "max_prompt": None,
    "weight_format": "full",
}
"""The settings of a model and their defaults; `label` and `shape` are for people and planning."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, on its device, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    language: Language
    device: torch.device
    identity: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class UnloadedModel:
    """What is known of a model without its weights: enough to time its shape.

    `language` has no tokenizer; its `max_length` is the model's, which a time may exceed.
    """

    label: str
    shape: Mapping[str, Any]
    dtype: torch.dtype
    language: Language
    device: torch.device
    weight_bits: int = 16


def _read(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with defaults; ValueError names a wrong key or value and the choices."""
    for key in settings:
        if key not in KEYS and key not in ("label", "shape", "about"):
            raise ValueError(f"model.{key}: no such setting; {did_you_mean(key, KEYS)}")
    read = {key: settings.get(key, default) for key, default in KEYS.items()}
    for key, choices in (
        ("source", SOURCES),
        ("dtype", DTYPES),
        ("weight_format", WEIGHT_FORMATS),
    ):
        if read[key] not in choices:
            raise ValueError(f"model.{key}={read[key]!r}: {did_you_mean(read[key], choices)}")
    if not isinstance(read["chat"], Mapping) and read["chat"] not in CHAT_CHOICES:
        raise ValueError(f"model.chat={read['chat']!r}: {did_you_mean(read['chat'], CHAT_CHOICES)}")
    for key in ("max_length", "max_prompt"):
        if read[key] is not None and (not isinstance(read[key], int) or read[key] < 2):
            raise ValueError(f"model.{key}={read[key]!r} is not a whole number of at least 2")
    if read["bos"] not in (None, True, False):
        raise ValueError(
            f"model.bos={read['bos']!r} is not true, false or null (as the tokenizer does)"
        )
    eos = read["eos"]
    if eos is not None and not (eos and isinstance(eos, list) and all(map(_is_id, eos))):
        raise ValueError(
            f"model.eos={eos!r} is not a list of token ids or null (all that the model names)"
        )
    if read["source"] == "hub" and not read["repo"]:
        raise ValueError("model.repo is empty; a hub model needs owner/name")
    if read["source"] == "local" and not read["path"]:
        raise ValueError("model.path is empty; a local model needs its folder")
    if read["source"] == "bundled" and read["weight_format"] == "stored4":
        raise ValueError(
            "model.weight_format='stored4': the bundled model is stored in full; choose full, rtn4"
            " or awq4"
        )
    return read


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _local(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ValueError(f"model.path={path!r} is not a folder")
    weights.check_folder(folder, f"model.path={path!r}")
    return folder


def check(settings: Mapping[str, Any], device: str = "cpu") -> None:
    """Raise ValueError for whatever can be known to be wrong without loading anything."""
    read = _read(settings)
    if read["dtype"] == "float16" and device == "cpu":
        raise ValueError(
            "model.dtype='float16' runs on a GPU only: set cluster.device=cuda, or bfloat16"
        )
    if read["source"] == "bundled":
        bundled.weights()
    elif read["source"] == "local":
        _check_format(_local(read["path"]), read["weight_format"])


def _check_format(folder: Path, chosen: str) -> None:
    """Raise ValueError where a folder's weights are not stored as `weight_format` says."""
    said, where = weights.quantisation(folder), f"model.weight_format={chosen!r}, {str(folder)!r}"
    if chosen == "stored4":
        weights.awq_group(said, where)
    elif said is not None:
        raise ValueError(f"{where}: its weights are quantised already; choose stored4")


def identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a model can change a score: its weights by content and how prompts are made.

    Paths are left out: the same weights in another folder are the same model.
    """
    read = _read(settings)
    kept = {
        key: read[key] for key in ("source", "dtype", "chat", "bos", "max_length", "max_prompt")
    }
    if read["eos"] is not None:
        kept["eos"] = sorted(set(read["eos"]))
    if read["weight_format"] != "full":
        kept["weight_format"] = read["weight_format"]
    if read["weight_format"] == "awq4":
        full = identity({**settings, "weight_format": "full"})
        text = artefacts.text_digest(artefacts.bundled_text())
        kept["scales"] = digest(artefacts.recipe("awq", AWQ, full, text))
    if read["source"] == "bundled":
        return {**kept, "weights": bundled.content(), "recipe": bundled.RECIPE}
    if read["source"] == "hub":
        return {**kept, "repo": read["repo"], "revision": read["revision"]}
    return {**kept, "weights": weights.fingerprint(_local(read["path"]))}


def shape_identity(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what of a model can change a time where no weights are loaded: its shape and dtype.

    Raises ValueError for a model whose settings state no shape.
    """
    read = _read(settings)
    if not settings.get("shape"):
        raise ValueError("model.shape is not set: without it there is nothing to time")
    bits = {} if read["weight_format"] == "full" else {"weight_bits": 4}
    return {"sizes": dict(settings["shape"]), "dtype": read["dtype"], **bits}


def unloaded(settings: Mapping[str, Any], device: str = "cpu") -> UnloadedModel:
    """Return a configured model without its weights, to be timed on `device`.

    Raises ValueError as `load` does, and for a model that states no shape.
    """
    import torch

    from quest_dist.arguments import check_device

    found = shape_identity(settings)
    shape, dtype = found["sizes"], found["dtype"]
    placed = place(device)
    check_device(f"model.dtype={dtype}", placed, getattr(torch, dtype))
    limit = settings.get("max_length") or int(shape["max_length"])
    language = Language(None, head="", foot="", max_length=limit, eos_ids=frozenset())
    label = str(settings.get("label", "model"))
    bits = int(found.get("weight_bits", 16))
    return UnloadedModel(label, shape, getattr(torch, dtype), language, placed, bits)


def load(settings: Mapping[str, Any], device: str = "cpu") -> LoadedModel:
    """Load a configured model onto `device`: cpu, or cuda for this process's first GPU.

    Raises ValueError for what cannot be loaded or no GPU to load it to, ImportError where the
    kernels of the device are not built.
    """
    import torch
    import transformers
    from safetensors import SafetensorError

    from quest_dist import linear4
    from quest_dist.arguments import check_device

    read = _read(settings)
    where: str | Path
    extra: dict[str, Any] = {}
    if read["source"] == "bundled":
        where = bundled.folder()
    elif read["source"] == "local":
        where = _local(read["path"])
    else:
        where, extra = read["repo"], {"revision": read["revision"]}
        weights.check_repository(read["repo"], read["revision"])
    placed, dtype = place(device), getattr(torch, read["dtype"])
    check_device(f"model.dtype={read['dtype']}", placed, dtype)
    # Bars of a hundred weights say nothing in a worker, and cover the sweep's own.
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, trust_remote_code=False, **extra
        )
        model: Any
        auto: Any = transformers.AutoModelForCausalLM
        if read["weight_format"] == "stored4":
            model = _stored4(read, where, extra, dtype)
        else:
            model, read_in = auto.from_pretrained(
                where,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **extra,
            )
            layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
            weights.check_all_read(read_in, layers)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"model {read['repo'] or where}: cannot be loaded ({reason})") from error
    if read["weight_format"] == "rtn4":
        linear4.round_to_nearest(model)
    model = model.to(placed).eval().requires_grad_(False)
    spoken = language(read, tokenizer, model)
    if read["weight_format"] == "awq4":
        full = identity({**settings, "weight_format": "full"})
        made = artefacts.made(LoadedModel(model, tokenizer, spoken, placed, full), "awq", AWQ)
        artefacts.calibrator("awq").apply(model, artefacts.read(made))
    return LoadedModel(model, tokenizer, spoken, placed, identity(settings))


def _stored4(
    read: Mapping[str, Any], where: str | Path, extra: Mapping[str, Any], dtype: torch.dtype
) -> PreTrainedModel:
    """A model with the 4-bit weights of a local or downloaded AWQ checkpoint, on the CPU."""
    import huggingface_hub
    import torch
    import transformers

    from quest_dist import awq_files

    if read["source"] == "hub":
        wanted = ["*.json", "*.safetensors"]
        where = huggingface_hub.snapshot_download(str(where), allow_patterns=wanted, **extra)
    folder = Path(where)
    group = weights.awq_group(weights.quantisation(folder), "model.weight_format='stored4'")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=dtype)
    awq_files.fill(model, folder, group, dtype)
    made: PreTrainedModel = model
    return made


def random(
    sizes: Mapping[str, Any], dtype: torch.dtype, device: torch.device, weight_bits: int = 16
) -> PreTrainedModel:
    """A Llama with seeded random weights, rounded to the nearest if they are to have 4 bits;
    `sizes` are fields of transformers' LlamaConfig."""
    import torch
    import transformers

    from quest_dist import linear4

    torch.manual_seed(0)
    auto: Any = transformers.AutoModelForCausalLM
    with device:
        config = transformers.LlamaConfig(**sizes)
        model = auto.from_config(config, dtype=dtype)
    if weight_bits == 4:
        linear4.round_to_nearest(model)
    made: PreTrainedModel = model.to(device).eval().requires_grad_(False)
    return made


def place(device: str) -> torch.device:
    """The torch device of a name: cpu or cuda; ValueError where torch finds no GPU."""
    import torch

    if device != "cuda":
        return torch.device(device)
    if not torch.cuda.is_available():
        raise ValueError(f"device cuda: torch {torch.__version__} finds no GPU in this process")
    return torch.device("cuda", torch.cuda.current_device())


def language(read: Mapping[str, Any], tokenizer: Any, model: Any) -> Language:
    """Return how prompts are made for a model: chat format, BOS, end tokens and limits."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} reports no character offsets, which splitting a "
            "prompt needs; install the package tokenizers' version of it"
        )
    head, foot = chat_format(read["chat"], tokenizer)
    limit = read["max_length"] or int(model.config.get_text_config().max_position_embeddings)
    adds = tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [tokenizer.bos_token_id]
    wanted = read["bos"] if read["bos"] is not None else adds
    if wanted and tokenizer.bos_token_id is None:
        raise ValueError("model.bos=true but this model's tokenizer has no BOS token")
    return Language(
        tokenizer=tokenizer,
        head=head,
        foot=foot,
        max_length=limit,
        eos_ids=frozenset(read["eos"] or end_tokens(tokenizer, model)),
        bos=tokenizer.bos_token_id if wanted else None,
        max_prompt=read["max_prompt"],
    )


def end_tokens(tokenizer: Any, model: Any) -> frozenset[int]:
    """Return every id that ends an answer: tokenizer's, configuration's and generation defaults'.

    Models with several (Llama 3.1 has three) run on into junk where only one is honoured.
    """
    found: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for owner in (tokenizer, model.config, generation):
        ids = getattr(owner, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    if not found:
        raise ValueError("neither tokenizer nor model names an end-of-sequence token")
    return frozenset(found)
