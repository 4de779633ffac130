"""One link that opens the MLflow page on a ladder's bars, samples and images, without a click.

The MLflow UI keeps a saved view in an experiment tag, `mlflow.sharedViewState.<key>`, and opens it by
`?viewStateShareKey=<key>`. The format is undocumented: this one was read from, and tried on, MLflow 3.17.2, and a
browser test holds it. A view that the UI can't read leaves the experiment's ordinary page.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any
from urllib.parse import urlencode

TAG = "mlflow.sharedViewState."  # and the view's key: 250 characters in all; the value's limit is 20,000

# (name, columns, height of a card in pixels, open). The last two take what the UI adds by itself, a card for every
# other metric: left out, they would be made anew, and open.
SECTIONS = (
    ("Rungs", 2, 300, True),
    ("Samples", 1, 300, True),
    ("Images", 1, 1020, True),
    ("Prompts", 1, 1020, True),
    ("Model metrics", 3, 300, False),
    ("System metrics", 3, 300, False),
)

# A card without data is hidden. `metricKey` and `imageKeys` also keep the UI from adding its own card for that key.
CARDS: tuple[dict[str, Any], ...] = (
    {"type": "BAR", "metricSectionId": "Rungs", "metricKey": "latency_median_s"},
    {"type": "BAR", "metricSectionId": "Rungs", "metricKey": "speedup"},
    {"type": "BAR", "metricSectionId": "Rungs", "metricKey": "peak_memory_gib"},
    {"type": "BAR", "metricSectionId": "Rungs", "metricKey": "psnr_db"},
    # With any smoothness the UI draws a moving average instead of the samples.
    {
        "type": "LINE",
        "metricSectionId": "Samples",
        "metricKey": "latency_sample_s",
        "xAxisKey": "step",
        "lineSmoothness": 0,
    },
    {"type": "IMAGE", "metricSectionId": "Images", "imageKeys": ["output"], "step": 0, "showRunParams": False},
    {"type": "IMAGE", "metricSectionId": "Prompts", "imageKeys": ["prompts"], "step": 0, "showRunParams": False},
)


def view_state(search_filter: str) -> dict[str, Any]:
    """What the page shows for the runs that match an MLflow search string, in the order of their names.

    Sorted by start time, the UI's default, the page would fetch the parents too and fold their children away.
    """
    return {
        "searchFilter": search_filter,
        "orderByKey": "tags.`mlflow.runName`",
        "orderByAsc": True,
        "runsHiddenMode": "SHOW_ALL",  # by default only the first ten runs are drawn
        "isAccordionReordered": True,  # keeps the sections in this order, not in that of their names
        "compareRunSections": [
            {
                # The UI knows its own two sections by these ids.
                "uuid": {"Model metrics": "model", "System metrics": "system"}.get(name, name),
                "name": name,
                "columns": columns,
                "cardHeight": height,
                "display": opened,
            }
            for name, columns, height, opened in SECTIONS
        ],
        "compareRunCharts": [{"uuid": f"card-{index}", **card} for index, card in enumerate(CARDS)],
    }


def encode(state: dict[str, Any], *, name: str, now_ms: int) -> str:
    """The value of the experiment tag that holds `state` as the saved view called `name`."""
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode()
    return json.dumps({"name": name, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"})


def link(base_url: str, experiment_id: str, key: str) -> str:
    """The page's address. A filter or an order in the address would make the UI ignore the view: give none."""
    query = {"viewStateShareKey": key, "compareRunsMode": "CHART", "workflowType": "machine_learning"}
    return f"{base_url.rstrip('/')}/#/experiments/{experiment_id}/runs?{urlencode(query)}"
