"""Find the rows in a folder that `save_to_disk` of Hugging Face datasets wrote."""

from __future__ import annotations

from pathlib import Path

from qlora_cli.common.untrusted_files import read_object
from qlora_cli.errors import DataError

_SPLITS, _STATE = "dataset_dict.json", "state.json"


def saved_files(folder: Path) -> list[Path] | None:
    """Return the files of a saved `Dataset` in order; None if the folder is something else.

    The `cache-*.arrow` files that the library datasets keeps in the same folder are not rows.

    Raises:
        DataError: it is a `DatasetDict`, which has several splits; or it is damaged.
    """
    if (folder / _SPLITS).is_file():
        splits = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        first = "train" if "train" in splits or not splits else splits[0]
        raise DataError(
            f"{folder}: a DatasetDict of datasets (save_to_disk), with the splits "
            f"{', '.join(splits) or '(none)'}",
            hint=f"name the folder of one split: {folder / first}",
        )
    found = sorted(folder.glob("data-*-of-*.arrow"))
    has_state = (folder / _STATE).is_file()
    if not found or not (has_state or (folder / "dataset_info.json").is_file()):
        return None
    if not has_state:
        return found
    try:
        names = [entry["filename"] for entry in read_object(folder / _STATE)["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{folder / _STATE}: does not name the files of a saved dataset: {error!r}"
        ) from error
    files = [folder / Path(str(name)).name for name in names]
    if missing := [file.name for file in files if not file.is_file()]:
        raise DataError(
            f"{folder}: {missing[0]} is missing, which {_STATE} names; was it copied whole?"
        )
    return files
