"""docs/families.md: which families of models work with which parts of roadie. `python -m tests.families.table` writes it."""

from __future__ import annotations

import re
from pathlib import Path

import transformers
from tests.families.checks import CHECKS, NO_CHECKPOINTS, NO_TEXT, Row, row_of
from tests.families.models import FAMILIES, WITH_EXPERTS, Family

_NOT_THERE = (NO_CHECKPOINTS, NO_TEXT)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "families.md"

_HEAD = """# Model families

What `RoadConfig(target_modules="all-linear")` does with tiny, randomly initialised models of {count} families of transformers
{version}; `tests/families` runs every cell, and `python -m tests.families.table` writes this page.

Each model has two adapters, road_1 and road_2, far from the identity, in float64. The reference is the plain model whose weights
were multiplied by dense rotation matrices, differentiated by autograd.

- **forward**: logits of each adapter. **backward**: gradients of its parameters. **checkpointed**: the same with gradient
  checkpointing (non-reentrant); `-` where transformers has none.
- **mixed rows**: `adapter_names` with both adapters and the base model in one batch, also with as many rows as tokens. **beams**:
  texts of both adapters in one batch, by beam search; `-` where the model writes no text (XLNet: none in float64).
- **merge**: merged and unmerged outputs agree, and unmerging restores the base model. **files**: saved, and loaded into another
  copy.
- **adapted**: adapted layers; **left out**: linear layers that "all-linear" leaves alone, besides the output layer.

`refused` means an error before anything is changed or computed; the messages are below the table.

"""

_EXPERTS = """
## Stacked experts

The same with `target_experts` for the families whose experts lie in parameters of three dimensions: the adapter of road_1 has a
rotation for "each" expert, that of road_2 one that is "shared", in one model and one batch. Adapted are the projections of all
experts of a layer, two of them, besides the layers above. Experts are computed by transformers' "eager" implementation here, in
float64; `tests/anchors/test_experts.py` compares "batched_mm" and "grouped_mm" too.

"""

_TOWERS = """
## Pictures and sounds

Of a model that reads pictures or sounds too, "all-linear" is the language model, and the log names what it leaves out: towers,
and what joins them to the language model (`model.visual` of Qwen2.5-VL, `model.vision_tower` and `model.multi_modal_projector` of
LLaVA). `RoadConfig(target_modules="all-linear", target_towers=True)` adapts these too. Some of them are named as any layer is, by
ends of paths, which mean layers of that name everywhere, or by an expression for whole paths:

```python
import roadie

config = roadie.RoadConfig(target_modules=r"model\\.language_model\\..*_proj|model\\.vision_tower\\..*\\.fc[12]")
```

`tests/tuner/test_towers.py` has these, and rows with pictures, each with an adapter of its own. The language model is what
transformers' `get_decoder()` gives, without towers inside of it: in 90 of the 100 multimodal classes of transformers 5.23.0 that
their default configurations make. Three others have no tower by default; Evolla, Kyutai's speech-to-text, Pi0, Qwen2.5-Omni as a
whole, T5Gemma 2, UDOP and vision-encoder-decoders are adapted whole, as are models of sounds like Whisper and those that write no
text (CLIP). Files of adapters in an older layout (LLaVA before transformers 4.52) are loaded: their keys are renamed as
transformers renames those of weights; what finds no place then is refused by name.
"""


def line(family: Family, row: Row) -> str:
    """A family's line of a table."""
    cells = [_cell(row, check) for check in CHECKS]
    left_out = ", ".join(f"`{name}`" for name in row.left_out)
    return f"| {family.kind} | `{family.cls}` | {row.adapted} | {left_out} | {' | '.join(cells)} |"


def _cell(row: Row, check: str) -> str:
    if "all" in row.said:
        return "refused"
    if check not in row.said:
        return "yes"
    return "-" if row.said[check] in _NOT_THERE else "refused"


def messages(family: Family, row: Row) -> list[str]:
    """What is said of whatever is refused, on a line each."""
    refused = {check: said for check, said in row.said.items() if said not in _NOT_THERE}
    return [f"- {family.kind}, {check}: {_in_one_line(said)}" for check, said in refused.items()]


def _in_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def document() -> str:
    """The whole page, for the installed transformers."""
    rows = [(family, row_of(family)) for family in FAMILIES]
    of_experts = [(family, row_of(family, with_experts=True)) for family in FAMILIES if family.kind in WITH_EXPERTS]
    head = _HEAD.format(count=len(rows), version=transformers.__version__)
    return head + _table(rows) + _EXPERTS + _table(of_experts, "### ") + _TOWERS


def _table(rows: list[tuple[Family, Row]], level: str = "## ") -> str:
    titles = ["family", "class", "adapted", "left out", *CHECKS]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    lines += [line(family, row) for family, row in rows]
    said = [message for family, row in rows for message in messages(family, row)]
    return "\n".join(lines) + f"\n\n{level}What is said\n\n" + "\n".join(said) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
