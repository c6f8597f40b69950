"""Check the files of a model's folder, and explain why a model cannot be loaded.

A file that would give wrong results raises a `UserError` with a message of one line.
"""

import importlib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from bitfit.data.readers import POINTER
from bitfit.model import hub
from utils import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LOGGER = logging.getLogger("bitfit")
VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
JSON_FILES = (
    "config.json", "tokenizer_config.json", "tokenizer.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "model.safetensors.index.json",
)  # fmt: skip
CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; "
    "w = {k: v for f in glob.glob('pytorch_model*.bin') "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors', "
    "{'format': 'pt'})"
)


def cannot_load(
    model_name: str | Path, error: BaseException, revision: str | None = None
) -> UserError:
    """Return the `UserError` for an exception of transformers about a model."""
    if isinstance(error, UserError):
        return error
    name, message = str(model_name), str(error)
    local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not hub.is_local(name) and (local or ("/" in name and Path(name).parent.is_dir())):
        return UserError(f"there is no model folder {name}: check --model-name")
    name += f" at revision {revision}" if revision else ""
    if "trust_remote_code" in message:
        return UserError(
            f"cannot load the model {name}: it needs code in its folder (auto_map), but custom "
            "code is not supported: none was run; give another --model-name"
        )
    if ("sentencepiece" in message or "tiktoken" in message) and lacks_sentencepiece():
        return UserError(
            f"cannot load the model {name}: it has no tokenizer.json, and the packages that make "
            "one of spm.model are missing: pip install sentencepiece protobuf"
        )
    folder = Path(model_name)
    if "merges" in message and (folder / "vocab.json").exists() > (folder / "merges.txt").exists():
        return UserError(
            f"cannot load the model {name}: merges.txt, without which vocab.json cannot be used, "
            "is missing: fetch it"
        )
    if "does not appear to have a file named" in message and not hub.is_local(model_name):
        place = f"in the folder that `hf download {model_name} --local-dir <folder>` makes"
        return UserError(f"cannot load the model {name}: {first_line(error)}: {unconverted(place)}")
    if problem := broken_file(Path(model_name), error):
        return UserError(f"cannot load the model {name}: {problem}")
    return UserError(
        f"cannot load the model {name}: {reason(error)}; give a name on the Hub (network "
        "or cache needed) or a folder with config.json, model.safetensors and tokenizer files: "
        "--model-name <folder>"
    )


def lacks_sentencepiece() -> bool:
    """Return whether a package that converts spm.model files is not installed."""
    try:
        for module in ("sentencepiece", "google.protobuf"):
            importlib.import_module(module)
    except ImportError:
        return True
    return False


def reason(error: BaseException) -> str:
    """Return an error's message as one line, with the class if the text alone is no sentence."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, (OSError, ValueError, ImportError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def broken_file(folder: Path, error: BaseException) -> str | None:
    """Return a message about the file of a model folder that made loading fail, or None."""
    for path in (folder / name for name in JSON_FILES if (folder / name).exists()):
        try:
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("it holds no object")
        except OSError as problem:  # a folder of that name, or no permission
            return f"{path.name} cannot be read ({problem.strerror}): fetch or save it again"
        except (ValueError, RecursionError) as problem:
            return f"{path.name} is not JSON ({first_line(problem)}): fetch or save it again"
    if "safetensors" not in f"{type(error)} {error}".lower():
        return None
    weights = sorted(folder.glob("model*.safetensors"))
    for path in weights:
        if damage := unreadable(path):
            return f"{path.name} is cut off or damaged ({damage}): fetch or save it again"
    if not weights and any(folder.glob("pytorch_model*.bin")):
        return f"there is no model.safetensors in it, and {unconverted(f'in {folder}')}"
    missing = missing_shards(folder)
    if missing:
        return f"{missing[0]} is missing, which model.safetensors.index.json names: fetch it"
    return None if weights else "there is no model.safetensors in it: fetch it, or save the model"


def unconverted(place: str) -> str:
    """Return why pickled weights are not read, and how to convert them."""
    problem = (
        "pickled weights (pytorch_model.bin) are not read, as they can hold code: convert them"
    )
    return f'{problem} {place} with python -c "{CONVERT}"'


def unreadable(path: Path) -> str | None:
    """Return why a safetensors file cannot be read, or None."""
    try:
        with safe_open(path, framework="pt"):
            return None
    except Exception as error:  # an OSError or an error of safetensors
        return first_line(error)


def missing_shards(folder: Path) -> list[str]:
    """Return the names of weight files that the index names and the folder lacks."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    shards = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
    return sorted(shard for shard in shards if not (folder / shard).exists())


def check_files(model_name: str | Path, revision: str | None = None) -> None:
    """Check for files that transformers would silently ignore or misread.

    Raises:
        UserError: a folder has no config.json, git-lfs pointers, or an adapter of peft.
    """
    folder = Path(model_name)
    if hub.is_local(folder) and not (folder / "config.json").exists() and not is_adapter(folder):
        hides = "; it hides a model of that name on the Hub" * could_be_on_the_hub(model_name)
        raise UserError(
            f"cannot load the model {folder}: the folder {folder.absolute()} has no "
            f"config.json{hides}: give another --model-name, or start the command in another folder"
        )
    if hub.find_file(model_name, "adapter_config.json", revision):
        raise UserError(
            f"cannot load the model {model_name}: the folder has an adapter of peft "
            "(adapter_config.json), which would not be applied: save the model that "
            "`merge_and_unload()` gives, or remove the adapter's files"
        )
    if hub.is_local(folder):
        check_pointers(folder)


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()


def check_pointers(folder: Path) -> None:
    """Check that files are not git-lfs pointers.

    Raises:
        UserError: the folder was cloned without git-lfs.
    """
    has_tokenizer = (folder / "tokenizer.json").exists()  # then no other vocabulary is read
    patterns = ["*.json", "model*.safetensors", *([] if has_tokenizer else ["*.txt", "*.model"])]
    for path in sorted(path for pattern in patterns for path in folder.glob(pattern)):
        with open(path, "rb") as file:
            if file.read(len(POINTER)) == POINTER:
                raise UserError(
                    f"cannot load the model {folder}: {path.name} is a git-lfs pointer, not the "
                    "file: run `git lfs pull` there"
                )


def could_be_on_the_hub(model_name: str | Path) -> bool:
    """Return whether a folder's name could also be the name of a model on the Hub."""
    name = str(model_name)
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name)) and name.count("/") < 2


def warn_of_shadow(model_name: str | Path) -> None:
    """Log a warning if a folder is used whose name could mean a model on the Hub."""
    if not hub.is_local(model_name) or not could_be_on_the_hub(model_name):
        return
    if hub.is_cached(model_name) or "/" not in str(model_name):
        LOGGER.warning(
            "--model-name %s is the folder of that name here, not a model on the Hub "
            "(./%s says so)", model_name, model_name,
        )  # fmt: skip


def check_config(config: "PreTrainedConfig", raw: dict[str, Any], model_name: str | Path) -> None:
    """Check that a model has layers and is not quantized.

    Args:
        raw: the dictionary in config.json.

    Raises:
        UserError: the model has no layers, or is quantized.
    """
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise UserError(
            f"cannot load the model {model_name}: its config.json gives it {layers} layers "
            "(num_hidden_layers): give at least 1"
        )
    if isinstance(raw.get("quantization_config"), dict):
        raise UserError(
            f"cannot load the model {model_name}: its weights are quantized "
            "(quantization_config): give the float model"
        )
