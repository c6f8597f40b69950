"""Uploads of models to the Hugging Face Hub."""

import shlex
from pathlib import Path

from utils import NotPushed, UserError, convert_errors, first_line


def check_push(name: str) -> None:
    """Check name, network and token of an upload, before any work; UserError if it would fail."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    flag = f"--push-to-hub {name}"
    advice = "correct that, or give --export-model and `hf upload` the model later"
    with convert_errors(lambda error: UserError(f"{flag}: {first_line(error)}; {advice}")):
        validate_repo_id(name)
        HfApi().whoami()


def push_model(output: Path, name: str) -> str:
    """Upload the exported model of a finished output folder, and return a line with the address.

    Raise a UserError unless the folder has one exported model, NotPushed if the upload fails.
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
    except Exception as error:  # of the network, the Hub or the token
        later = shlex.join(["hf", "upload", name, str(found[0]), "."])
        message = f"the training is finished, all of it is in {output}, but the push failed"
        raise NotPushed(f"{message}: {first_line(error)}; to push it later: {later}") from None
    return f"pushed to {commit.repo_url}"
