"""What is known of the quality of the models that ran: perplexities stored beside the results."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .agreement import has_random_weights, is_quantized
from .results import Result, load_folder, lookup, model_label

FOLDER = "perplexity"
"""Under a folder of results: files of `python -m m7_gptq perplexity --output FILE`, each of one
text and one way to cut it, with any number of models."""
KEY = "perplexities"
"""In a result that was loaded for a table: name of such a file -> its entry for the row's model."""


def load_table(folder: Path) -> list[Result]:
    """The results of one device and workload, with what is stored of their models' quality."""
    files = sorted((folder.parents[1] / FOLDER).glob("*.json"))
    stored = {file.stem: _read(file) for file in files}
    return with_perplexities(load_folder(folder), stored)


def with_perplexities(
    results: Sequence[Result], stored: Mapping[str, Mapping[str, Any]]
) -> list[Result]:
    """The results, each with the entries of its model; random weights have none.

    stored: name of a file -> what is in it.
    """
    return [
        {**result, KEY: {n: e for n, file in stored.items() if (e := _entry(result, file))}}
        for result in results
    ]


def shown_in(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """Name of a file -> one of its entries, for files that have a quantised model among these.

    Where all rows ran one model its quality is no news, and there is no column.
    """
    shown: dict[str, dict[str, Any]] = {}
    for result in filter(is_quantized, results):
        shown |= result.get(KEY, {})
    return shown


def protocol_line(name: str, entry: Mapping[str, Any]) -> str:
    """What the perplexities of a column are of."""
    return (
        f"perplexity {name}: of the first {entry['num_windows']:,} windows of {entry['window']:,} "
        f"tokens of {entry['text']}, {entry['dtype']}, stored apart from these runs; lower is "
        f"better."
    )


def _entry(result: Result, file: Mapping[str, Any]) -> dict[str, Any] | None:
    """The file's perplexity of the result's model, with what it is of."""
    if has_random_weights(result):
        return None
    name = model_label(str(lookup(result, "model.name")))
    for model in file["models"]:
        if (model["name"], model["quantization"]) == (name, lookup(result, "model.quantization")):
            protocol = {key: value for key, value in file.items() if key != "models"}
            return {**protocol, "perplexity": model["perplexity"]}
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is not a readable JSON file: {error}") from error
    if not isinstance(content, dict) or "models" not in content:
        raise ValueError(
            f"{file} holds no perplexities (an object with a key 'models'); move it elsewhere, or "
            f"write it with `python -m m7_gptq perplexity --output`"
        )
    return content
