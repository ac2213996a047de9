"""`roadie inspect` and `roadie compare`, as a person or a program would use them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from roadie import checkpoint
from roadie.inspect import examine


def test_inspect_prints_what_an_adapter_does(roadie_cli, trained):
    result = roadie_cli("inspect", trained["one"])
    assert result.exit_code == 0, result.output
    portrait = examine({"one": checkpoint.load(trained["one"])}).portraits[0]
    first = next(line for line in result.stdout.splitlines() if line.startswith("one"))
    assert first.split()[:4] == ["one", "road_1", "14", f"{portrait.parameters:,}"]
    assert f"{portrait.angle_degrees:.2f}" in first.split()
    most = portrait.most_changed[0]
    layers = [line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")]
    assert layers[0] == [
        *(most.path, f"{most.angle_degrees:.2f}", f"{most.log_scale:.4f}", f"{most.change:.4f}", f"{most.mirrored}")
    ]
    assert "and 2 more layers, which change less" in result.stdout


def test_inspect_writes_a_page_and_pictures(roadie_cli, trained, tmp_path):
    result = roadie_cli(
        "inspect", trained["one"], f"b={trained['two']}", "-o", tmp_path / "r.html", "--png", tmp_path / "f"
    )
    assert result.exit_code == 0, result.output
    page = (tmp_path / "r.html").read_text()
    assert "Distance by layer" in page
    assert all(f">{title}</h2>" in page for title in ("one", "b", "At a glance", "What one and b share"))
    assert (tmp_path / "f" / "adapter-1-plane-dark.png").is_file()
    assert f"written: {tmp_path / 'r.html'}" in result.stdout


def test_details_says_how_many_adapters_are_shown_in_full(roadie_cli, trained, tmp_path):
    for details, shown in ((0, 0), (1, 1)):
        path = tmp_path / f"{details}.html"
        assert roadie_cli("inspect", *trained.values(), "-o", path, "--details", details).exit_code == 0
        assert path.read_text().count("Most changed layers<") == shown


def test_json_is_what_the_functions_say(roadie_cli, trained):
    result = roadie_cli("inspect", *trained.values(), "--json")
    adapters = {name: checkpoint.load(path) for name, path in trained.items()}
    assert json.loads(result.stdout) == json.loads(json.dumps(examine(adapters).to_mapping()))
    assert json.loads(roadie_cli("compare", *trained.values(), "--json").stdout) == json.loads(result.stdout)


def test_compare_prints_the_closest_pairs(roadie_cli, trained, tmp_path):
    result = roadie_cli("compare", *trained.values(), "-o", tmp_path / "pair.html")
    assert result.exit_code == 0, result.output
    found = examine({name: checkpoint.load(path) for name, path in trained.items()}).comparison
    line = next(line for line in result.stdout.splitlines() if line.startswith("one and two"))
    assert line.split()[-2:] == [f"{found.distance[0][1]:.4f}", f"{found.alignment[0][1]:.3f}"]
    assert "Most changed layers" not in (tmp_path / "pair.html").read_text()


@pytest.mark.parametrize("names", [("one", "two"), ("two", "one")])
def test_adapters_that_change_most_come_first(roadie_cli, trained, names):
    lines = roadie_cli("inspect", *(trained[name] for name in names)).stdout.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["one"], ["two"]) and "road_" in line]
    changes = {name: examine({name: checkpoint.load(trained[name])}).portraits[0].change for name in names}
    assert [row[0] for row in rows] == sorted(names, key=lambda name: -changes[name])


def test_compare_wants_two(roadie_cli, trained):
    result = roadie_cli("compare", trained["one"])
    assert result.exit_code == 2
    assert "two adapters or more; roadie inspect shows one" in result.stderr.replace("\n", " ")


def test_a_text_shows_how_hidden_states_move(roadie_cli, trained, texts, tmp_path):
    result = roadie_cli("inspect", trained["one"], "--text", texts, "--tokens", 64, "-o", tmp_path / "s.html")
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines() if line.startswith(("embeddings", "block"))]
    assert [row[:-2] for row in rows] == [["embeddings"], ["block", "1"], ["block", "2"]]
    assert rows[0][-2:] == ["0.0000", "1.0000"]
    assert float(rows[2][-1]) < 1
    assert "Direction of hidden states" in (tmp_path / "s.html").read_text()


@pytest.mark.parametrize("verb", ["inspect", "compare"])
def test_names_of_different_bases_are_warned_of(roadie_cli, trained, tmp_path, verb):
    shutil.copytree(trained["two"], tmp_path / "moved")
    config = json.loads((tmp_path / "moved" / "adapter_config.json").read_text())
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "x/y"}))
    result = roadie_cli(verb, trained["one"], tmp_path / "moved", "-o", tmp_path / "r.html")
    assert result.exit_code == 0
    assert "warning: The adapters name 2 base models" in result.stderr
    assert "moved was made for x/y" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("verb", ["inspect", "compare"])
def test_bad_input_is_one_message_and_nothing_is_written(roadie_cli, trained, tmp_path, verb):
    for name in ("broken", "short"):
        shutil.copytree(trained["one"], tmp_path / name)
    file = tmp_path / "broken" / checkpoint.WEIGHTS_NAME
    tensors = load_file(file)
    name = next(iter(tensors))
    save_file({**tensors, name: torch.full_like(tensors[name], float("nan"))}, file)
    file = tmp_path / "short" / checkpoint.WEIGHTS_NAME
    save_file({key: value[:16].clone() for key, value in load_file(file).items()}, file)
    for bad, message in (
        (tmp_path / "missing", "got no such file or folder"),
        (tmp_path / "broken", "not finite"),
        (tmp_path / "short", "wanted adapters of one base model"),
    ):
        result = roadie_cli(verb, trained["one"], bad, "-o", tmp_path / "r.html", "--png", tmp_path / "f")
        assert result.exit_code == 2, bad
        assert message in result.stderr
        assert not (tmp_path / "r.html").exists()
        assert not (tmp_path / "f").exists()
