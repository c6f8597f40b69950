"""Files and commits of models on the Hugging Face Hub, and the use of the cache when offline.

transformers and datasets load models and data. The Hub's client reads the token and HF_HOME.
"""

import os
import socket
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

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
        revision: a tag, a branch or a commit; None: the default branch.

    Raises:
        UserError: a revision of a folder, which has none.
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


def is_cached(model_name: str | Path) -> bool:
    """Return whether the Hub's cache holds files of a model."""
    from huggingface_hub import constants

    folder = f"models--{str(model_name).replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def use_local_copies_when_offline(needs_hub: object = True) -> None:
    """Set HF_HUB_OFFLINE if the Hub is out of reach or not needed, so that clients use their cache.

    Offline, the clients would try each file six times over 20 seconds. So this function tries one
    connection, unless a proxy is used.
    """
    if not needs_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if os.environ.get("HF_HUB_OFFLINE"):
        return
    url, port = endpoint(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if has_proxy(url):
        return
    try:
        socket.create_connection((url.hostname, port), timeout=5).close()
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def endpoint(address: str) -> tuple[SplitResult, int]:
    """Return (parts, port) of the Hub's address.

    Raises:
        UserError: the address is not a URL.
    """
    try:
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError
        return url, url.port or (80 if url.scheme == "http" else 443)
    except ValueError:
        raise UserError(
            f"HF_ENDPOINT {address} is not the address of a Hub: give it as "
            "https://huggingface.co, or unset it"
        ) from None


def has_proxy(url: SplitResult) -> bool:
    """Return whether the environment sets a proxy for a URL, as the Hub's client reads it.

    The client reads ALL_PROXY, HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in capitals or not.
    """
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return bool(proxy) and not proxy_bypass(url.netloc)
