"""Experts of mixtures whose weights lie stacked: which modules hold such, and a forward of theirs that rotates between.

`kinds` says what an experts module is made of and which cannot be adapted, `forward` computes one, with whoever rotates there,
through transformers' registry of experts implementations. An experts module is adapted at one site for each of its projections,
as a linear layer is at its output.

Legend: E experts, D outputs of one expert at one projection, N tokens, P pairs of a token and an expert that it is given to.
"""

from roadie.experts.forward import Pairs, Turn, attach, release
from roadie.experts.kinds import ExpertSite, Projection, check_group_sizes, experts_in, is_experts, projections, refusal

__all__ = [
    "ExpertSite",
    "Pairs",
    "Projection",
    "Turn",
    "attach",
    "check_group_sizes",
    "experts_in",
    "is_experts",
    "projections",
    "refusal",
    "release",
]
