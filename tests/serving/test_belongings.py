"""What lies beside an adapter's weights: said where it is not as the base model has it, and kept from doing harm."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.serving.harness import SMALL, prompt, serving
from tests.versions import NO_ENGINE

from roadie import checkpoint, embedded
from roadie.adapter import Adapter
from roadie.serving import Registry

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
CHATML = {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE, "eos_token": "<pad>"})}


def put(adapter: Adapter, folder: Path, base: str | None, files: dict[str, str]) -> None:
    checkpoint.save(Adapter(adapter.layers, {**adapter.config, "base_model_name_or_path": base}), folder)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def root(adapters: dict[str, Adapter], tmp_path: Path) -> Path:
    """Adapters with this and that beside them."""
    folder, tokens = tmp_path / "adapters", str(embedded.model_path() / "tokenizer.json")
    added = {"2048": {"content": "<|im_start|>"}, "5": {"content": "#"}}
    other = json.loads(Path(tokens).read_text())
    other["model"]["vocab"] = {token: (place + 1) % 2048 for token, place in other["model"]["vocab"].items()}
    for name, base, files in (
        ("plain", None, {}),
        ("same", "/home/me/Served-7b", {"tokenizer.json": Path(tokens).read_text()}),
        ("foreign", "org/other-7b", {}),
        ("chat", "org/served-7b", CHATML),
        ("file", "x/models--org--served-7b/snapshots/abc", {"chat_template.jinja": TEMPLATE}),
        ("added", None, {"tokenizer_config.json": json.dumps({"added_tokens_decoder": added})}),
        ("vocabulary", None, {"tokenizer.json": json.dumps(other)}),
        (
            "rubbish",
            None,
            {"tokenizer_config.json": "[" * 10**5, "chat_template.jinja": "x" * 10**6, "tokenizer.json": "7"},
        ),
    ):
        put(adapters["a0"], folder / name, base, files)
    return folder


WANTED = {
    "plain": [],
    "same": [],
    "foreign": ["made for the base model 'org/other-7b', and this one is 'org/served-7b'"],
    "chat": ["a chat template of its own, which its chats use"],
    "file": ["a chat template of its own, which its chats use"],
    "added": ["tokens that the base model has not ('<|im_start|>')"],
    "vocabulary": ["another vocabulary, which is not used"],
    "rubbish": [],
}


def check(said: dict[str, tuple[str, ...]], wanted: dict[str, list[str]]) -> None:
    assert {name: len(notes) for name, notes in said.items()} == {name: len(notes) for name, notes in wanted.items()}, (
        said
    )
    assert all(part in note for name in wanted for part, note in zip(wanted[name], said[name], strict=True))


@pytest.mark.skipif(NO_ENGINE, reason="transformers before 5.17 has no continuous batching that the engine knows")
def test_what_is_not_as_the_base_model_has_it_is_said_at_the_start_and_of_each(
    model: Any, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = embedded.load_tokenizer()
    with (
        caplog.at_level(logging.WARNING, logger="roadie"),
        serving(model, root, replace(SMALL, num_slots=8), tokenizer, names=("org/served-7b",)) as collector,
    ):
        engine = collector.engine
        at_start = {name: notes for name, notes in WANTED.items() if name != "vocabulary"} | {"vocabulary": []}
        check({one.name: one.notes for one in engine.adapters()}, at_start)
        for name in WANTED:
            collector.submit(prompt(0, 8), name)
        collector.wait()
        check({one.name: one.notes for one in engine.adapters()}, WANTED)
        assert {name: engine.own_chat(name) is not None for name in WANTED} == {
            name: name in ("chat", "file") for name in WANTED
        }
        assert engine.own_chat("chat").end_token == "<pad>"
        shutil.rmtree(root / "chat")
        assert engine.own_chat("chat").template == TEMPLATE  # that of the version in the slot
        assert engine.own_chat("nobody") is None
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("adapter ")]
    assert len(lines) == len(set(lines)) == sum(map(len, WANTED.values()))


def test_it_is_read_as_safely_as_the_weights(adapters: dict[str, Adapter], tmp_path: Path) -> None:
    root = tmp_path / "adapters"
    put(adapters["a0"], root / "linked", "org/x", {})
    (tmp_path / "secret").write_text("secret")
    (root / "linked" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    registry = Registry.open(root)
    for found in (registry.belongings(root / "linked"), registry.read("linked").belongings):
        assert (found.base_model, found.chat) == ("org/x", None)
    (root / "linked" / "chat_template.jinja").unlink()
    (root / "linked" / "chat_template.jinja").write_text(TEMPLATE)
    assert registry.belongings(root / "linked").chat is not None  # looked at again
    assert registry.belongings(root / "nothing").base_model is None
