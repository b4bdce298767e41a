"""Where a model lies on this machine; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError


def model_folder(path: str, revision: str | None) -> Path | None:
    """The folder of a model: itself, or that of an id in the local Hugging Face cache; None where it is neither.

    Args:
        path: folder, ``~`` allowed, or id. revision: of an id.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (HFValidationError, LocalEntryNotFoundError):
        return None
