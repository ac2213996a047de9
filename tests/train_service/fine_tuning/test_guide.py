"""docs/fine-tuning-api.md: its program runs against a server, prints what the page says, and the page's numbers are true."""

from __future__ import annotations

from pathlib import Path

from tests.guides import DOCS, blocks_of, run
from tests.serving.http.harness import Running
from tests.train_service.fine_tuning.harness import ALICE

from roadie.train_service.fine_tuning.data import MAX_FAULTS
from roadie.train_service.fine_tuning.limits import Limits
from roadie.train_service.fine_tuning.plan import SETTINGS, decided

PAGE = "fine-tuning-api.md"


def test_the_guide_prints_what_it_says(server: Running, tmp_path: Path) -> None:
    (tmp_path / "key.txt").write_text(f"{ALICE}\n")
    blocks = [block.replace("http://127.0.0.1:8000", server.url) for block in blocks_of(PAGE)]
    assert run(blocks, tmp_path) == "".join(blocks_of(PAGE, "text"))


def test_the_numbers_of_the_page_are_those_of_the_code() -> None:
    text, limits = (DOCS / PAGE).read_text(encoding="utf-8"), Limits()
    assert f"{limits.max_file_bytes >> 20} MiB, and a key {limits.max_tenant_bytes >> 30} GiB" in text
    assert f"at most {limits.max_training}, and then" in text
    assert f"every {limits.keep_every} steps" in text
    assert MAX_FAULTS == 100
    assert all(f"`{name}`" in text for name in SETTINGS)
    auto = decided(dict.fromkeys(("n_epochs", "batch_size", "learning_rate_multiplier", "beta"), "auto"), 10_000)
    assert auto == {"n_epochs": 6, "batch_size": 32, "learning_rate_multiplier": 1.0, "beta": 0.1}
    assert decided({"batch_size": "auto"}, 40) == {"batch_size": 5}
