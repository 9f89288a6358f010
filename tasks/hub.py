"""The Hugging Face hub, asked once and not for long."""

import re
from pathlib import Path
from typing import Any, Literal


def reach(kind: Literal["model", "dataset"], name: str) -> None:
    """Find out at once whether the hub answers; where it does not, only its cache is used.

    Without this a download asks six times with growing pauses, 23 s in all.

    Args:
        kind, name: the repository that is to be read.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return
    api = HfApi()
    try:
        (api.model_info if kind == "model" else api.dataset_info)(name, timeout=5)
    except Exception as error:
        if getattr(error, "response", None) is not None:
            return  # an answer, if not the one wished for: the hub is there
        constants.HF_HUB_OFFLINE = True


def reason(error: Exception) -> str:
    """Why the hub did not give something, in one line of at most 160 characters."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub does not answer, and its cache lacks it"
    return " ".join(str(error).split())[:160]


def snapshot(name: str, revision: str | None = None) -> tuple[Path, str]:
    """The files of a data set, downloaded unless its cache has them, and their commit.

    Args:
        name: of the repository. revision: a commit, branch or tag; None: the newest, or where the
            hub does not answer the one that its cache has.

    Raises what huggingface_hub raises where there is no such data set, or none to be had.
    """
    from huggingface_hub import constants, snapshot_download

    reach("dataset", name)
    folder = Path(
        snapshot_download(
            name,
            repo_type="dataset",
            revision=revision,
            local_files_only=constants.HF_HUB_OFFLINE,
        )
    )
    return folder, folder.name  # the cache names the folder by the commit


def commit(name: str, revision: str | None = None) -> str | None:
    """The commit of a data set that `revision` (None: the newest) names; None: no answer."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None
    try:
        sha = HfApi().dataset_info(name, revision=revision, timeout=5).sha
    except Exception:  # whatever is wrong, loading the data set tells it
        return None
    return None if sha is None else str(sha)


def loaded_commit(dataset: Any) -> str | None:
    """The commit that a datasets.Dataset came from, by its place in the cache; None: not there."""
    files = [Path(file["filename"]) for file in getattr(dataset, "cache_files", [])]
    names = {file.parent.name for file in files}
    return names.pop() if len(names) == 1 and is_commit(files[0].parent.name) else None


def is_commit(name: str) -> bool:
    """Whether `name` is a whole commit."""
    return re.fullmatch("[0-9a-f]{40}", name) is not None
