"""Reads the items of a task from the file beside it; lm-eval calls it (`_continuation_yaml`)."""

import json
from pathlib import Path
from typing import Any


def load(file: str, **metadata: Any) -> dict[str, Any]:
    """Return the items as lm-eval wants a data set: by split."""
    from datasets import Dataset

    with (Path(__file__).parent / file).open(encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}
