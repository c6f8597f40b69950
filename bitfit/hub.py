"""What is asked of the Hugging Face Hub: which commit a model is at, and to take one of ours.

What is loaded from it comes through transformers and datasets; tokens, HF_HOME and the like are
those of its client.
"""

import shlex
from pathlib import Path

from utils import NotPushed, UserError, blaming, one_line


def resolve(model_name, revision=None):
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


def find_file(model_name, file, revision=None):
    """The path of a model's file, in its folder or the Hub's cache; None where it has none."""
    if Path(model_name).is_dir():
        path = Path(model_name) / file
        return path if path.exists() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(model_name), file, revision=revision))
    except Exception:  # its client has many classes for: not there, or nobody answers
        return None


def is_cached(model_name):
    """Whether the Hub's cache holds files of a model of that name."""
    from huggingface_hub import constants

    folder = f"models--{str(model_name).replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder).is_dir()


def check_push(name):
    """Ask the Hub who we are, before any work.

    Raises:
        UserError: a push could not succeed: a wrong name, no network, no token, or a wrong one.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.utils import validate_repo_id

    def cannot(why):
        what = "mend that, or give --export-model and `hf upload` the model later"
        return UserError(f"--push-to-hub {name}: {why}; {what}")

    with blaming(lambda error: cannot(one_line(error))):
        validate_repo_id(name)
        token = get_token()
    if token is None:
        raise cannot("there is no token for the Hub (`hf auth login`, or HF_TOKEN)")
    if is_offline_mode():
        raise cannot("the Hub is out of reach, or HF_HUB_OFFLINE is set")
    with blaming(lambda error: cannot(one_line(error))):
        HfApi().whoami()


def push(output, name):
    """Upload the one exported model of a finished output folder; returns a line that says where.

    Raises:
        UserError: there is none.
        NotPushed: it failed.
    """
    from huggingface_hub import HfApi

    found = [path for path in (output / "model", *output.glob("lr*/model")) if path.is_dir()]
    if len(found) != 1:
        raise UserError(f"--push-to-hub: {output} holds {len(found)} exported models, not one")
    try:
        api = HfApi()
        name = api.create_repo(name, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=name, folder_path=found[0], commit_message="Upload a model made by BitFit"
        )
    except Exception as error:  # the network's, the Hub's, the token's
        later = shlex.join(["hf", "upload", name, str(found[0]), "."])
        what = f"the training is finished, all of it is in {output}, but the push failed"
        raise NotPushed(f"{what}: {one_line(error)}; to push it later: {later}") from None
    return f"pushed to {commit.repo_url}"
