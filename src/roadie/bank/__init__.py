"""Many adapters in memory, every row of a batch its own; torch only, with or without PEFT in the process."""

from __future__ import annotations

from roadie.bank.bank import AdapterBank
from roadie.bank.blends import Wish
from roadie.bank.servers import rows

__all__ = ["AdapterBank", "Wish", "rows"]
