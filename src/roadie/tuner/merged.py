"""A RoAd layer whose rotations can be merged into a weight, and taken out of it again."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge

from roadie.algebra.chains import compose_chains
from roadie.errors import MergeError
from roadie.tuner.merging import ExactUnmerge, WeightRotations
from roadie.tuner.rotating import RoadLayer
from roadie.tuner.weight import BaseWeight, Merge


class MergedLayer(RoadLayer):
    """What rotates the outputs of a weight, and remembers what was merged into that.

    merged_adapters: their names, the first merged first.
    """

    def __init__(self, out_features: int) -> None:
        super().__init__(out_features)
        self.merged_adapters: list[str] = []
        self.exact_unmerge = ExactUnmerge.HALF
        self._merges: list[Merge] = []

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Rotate the base weight, and the bias, in place by the given adapters (None: the active ones), both or neither.

        safe_merge: look first whether every result is finite, and raise `MergeError` (a ValueError) with nothing changed
        if not. What it takes to come back exactly is kept as `exact_unmerge` says.
        """
        names = self._to_merge(adapter_names)
        if not names:
            return
        self._check_not_held()
        if safe_merge:
            self.check_merge(names)
        merge = self._base_weight().merge(self._weight_rotations(names), self.exact_unmerge)
        self._changed()
        self._merges.append(Merge(tuple(names), *merge))
        self.merged_adapters.extend(names)

    def _to_merge(self, adapter_names: list[str] | None) -> list[str]:
        return [name for name in check_adapters_to_merge(self, adapter_names) if name in self.road_theta]

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise `MergeError` if merging these adapters would give a non-finite weight or bias; changes nothing."""
        self._base_weight().check(self._weight_rotations(adapter_names), ", ".join(adapter_names))

    def _weight_rotations(self, names: Sequence[str]) -> WeightRotations:
        """What merging does to the weight: with adapters A, B it becomes ``R_B R_A W R_inA R_inB``."""
        with torch.no_grad():
            return WeightRotations(compose_chains([each for name in names for each in self.rotations(name)], ()))

    def unmerge(self) -> None:
        """Take all merges back, the last one first; raises `MergeError` with nothing changed where one cannot be."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.check_unmerge()
        while self._merges:
            self.undo_last_merge()

    def undo_last_merge(self) -> None:
        """Take back what the last call of `merge` did."""
        merge = self._merges[-1]
        self._base_weight().unmerge(merge)
        self._changed()
        self._merges.pop()
        del self.merged_adapters[len(self.merged_adapters) - len(merge.adapters) :]

    def check_unmerge(self) -> None:
        """Raise `MergeError` if a merge cannot be taken back; changes nothing."""
        self._check_not_held()
        self.check_undoable()

    def check_undoable(self) -> None:
        """As `check_unmerge`, but for what was merged after RoAd."""
        for merge in self._merges:
            if not merge.can_be_undone:
                raise MergeError(
                    f"got adapter(s) {', '.join(merge.adapters)} with a singular block (alpha = 0 or a determinant of "
                    "0) merged; such a merge cannot be undone. Nothing was changed; load the base model again."
                )

    def _check_not_held(self) -> None:
        if self.held_by:
            raise MergeError(
                f"got a layer into which {', '.join(self.held_by)} (LoRA) was merged after RoAd; wanted LoRA unmerged first: it "
                "is added to R W, and R must not change under it; model.unmerge_adapter() takes both back. Nothing was changed."
            )

    @property
    def unmerge_bytes(self) -> int:
        """Bytes kept so that unmerging gives back the original weights exactly."""
        return sum(merge.nbytes for merge in self._merges)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter from this layer; see PEFT's BaseTunerLayer."""
        super().delete_adapter(adapter_name)
        self._routing.additions += 1
        self._changed()

    def _base_weight(self) -> BaseWeight:
        raise NotImplementedError
