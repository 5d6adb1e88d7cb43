"""Picture of the recall test: what models draw with their own and their twins' memories."""

from collections.abc import Mapping

import numpy as np

from arl2_jax.config import Config
from arl2_jax.data.sprites import COLORS, SHAPES
from arl2_jax.evaluation.exchange import OUTCOMES, Drawings, outcomes
from arl2_jax.evaluation.labels import LABELS, SCORED
from arl2_jax.evaluation.plots import Row, contact_sheet
from arl2_jax.evaluation.recall import RecallTest

# Number of pairs to show, the first clip of each: the first pairs, without selection.
SHEET_PAIRS = 6
_TITLE = (
    "A hidden sprite comes out. Outlined: green its own, orange the twin's, red neither; "
    "lag: frame blocks hidden"
)
# Rows of the student's exchanges.
_EXCHANGED = {
    "states": "hybrid, twin's states",
    "caches": "hybrid, twin's caches",
    "zeroed": "hybrid, states zeroed",
}


def recall_sheet(config: Config, test: RecallTest, drawn: Mapping[str, Drawings]) -> bytes:
    """Draw each model's drawing of the revealed sprite, and the given frames: a PNG file.

    Args:
      config: the run.
      test: the clips.
      drawn: name of the model -> its drawings, with the frames of the first clips.
    """
    shown = range(0, min(2 * SHEET_PAIRS, len(test.clips)), 2)
    seen, hidden, truth, twins = [], [], [], []
    titles, boxes = [], []
    for i in shown:
        clip, event = test.clips[i], test.events[i]
        start, size = event.block * config.model.frames_per_block, config.data.sprites.size
        last_seen = np.flatnonzero(clip.visible[:start, event.sprite] == 1)[-1]
        seen.append(clip.video[last_seen])
        hidden.append(clip.video[start - 1])
        truth.append(clip.video[event.frame])
        twins.append(test.clips[i + 1].video[event.frame])
        top, left = (int(edge) for edge in clip.positions[event.frame, event.sprite])
        boxes.append((top, left, top + size, left + size))
        titles.append(_title(test, i))
    count = len(shown)
    rows = [
        Row("given: last seen", seen),
        Row("given: hidden", hidden),
        Row(LABELS["truth"], truth, ["own"] * count, opens=True),
        Row("truth of the twin", twins, ["twin"] * count),
    ]
    for name in SCORED:
        if name not in drawn:
            continue
        opens = name != "control_local" or "control" not in drawn
        rows.append(_row(LABELS[name], drawn[name], "none", test, shown, opens=opens))
        if name == "student":
            made = [exchange for exchange in _EXCHANGED if exchange in drawn[name].frames]
            rows += [_row(_EXCHANGED[x], drawn[name], x, test, shown) for x in made]
    return contact_sheet(rows, titles, title=_TITLE, boxes=boxes)


def _row(
    label: str, drawn: Drawings, exchange: str, test: RecallTest, shown: range, opens: bool = False
) -> Row:
    found = outcomes(drawn.readings[exchange], test.identities)[0]
    frames = [drawn.frames[exchange][i] for i in shown]
    return Row(label, frames, [OUTCOMES[found[i]] for i in shown], opens=opens)


def _title(test: RecallTest, i: int) -> str:
    """Return a column's title: the sprite, its lag, and the twin's sprite."""
    name = lambda identity: f"{list(COLORS)[identity[0]]} {SHAPES[identity[1]]}"
    own, twin = test.identities[i], test.identities[i + 1]
    return f"{name(own)}, lag {test.events[i].lag}\ntwin: {name(twin)}"
