"""Models on disk: where one is, what its weights weigh, and what a token of it takes in a KV cache. Loads none."""

import json
import math
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from twoclocks.errors import TargetError

DTYPE_BYTES = {
    "float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2,
    "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "float8_e4m3fn": 1, "float8_e5m2": 1,
}  # fmt: skip
GB = 1e9
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
"""Kinds of weight files; the first kind that a folder has is the one that is loaded."""


class Model(msgspec.Struct, frozen=True):
    """A model as a server is to be told of it."""

    name: str  # what to give to the server: a path, or a hub id
    folder: Path | None  # None: on the hub, not on this disk
    weights_bytes: int | None  # of its weight files; None where nobody told
    config: dict[str, Any] = {}  # its config.json


def models_folder(cache: Path) -> Path:
    """Where scripts/prepare.py puts models."""
    return cache / "models"


def find_model(asked: str, python: Path, cache: Path, environ: Mapping[str, str] = os.environ) -> Model:
    """A folder, a name in the models' cache, or a hub id, in this order. Raises TargetError, in one line.

    python: of an environment that has huggingface_hub, which is asked about a hub id.
    """
    for folder in (Path(asked).expanduser(), models_folder(cache) / asked):
        if folder.is_dir():
            return read_model(folder.absolute())
    if asked.startswith(("/", ".", "~")) or asked.count("/") > 1:
        raise TargetError(f"target.start.model: no folder at {asked!r}")
    if "/" not in asked:
        made = models_folder(cache)
        there = sorted(path.name for path in made.iterdir() if path.is_dir()) if made.is_dir() else []
        raise TargetError(
            f"target.start.model: {asked!r} is no folder here and not in {made} "
            f"(there: {', '.join(there) or 'nothing'}); `python3 scripts/prepare.py smollm2 tiny` makes the small "
            "ones, a hub id is ORGANISATION/NAME"
        )
    return _on_hub(asked, python, environ)


def read_model(folder: Path) -> Model:
    """The model in a folder. Raises TargetError for a folder without a model, or with half of one."""
    where = f"target.start.model: {folder}"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise TargetError(f"{where} holds no config.json, and so no model that could be served") from None
    except (OSError, ValueError) as error:
        raise TargetError(f"{where}/config.json cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise TargetError(f"{where}/config.json is no object")
    missing = [name for name in _shards(folder) if not (folder / name).is_file()]
    if missing:
        raise TargetError(f"{where} lacks {missing[0]}, which its index names ({len(missing)} missing); fetch it again")
    for pattern in WEIGHTS:
        if found := [path.stat().st_size for path in folder.glob(pattern) if path.is_file()]:
            return Model(str(folder), folder, sum(found), config)
    raise TargetError(f"{where} holds no weights ({', '.join(WEIGHTS)})")


def _shards(folder: Path) -> list[str]:
    """The weight files that an index names; none where there is no index."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        try:
            return sorted(set(json.loads((folder / name).read_bytes())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return []


# Run by the server's own Python: which hub it asks, with which token and which cache is as for the server itself.
_ASK = """
import json, pathlib, sys
from huggingface_hub import HfApi, errors, snapshot_download
told = {}
try:
    folder = pathlib.Path(snapshot_download(sys.argv[1], local_files_only=True))
    if any(file.match(kind) for file in folder.iterdir() for kind in sys.argv[2:]):
        told["folder"] = str(folder)
except Exception:
    pass
if not told:
    try:
        files = HfApi().model_info(sys.argv[1], files_metadata=True, timeout=20).siblings
        told["sizes"] = {file.rfilename: file.size for file in files}
        HfApi().auth_check(sys.argv[1])
    except errors.OfflineModeIsEnabled:
        told["failure"] = "offline"
    except errors.GatedRepoError as error:
        told |= {"failure": "gated", "status": error.response.status_code}
    except errors.RepositoryNotFoundError as error:
        told |= {"failure": "unknown", "status": error.response.status_code}
    except Exception as error:
        told |= {"failure": type(error).__name__ + ": " + str(error)}
print(json.dumps(told))
"""


def _on_hub(asked: str, python: Path, environ: Mapping[str, str]) -> Model:
    """A model of the hub: in its cache on this disk, or as the hub tells of it."""
    where = f"target.start.model: {asked}"
    done = subprocess.run(
        [python, "-c", _ASK, asked, *WEIGHTS], capture_output=True, text=True, check=False, env=dict(environ)
    )
    try:
        told = json.loads(done.stdout)
    except ValueError:
        raise TargetError(
            f"{where}: {python} cannot ask the hub ({' '.join(done.stderr.split())[-200:]}); give a folder"
        ) from None
    if folder := told.get("folder"):
        found = read_model(Path(folder))
        return Model(asked, found.folder, found.weights_bytes, found.config)
    status, failure = told.get("status"), told.get("failure")
    if failure == "offline":
        raise TargetError(f"{where} is not in the hub's cache, and HF_HUB_OFFLINE forbids to fetch it; give a folder")
    if failure == "gated":
        raise TargetError(
            f"{where} is gated (the hub answered {status}); accept its licence on its page and set HF_TOKEN"
        )
    if failure == "unknown":
        raise TargetError(
            f"{where}: the hub does not show such a model (it answered {status}); mend the name, or set HF_TOKEN if "
            "the model is private"
        )
    if failure:
        raise TargetError(
            f"{where} is not in the hub's cache, and the hub could not be asked ({' '.join(failure.split())[:200]})"
        )
    sizes: dict[str, int | None] = told["sizes"]
    for pattern in WEIGHTS:
        if found_sizes := [size for name, size in sizes.items() if Path(name).match(pattern) and "/" not in name]:
            return Model(asked, None, sum(size or 0 for size in found_sizes))
    return Model(asked, None, None)


def dtype_bytes(name: str | None, config: Mapping[str, Any]) -> int | None:
    """Bytes of a number of a dtype; of the model's own for ``auto`` and None. None where it is not known."""
    if name in (None, "auto"):
        inner = _text(config)
        name = str(inner.get("dtype") or inner.get("torch_dtype") or "")
    return DTYPE_BYTES.get(str(name).removeprefix("torch."))


def weights_in_memory(model: Model, dtype: str | None) -> int | None:
    """About what the weights take once they are loaded as this dtype, in bytes; quantised ones stay as they are."""
    if model.weights_bytes is None or "quantization_config" in model.config or not model.config:
        return model.weights_bytes
    stored, loaded = dtype_bytes("auto", model.config), dtype_bytes(dtype, model.config)
    return model.weights_bytes if stored is None or loaded is None else model.weights_bytes * loaded // stored


def kv_bytes_per_token(config: Mapping[str, Any], cache_dtype: str | None) -> int | None:
    """2 (K and V) x layers x KV heads x head size x bytes of a number.

    None where that is not all: latent attention (MLA), layers of several kinds, or a config that does not tell.
    """
    inner = _text(config)
    kinds = set(inner.get("layer_types") or ["full_attention"])
    if inner.get("kv_lora_rank") or kinds != {"full_attention"} or "num_hidden_layers" not in inner:
        return None
    try:
        heads = int(inner["num_attention_heads"])
        kv_heads = int(inner.get("num_key_value_heads") or heads)
        size = int(inner.get("head_dim") or math.floor(inner["hidden_size"] / heads))
        number = dtype_bytes(cache_dtype, config)
        return None if number is None else 2 * int(inner["num_hidden_layers"]) * kv_heads * size * number
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that tells of the language model."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config
