"""The Hugging Face hub, asked once and not for long."""

from typing import Literal


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
