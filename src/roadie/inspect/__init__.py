"""Looking at adapters: what one does to each layer, how many stand to each other, and how hidden states move.

    examine(adapters)      everything in numbers; needs torch and numpy
    report(adapters)       the same with pictures: `to_html` makes one page of it, `to_pngs` a file a picture

Adapters are `Adapter` values by name. Pictures need matplotlib, those of several adapters scipy too:
``pip install "roadie[inspect]"``. Hidden states are measured by `roadie.training.inspection`, or by any model whose states
go through `change_of_states`.
"""

from roadie.inspect.comparison import Comparison, Sharing, compare, share
from roadie.inspect.files import check_page, to_pngs, write_html
from roadie.inspect.page import to_html
from roadie.inspect.portrait import LayerPortrait, Portrait, look
from roadie.inspect.rendering import Picture, to_png, to_svg
from roadie.inspect.report import Findings, Report, examine, report
from roadie.inspect.states import StateChange, change_of_states, summarise_states

__all__ = [
    "Comparison",
    "Findings",
    "LayerPortrait",
    "Picture",
    "Portrait",
    "Report",
    "Sharing",
    "StateChange",
    "change_of_states",
    "check_page",
    "compare",
    "examine",
    "look",
    "report",
    "share",
    "summarise_states",
    "to_html",
    "to_png",
    "to_pngs",
    "to_svg",
    "write_html",
]
