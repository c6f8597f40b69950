"""What is asked of the Hugging Face Hub: which commit a model is at, and to take one of ours.

What is loaded from it comes through transformers and datasets; tokens, HF_HOME and the like are
those of its client.
"""

import os
import socket
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from utils import UserError


def resolve_revision(
    model_name: str | Path, revision: str | None = None
) -> tuple[str | None, str | None]:
    """Which state of a model on the Hub: (what its loaders take as `revision`, the commit's hash).

    One answer for all of a model's files, so that they are of one commit even where a branch moves
    meanwhile. Offline the Hub's cache answers. Both are None for a folder. Where the commit cannot
    be found, the hash alone is None, and the loaders say why.

    Args:
        revision: a tag, a branch or a commit; None: the default branch.

    Raises:
        UserError: a folder has no revisions.
    """
    if Path(model_name).is_dir():
        if revision is not None:
            what = f"--model-revision {revision}: {model_name} is a folder, which has no revisions"
            raise UserError(f"{what}: leave the flag out, or give a name on the Hub")
        return None, None
    config = find_file(model_name, "config.json", revision)
    if config is None:  # no such model or revision, no network: loading fails with a message
        return revision, None
    commit = config.parent.name  # the cache keeps the files of a commit in a folder of that name
    return commit, commit


def find_file(model_name: str | Path, file: str, revision: str | None = None) -> Path | None:
    """The path of a model's file, in its folder or the Hub's cache; None where it has none."""
    if Path(model_name).is_dir():
        path = Path(model_name) / file
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(model_name), file, revision=revision))
    except Exception:  # its client has many classes for: not there, or nobody answers
        return None


def is_cached(model_name: str | Path) -> bool:
    """Whether the Hub's cache holds files of a model of that name."""
    from huggingface_hub import constants

    folder = f"models--{str(model_name).replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def use_local_copies_when_offline(needs_hub: object = True) -> None:
    """Tell the Hub's clients to use their cache when the Hub is out of reach or not needed.

    They would ask for every file six times over 20 seconds; one connection tells as much. What
    goes through a proxy is not tried.
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
    """(the parts of the Hub's address, its port); UserError where it is no URL."""
    try:
        url = urlsplit(address)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError
        return url, url.port or (80 if url.scheme == "http" else 443)
    except ValueError:
        what = f"HF_ENDPOINT {address} is not the address of a Hub"
        raise UserError(f"{what}: give it as https://huggingface.co, or unset it") from None


def has_proxy(url: SplitResult) -> bool:
    """Whether the environment gives a proxy for a URL, as for the Hub's client.

    ALL_PROXY, HTTPS_PROXY, HTTP_PROXY and NO_PROXY, in capitals or not.
    """
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    there = proxies.get(url.scheme) or proxies.get("all")
    return bool(there) and not proxy_bypass(url.netloc)
