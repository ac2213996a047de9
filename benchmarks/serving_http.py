"""The server over HTTP with its real engine: what takes too long for tests. ``python -m benchmarks.serving_http schema ...``

    schema    schemathesis over the OpenAPI document, 2,000 cases and more: no 5xx, nothing that the document does not say
    corpus    the hostile requests of the tests and bad adapters, ten times over: blocks, slots, files and memory afterwards
    vanish    1,000 clients that hang up in mid stream: blocks and slots afterwards
    start     from the command to the first 200 of /ready, with the embedded model: five times
    stop      SIGTERM while 60 streams run, five times: how many accepted requests were lost

Prints what it finds and writes benchmarks/results/<machine>/serving-http.json, in which every entry says its commit; parts that
are not run keep their entries. docs/serving-checks.md is made from that file.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
from tests.patience import until
from tests.serving.http import test_hostile, test_process
from tests.serving.http.harness import ADMIN_KEY
from tests.serving.http.test_process import Process, served

from benchmarks import machine
from roadie import embedded
from roadie.serving.http.keys import add_to_file, entry_of

Entry = dict[str, Any]
DOCUMENT = machine.ROOT / "docs" / "serving-checks.md"
CASES = 150  # an operation, of the fuzzing; the coverage of schemathesis comes on top
CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,"
    "response_schema_conformance,negative_data_rejection,missing_required_header,unsupported_method,allow_header_conformance,"
    "ignored_auth"
)


def make_folder(folder: Path) -> Path:
    """A folder for a server, as the tests have it."""
    shutil.copytree(embedded.adapters_path(), folder / "adapters")
    (folder / "state").mkdir()
    add_to_file(folder / "keys.yaml", entry_of("operator", ADMIN_KEY, None, is_admin=True))
    test_process._make_bad_ones(folder / "adapters", embedded.adapters_path() / "turtle", folder)
    return folder


def figures(server: Process) -> Entry:
    with server.client() as client:
        return client.get("/v1/status").json()["figures"]


def rest(server: Process) -> Entry:
    """What a server holds when nothing goes on."""
    until(lambda: figures(server)["running"] == figures(server)["queued"] == 0)
    now = figures(server)
    process = Path(f"/proc/{server.running.pid}")
    memory = int(re.findall(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())[0]) * 1024
    return {
        "blocks_held": now["blocks"] - now["blocks_free"],
        "slots_leased": now["slots_leased"],
        "open_files": len(os.listdir(process / "fd")),
        "resident_bytes": memory,
    }


def schema(folder: Path) -> Entry:
    """schemathesis against a server, with an administrator's key."""
    with served(make_folder(folder), "--max-tokens", "64") as server:
        started_s = time.monotonic()
        report = folder / "report.json"
        command = [
            *(str(Path(sys.executable).parent / "schemathesis"), "run", f"{server.url}/openapi.json"),
            *("-H", f"Authorization: Bearer {ADMIN_KEY}", "--checks", CHECKS, "--phases", "coverage,fuzzing"),
            *(
                "--request-timeout",
                "60",
                "--max-examples",
                str(CASES),
                "--seed",
                "1",
                "--continue-on-failure",
                "--warnings",
                "off",
                "--no-color",
            ),
            *("--report", "ndjson", "--report-ndjson-path", str(report)),
        ]
        done = subprocess.run(command, cwd=folder, text=True, capture_output=True)
        print(done.stdout)
        statuses = [int(status) for status in re.findall(r'"status_code":\s*(\d+)', report.read_text())]
        with server.client() as client:
            is_ready = client.get("/ready").status_code == 200
        counted = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
        unanswered = re.search(r"(\d+) errored", done.stdout)
        assert counted is not None, done.stderr
        return {
            "cases": int(counted[1]),
            "passed": int(counted[2]),
            "unanswered": int(unanswered[1]) if unanswered else 0,
            "server_errors": sum(status >= 500 for status in statuses),
            "answers": {str(status): statuses.count(status) for status in sorted(set(statuses))},
            "is_ready_afterwards": is_ready,
            "seconds": time.monotonic() - started_s,
        }


def corpus(folder: Path) -> Entry:
    """The hostile requests, ten times."""
    with served(make_folder(folder)) as server, server.client() as client:
        after, wrong = [], 0
        for _ in range(10):
            for path, content, status, _ in test_hostile.HOSTILE.values():
                if path != test_hostile.LOAD:  # their paths are those of the fake engine
                    wrong += client.post(path, content=content, headers=test_hostile.JSON).status_code != status
            for name in ("truncated", "rubbish", "foreign", "pickled", "misfit", "linked", "no_config"):
                wrong += test_process.load(server, name, name).status_code != 400
            for path in ("../forbidden/secret", "/etc", "turtle/..", "\0"):
                wrong += test_process.load(server, "stolen", path).status_code != 400
            after.append(rest(server))
        growth = after[9]["resident_bytes"] / after[1]["resident_bytes"] - 1
        return {"repetitions": after, "other_statuses": wrong, "growth_from_2nd_to_10th": growth}


def vanish(folder: Path, count: int = 1000) -> Entry:
    """Clients that hang up in mid stream."""
    with served(make_folder(folder)) as server:
        asyncio.run(test_process.vanish(server.url, 20))
        before = rest(server)
        started_s = time.monotonic()
        asyncio.run(test_process.vanish(server.url, count, at_once=16))
        return {"clients": count, "seconds": time.monotonic() - started_s, "before": before, "after": rest(server)}


def start(folder: Path) -> Entry:
    """Start to ready, of the embedded model without arguments."""
    seconds = []
    for _ in range(5):
        command = [sys.executable, "-c", test_process.ROADIE, "serve", "--port", "0"]
        started_s = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as running:
            assert running.stdout is not None
            url = re.findall(r"http://\S+", running.stdout.readline())[0]
            assert httpx2.get(f"{url}/ready", trust_env=False).status_code == 200
            seconds.append(time.monotonic() - started_s)
            running.terminate()
            running.communicate(timeout=30)
    return {"seconds": seconds, "median_s": statistics.median(seconds)}


def stop(folder: Path) -> Entry:
    """SIGTERM under load."""
    make_folder(folder)
    (folder / "allowed").mkdir(exist_ok=True)
    accepted = refused = lost = 0
    codes = []
    for _ in range(5):
        with served(folder) as server:
            with server.client() as client:
                client.post("/v1/adapters/load", json={"name": "other", "path": "topics", "replace": True})
            answers = asyncio.run(test_process._load_and_end(server, 60))
            codes.append(server.running.wait(90))
        refused += answers.count(None)
        accepted += len(answers) - answers.count(None)
        lost += sum(answer not in (None, "length") for answer in answers)
    return {"accepted": accepted, "refused": refused, "lost": lost, "exit_statuses": codes}


PARTS: dict[str, Callable[[Path], Entry]] = {
    "schema": schema,
    "corpus": corpus,
    "vanish": vanish,
    "start": start,
    "stop": stop,
}


def document(results: Entry) -> str:
    """docs/serving-checks.md."""
    lines = [
        "# What was checked of the server",
        "",
        "Made by `python -m benchmarks.serving_http` from its record; the embedded model, on two cores, the real engine.",
        "",
        "| | found | commit |",
        "|---|---|---|",
    ]
    says: dict[str, Callable[[Entry], str]] = {
        "schema": lambda e: (
            f"schemathesis over the OpenAPI document: {e['cases']} cases, {e['cases'] - e['passed']} violations, "
            f"{e['server_errors']} answers of 500 or more, {e['unanswered']} cases without an answer in time"
        ),
        "corpus": lambda e: (
            f"hostile requests and adapters, 10 times over: {e['other_statuses']} answers other than documented; resident "
            f"memory {e['growth_from_2nd_to_10th']:+.1%} from the 2nd to the 10th time; then {_held(e['repetitions'][9])} "
            f"(after the 2nd: {e['repetitions'][1]['open_files']})"
        ),
        "vanish": lambda e: (
            f"{e['clients']} clients that hang up in mid stream: {_held(e['after'])} (before: {e['before']['open_files']})"
        ),
        "start": lambda e: (
            f"from the command to ready: {e['median_s']:.1f} s, median of {len(e['seconds'])}, at most "
            f"{max(e['seconds']):.1f} s"
        ),
        "stop": lambda e: (
            f"SIGTERM under load, {len(e['exit_statuses'])} times: {e['accepted']} requests accepted, {e['lost']} of them lost, "
            f"{e['refused']} refused; exit statuses {sorted(set(e['exit_statuses']))}"
        ),
    }
    lines += [
        f"| `{part}` | {says[part](results[part])} | {results[part]['commit']} |" for part in PARTS if part in results
    ]
    return "\n".join(lines) + "\n"


def _held(entry: Entry) -> str:
    return (
        f"{entry['blocks_held']} cache blocks and {entry['slots_leased']} slots held, {entry['open_files']} open files"
    )


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, "document"], metavar="PART")
    place = machine.ROOT / "benchmarks" / "results" / machine.machine_name() / "serving-http.json"
    results: Entry = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    for part in parser.parse_args().parts or list(PARTS):
        if part == "document":
            continue
        with tempfile.TemporaryDirectory(prefix="serving-http-") as folder:
            results[part] = PARTS[part](Path(folder)) | machine.commit()
        print(part, json.dumps(results[part], indent=1))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    DOCUMENT.write_text(document(results), encoding="utf-8")


if __name__ == "__main__":
    main()
