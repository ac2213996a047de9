"""Linear layers: which modules are one, and which of them no rotation can be put on.

A rotation is put on what a layer gives when it is called. It has no effect where a model reads the layer's weight and does not
call it (`roadie.linear.reads`), and no meaning where the layer gives something else than a tensor of its out features
(`roadie.linear.outputs`). Whoever adapts a model, with or without PEFT, asks here.
"""

from roadie.linear.kinds import in_features, is_linear, out_features
from roadie.linear.language import outside_language
from roadie.linear.names import by_likeness, has_name, ignored_names, without_numbers
from roadie.linear.outputs import check_output, gives_fresh_memory
from roadie.linear.reads import read_in_a_forward, weight_reads
from roadie.linear.refusals import check_named, refusals, unpaired, without_refused

__all__ = [
    "by_likeness",
    "check_named",
    "check_output",
    "gives_fresh_memory",
    "has_name",
    "ignored_names",
    "in_features",
    "is_linear",
    "out_features",
    "outside_language",
    "read_in_a_forward",
    "refusals",
    "unpaired",
    "weight_reads",
    "without_numbers",
    "without_refused",
]
