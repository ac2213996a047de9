"""The table of docs/vllm.md, made from the newest record of throughput: ``python -m benchmarks.vllm_report``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from benchmarks import machine
from benchmarks.tables import markdown

DOCUMENT = machine.ROOT / "docs" / "vllm.md"
_PLACE = re.compile(r"(<!-- made by: python -m benchmarks\.vllm_report -->\n).*?(<!-- end -->)", re.DOTALL)


def main() -> None:
    """Put the table into the guide."""
    DOCUMENT.write_text(with_table(DOCUMENT.read_text(encoding="utf-8"), newest()), encoding="utf-8")
    print(DOCUMENT.relative_to(machine.ROOT))


def newest() -> Mapping[str, Any]:
    """The newest committed record."""
    files = (machine.ROOT / "benchmarks" / "results").glob("*/vllm-*.json")
    found: Mapping[str, Any] = max(
        (json.loads(file.read_text(encoding="utf-8")) for file in files), key=lambda record: record["date"]
    )
    return found


def with_table(guide: str, record: Mapping[str, Any]) -> str:
    """The guide with the record's table in its place."""
    return _PLACE.sub(lambda place: f"{place[1]}{table(record)}{place[2]}", guide)


def table(record: Mapping[str, Any]) -> str:
    """What a record says: throughput, and its ratio to the base's, with the interval of its median."""
    load, versions = record["load"], record["versions"]
    about = (
        f"{load['model']}, {load['requests']} requests at once, {load['prompt_tokens']} tokens in and {load['new_tokens']} out,\n"
        f"vLLM {versions['vllm']} on {record['device']} ({record['cores']} cores), {record['date'][:10]}, "
        f"commit {record['commit']}. Intervals: 95 %.\n"
    )
    rows = [
        [name, f"{entry['tokens_per_s']:.0f}", "{value:.3f} ({low:.3f} to {high:.3f})".format_map(entry["of_base"])]
        for name, entry in record["entries"].items()
    ]
    return f"{about}\n{markdown(['engine and rows', 'tokens a second', 'of the base'], rows)}"


if __name__ == "__main__":
    main()
