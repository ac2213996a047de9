"""The embedded model: an ordinary checkpoint that loads offline, is small, and has learnt something."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from roadie import embedded
from roadie.errors import MissingExtra
from roadie.training.models import ModelSource

SIZE_LIMIT = 20_000_000


@pytest.fixture(scope="module")
def model() -> Any:
    return embedded.load_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embedded.load_tokenizer()


def held_out(tokenizer: Any, kind: str) -> Tensor:
    """Rows [24, 256] from all over the held-out documents of `kind`."""
    encoded = tokenizer(
        [document.text for document in embedded.corpus.split(kind).held_out], add_special_tokens=False, verbose=False
    )
    tokens = torch.tensor([token for row in encoded["input_ids"] for token in row])
    windows = tokens.unfold(0, 255, (len(tokens) - 255) // 23)[:24]
    return torch.cat([torch.full((24, 1), tokenizer.bos_token_id), windows], dim=1)


def test_it_loads_with_plain_transformers_and_no_network(monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> NoReturn:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model = AutoModelForCausalLM.from_pretrained(embedded.model_path())
    tokenizer = AutoTokenizer.from_pretrained(embedded.model_path())
    assert type(model).__name__ == "LlamaForCausalLM"
    assert (
        model.generate(
            **tokenizer("import ", return_tensors="pt", return_token_type_ids=False), max_new_tokens=3
        ).shape[0]
        == 1
    )


def test_weights_are_float32_and_every_linear_layer_fits_groups_of_64(model: Any):
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert len(layers) == 7 * model.config.num_hidden_layers + 1
    assert {name for name, layer in layers.items() if layer.out_features % 64} == set()


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x + 1\n", "tab\tand\r\nline ends  ", "漢字, ελληνικά, 🎈", "", " <s> is text here"]
)
def test_the_tokenizer_gives_back_every_text(tokenizer: Any, text: str):
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    if "<s>" not in text:
        assert tokenizer.decode(tokens[1:], clean_up_tokenization_spaces=False) == text


def test_vocabulary_and_special_tokens_agree_with_the_config(model: Any, tokenizer: Any):
    config = model.config
    assert len(tokenizer) == config.vocab_size == 2048
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert special == (config.bos_token_id, config.eos_token_id, config.pad_token_id)
    assert len(set(special)) == 3


@pytest.mark.parametrize("position", range(3))
def test_it_beats_every_model_without_context_on_text_it_never_saw(model: Any, tokenizer: Any, position: int):
    """The bound: the entropy of the measured tokens themselves, which no model that ignores context can go below."""
    rows = held_out(tokenizer, embedded.corpus.kinds()[position])
    frequencies = torch.bincount(rows[:, 1:].flatten(), minlength=len(tokenizer)) / rows[:, 1:].numel()
    without_context = torch.special.entr(frequencies).sum().item()
    with torch.no_grad():
        loss = model(input_ids=rows, labels=rows).loss.item()
    assert loss < without_context - 0.5


def test_where_the_model_is_not_installed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "roadie_embedded_model", None)
    recorded = str(embedded.model_path())  # of this checkout
    monkeypatch.setattr(embedded, "_IN_A_CHECKOUT", Path("/nowhere"))
    for wish in (ModelSource(), ModelSource().for_adapters([embedded.NAME, recorded])):
        with pytest.raises(MissingExtra, match=r'the embedded model, .*; run: pip install "roadie\[demo\]"'):
            _ = wish.place
    assert ModelSource("owner/name").for_adapters([embedded.NAME]).place == "owner/name"


def test_the_model_that_is_installed_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "roadie_embedded_model").mkdir()
    (tmp_path / "roadie_embedded_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert embedded.adapters_path() == tmp_path / "roadie_embedded_model" / "adapters"
    assert embedded.name_here(embedded.NAME) == str(tmp_path / "roadie_embedded_model" / "model")


def test_the_directory_is_small_safe_and_readable():
    files = [path for path in Path(embedded.model_path()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= SIZE_LIMIT
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
    assert "README.md" in {path.name for path in files}
