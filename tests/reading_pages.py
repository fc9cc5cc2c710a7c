"""What a page of duollm/report holds, read as its script reads it."""

import base64
import json
import re
import zlib
from typing import Any


def data_of(html: str) -> dict[str, Any]:
    """Return the runs and settings of a page."""
    packed = re.search(r'<script type="text/plain" id="data">(.*?)</script>', html, re.DOTALL)
    assert packed is not None
    return json.loads(zlib.decompress(base64.b64decode(packed[1])).partition(b"\0")[0])
