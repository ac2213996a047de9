"""`roadie serve --train`: what of its options reaches the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("fastapi")

from roadie.cli.app import app
from roadie.serving.http import launch
from roadie.serving.http.launch import Launch


@pytest.mark.parametrize(("options", "tokens"), [((), 4096), (("--train-tokens", "640"), 640)])
def test_a_pass_has_so_many_tokens(
    options: tuple[str, ...], tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Launch] = []
    monkeypatch.setattr(launch, "run", lambda launch, *_, **__: given.append(launch) or True)
    state = ("--train", "--train-state", str(tmp_path / "state"))
    result = CliRunner().invoke(app, ["serve", *state, *options])
    assert result.exit_code == 0, result.output
    assert [each.training.max_tokens_per_pass for each in given] == [tokens]


def test_a_server_that_does_not_train_has_no_settings_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Launch] = []
    monkeypatch.setattr(launch, "run", lambda launch, *_, **__: given.append(launch) or True)
    assert CliRunner().invoke(app, ["serve"]).exit_code == 0
    assert [each.training for each in given] == [None]
