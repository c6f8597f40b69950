"""Files and commits of models on the Hugging Face Hub, and the use of the cache when offline.

transformers and datasets load models and data. The Hub's client reads the token and HF_HOME.
"""

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from utils import UserError


def is_local(model_name: str | Path) -> bool:
    """Return whether a model's name is an existing folder, which hides the Hub's model."""
    return Path(model_name).is_dir()


def resolve_revision(
    model_name: str | Path, revision: str | None = None
) -> tuple[str | None, str | None]:
    """Return (the `revision` for loaders, the commit's hash) of a model on the Hub.

    All files of a model are then of one commit, even if a branch moves in the meantime. Offline
    the Hub's cache is read. Both are None for a folder. If the commit cannot be found, the hash is
    None, and loading fails with a message.

    Args:
        revision: a tag, a branch or a commit; None: the default branch. UserError for a folder's.
    """
    if is_local(model_name):
        if revision is not None:
            raise UserError(
                f"--model-revision {revision}: {model_name} is a folder, which has no revisions: "
                "leave the flag out, or give a name on the Hub"
            )
        return None, None
    config = find_file(model_name, "config.json", revision)
    if config is None:  # no such model or revision, no network: loading fails with a message
        return revision, None
    commit = config.parent.name  # the cache keeps the files of a commit in a folder of that name
    return commit, commit


def find_file(model_name: str | Path, file: str, revision: str | None = None) -> Path | None:
    """Return the path of a model's file, in its folder or the Hub's cache, or None."""
    if is_local(model_name):
        path = Path(model_name) / file
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(model_name), file, revision=revision))
    except Exception:  # the client has many classes for a missing file or no connection
        return None


def use_local_copies_when_offline(needs_hub: object = True) -> None:
    """Set HF_HUB_OFFLINE if the Hub is out of reach or not needed, so that clients use their cache.

    Offline, the clients would try each file six times over 20 seconds. So this function tries one
    connection, unless a proxy is set.
    """
    from urllib.request import getproxies

    if not needs_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if os.environ.get("HF_HUB_OFFLINE") or getproxies().keys() & {"http", "https", "all"}:
        return
    try:
        url = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
        socket.create_connection((url.hostname, url.port or url.scheme), timeout=5).close()
    except (OSError, ValueError):
        os.environ["HF_HUB_OFFLINE"] = "1"
