"""Folders of Kaggle's models and data sets: attached to the notebook, or fetched by kagglehub.

A handle is `kagglehub:` and the name that Kaggle shows:

    kagglehub:OWNER/MODEL/FRAMEWORK/VARIATION[/VERSION]    a model
    kagglehub:OWNER/DATASET[/versions/VERSION]             a data set

What is attached to the notebook is found without network, in both layouts that Kaggle has used.
Only otherwise is the package kagglehub (extra `[kaggle]`) imported.
"""

import re
from pathlib import Path

from gemma_grpo.errors import UserError, one_line

PREFIX = "kagglehub:"
INPUT = Path("/kaggle/input")  # where a notebook finds what is attached to it

_NAME = r"[A-Za-z0-9][\w.-]*"
_MODEL = re.compile(rf"({_NAME})/({_NAME})/({_NAME})/({_NAME})(?:/(\d+))?")
_DATASET = re.compile(rf"({_NAME})/({_NAME})(?:/versions/(\d+))?")


def model_folder(handle: str) -> Path:
    """The folder of a model's files; the newest version there is where the handle names none.

    Raises:
        UserError: no handle of a model; or it is not attached, and cannot be fetched.
    """
    name = handle.removeprefix(PREFIX)
    if not (match := _MODEL.fullmatch(name)):
        raise UserError(
            f"{handle}: not a Kaggle model; write {PREFIX}OWNER/MODEL/FRAMEWORK/VARIATION, and "
            "/VERSION after it for one version"
        )
    owner, model, framework, variation, version = match.groups()
    below = Path(model, framework, variation)
    places = [INPUT / "models" / owner / below, INPUT / below]
    for place in places:
        if folder := _version(place, version):
            return folder
    return _fetched("model_download", handle, places)


def dataset_folder(handle: str) -> Path:
    """The folder of a data set's files.

    An attached data set does not say its version, nor in the older layout its owner: a handle with
    a version is always left to kagglehub.

    Raises:
        UserError: no handle of a data set; or it is not attached, and cannot be fetched.
    """
    name = handle.removeprefix(PREFIX)
    if not (match := _DATASET.fullmatch(name)):
        raise UserError(
            f"{handle}: not a Kaggle data set; write {PREFIX}OWNER/DATASET, and /versions/VERSION "
            "after it for one version"
        )
    owner, dataset, version = match.groups()
    places = [] if version else [INPUT / "datasets" / owner / dataset, INPUT / dataset]
    for place in places:
        if place.is_dir():
            return place
    return _fetched("dataset_download", handle, places)


def _version(place: Path, version: str | None) -> Path | None:
    """The folder of a version in `place`, the newest without one; None if it is not there."""
    there = {int(f.name): f for f in place.glob("*") if f.name.isdecimal() and f.is_dir()}
    if version is None:
        return there[max(there)] if there else None
    return there.get(int(version))


def _fetched(download: str, handle: str, places: list[Path]) -> Path:
    """What kagglehub's function of that name makes of the handle."""
    looked = f"not attached (looked in {', '.join(map(str, places))})" if places else "not fetched"
    try:
        import kagglehub
    except ImportError:
        raise UserError(
            f"{handle}: {looked}, and the package kagglehub is not installed: attach it to the "
            "notebook, or pip install 'gemma_grpo[kaggle]'"
        ) from None
    try:
        return Path(getattr(kagglehub, download)(handle.removeprefix(PREFIX)))
    except Exception as error:  # no network, no consent to the model's terms, no such name
        raise UserError(
            f"{handle}: {looked}, and kagglehub could not fetch it "
            f"({one_line(str(error) or type(error).__name__, 200)}): attach it to the notebook"
        ) from error
