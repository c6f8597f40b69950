"""Check the files of a model's folder, and explain why a model cannot be loaded.

A file that would give wrong results raises a `UserError` with a message of one line.
"""

import json
import re
from contextlib import AbstractContextManager
from pathlib import Path

from safetensors import safe_open

from bitfit.data.readers import check_no_lfs_pointer
from bitfit.model import hub
from utils import UserError, convert_errors

VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
CONVERT = (
    "import glob, torch; from safetensors.torch import save_file; "
    "w = {k: v for f in glob.glob('pytorch_model*.bin') "
    "for k, v in torch.load(f, map_location='cpu', weights_only=True).items()}; "
    "save_file({k: v.clone().contiguous() for k, v in w.items()}, 'model.safetensors', "
    "{'format': 'pt'})"
)


def convert_load_errors(
    model_name: str | Path, revision: str | None = None
) -> AbstractContextManager[None]:
    """Raise `cannot_load` for exceptions of other code in the context."""
    return convert_errors(lambda error: cannot_load(model_name, error, revision))


def cannot_load(
    model_name: str | Path, error: BaseException, revision: str | None = None
) -> UserError:
    """Return the `UserError` for an exception of transformers about a model."""
    if isinstance(error, UserError):
        return error
    name, problem = str(model_name), reason(error)
    if not hub.is_local(name) and re.fullmatch("[./~].*|.*/.*/.*|.*/", name):
        return UserError(f"there is no model folder {name}: check --model-name")
    name += f" at revision {revision}" if revision else ""
    advice = (
        "give a name on the Hub (network or cache needed) or a folder with config.json, "
        "model.safetensors and tokenizer files: --model-name <folder>"
    )
    pickled = not hub.is_local(model_name) or any(Path(model_name).glob("pytorch_model*.bin"))
    if "trust_remote_code" in str(error):
        problem = "it needs code in its folder (auto_map), but custom code is not supported"
        advice = "none was run: give another --model-name"
    elif pickled and re.search("file named .*safetensors", problem):
        advice = (
            "pickled weights (pytorch_model.bin) are not read, as they can hold code: convert them "
            f'in the model\'s folder (of `hf download`) with python -c "{CONVERT}"'
        )
    elif file_name := broken_file(Path(model_name)):
        advice = f"{file_name} is cut off or damaged: fetch or save it again"
    return UserError(f"cannot load the model {name}: {problem}; {advice}")


def reason(error: BaseException) -> str:
    """Return an error's message as one line, with the class if the text alone is no sentence."""
    lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    plain = isinstance(error, (OSError, ValueError, ImportError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def broken_file(folder: Path) -> str | None:
    """Return the name of a JSON or safetensors file of a folder that cannot be read, or None."""
    for path in [*folder.glob("*.json"), *folder.glob("model*.safetensors")]:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, framework="pt"):
                    pass
        except Exception:  # of the file system, of json or of safetensors
            return path.name
    return None


def check_files(model_name: str | Path, revision: str | None = None) -> None:
    """Raise a UserError for files that transformers would silently ignore or misread."""
    if hub.find_file(model_name, "adapter_config.json", revision):
        raise UserError(
            f"cannot load the model {model_name}: the folder has an adapter of peft "
            "(adapter_config.json), which would not be applied: save the model that "
            "`merge_and_unload()` gives, or remove the adapter's files"
        )
    folder = Path(model_name)
    if hub.is_local(folder) and not (folder / "config.json").exists():
        raise UserError(
            f"cannot load the model {folder}: the folder {folder.absolute()} has no config.json: "
            "give another --model-name, or start the command in another folder"
        )
    for path in sorted(folder.glob("*")) if hub.is_local(folder) else ():
        if path.suffix in (".json", ".safetensors", ".txt", ".model"):
            check_no_lfs_pointer(path)
