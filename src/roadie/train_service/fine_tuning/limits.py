"""What a tenant may have, and at once, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass

from roadie.learning_rate import HIGHEST_RATE


@dataclass(frozen=True)
class Limits:
    """max_file_bytes: of one file; max_tenant_bytes: of all files of a tenant. max_line_bytes: of one row of a file.

    max_rows, max_tokens: of one file, when it is trained on. max_unfinished: jobs of a tenant that have not ended; max_training:
    jobs that train at once, of all tenants. keep_every: steps after which a job's state is kept, besides the end of each epoch.
    """

    max_file_bytes: int = 512 << 20
    max_tenant_bytes: int = 8 << 30
    max_line_bytes: int = 4 << 20
    max_rows: int = 1_000_000
    max_tokens: int = 100_000_000
    max_unfinished: int = 100
    max_training: int = 64
    keep_every: int = 100


MAX_EPOCHS, MAX_BATCH, MAX_BETA = 50, 256, 2.0
MAX_MULTIPLIER = 10 * HIGHEST_RATE / 1e-3
"""Ten times the highest rate that was ever right, for a model of the lowest."""
