"""Numbers and names: one content, one number and one name; a number never stands for two."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM, which has an environment of its own: make test-vllm")

import shutil
from pathlib import Path
from typing import Any

from tests.vllm import cases
from vllm.lora.request import LoRARequest

from roadie import checkpoint, distance
from roadie.adapter_algebra import blend_adapters
from roadie.errors import AdapterError, CheckpointError, ConfigError
from roadie.vllm import admission
from roadie.vllm.admission import FIRST_OWN_NUMBER, KEPT_S, Admissions
from roadie.vllm.store import AdapterStore


@pytest.fixture
def contents(tmp_path: Path) -> list[Path]:
    return cases.write_many(tmp_path / "contents", 3, ("q_proj",))


@pytest.fixture
def admissions(tmp_path: Path) -> Admissions:
    return Admissions(AdapterStore(str(tmp_path / "store")))


def of(request: Any) -> tuple[str, int]:
    return request.lora_name, request.lora_int_id


def taken(admissions: Admissions, *given: Any, **more: Any) -> Any:
    """What the engine gets for a request; the workers take everything."""
    request = LoRARequest(*given, **more)
    known = admissions.known(request)
    if known is None:
        known = admissions.admit(request)
        admissions.settle(request, known)
    return known


def test_the_first_content_keeps_what_the_user_gave(admissions: Admissions, contents: list[Path]) -> None:
    request = LoRARequest("legal", 7, str(contents[0]), base_model_name="base")
    admitted = admissions.admit(request)
    assert admissions.known(request) is None  # the workers have not seen it
    assert not admissions.is_loaded(admitted)
    admissions.settle(request, admitted)
    assert admissions.is_loaded(admitted)
    assert of(admitted) == ("legal", 7)
    assert Path(admitted.lora_path).parent == admissions._store.folder
    assert admitted.base_model_name == "base"
    assert not admitted.load_inplace
    assert request.lora_path == str(contents[0])  # the user's own is as it was
    assert taken(admissions, "legal", 7, str(contents[0])) is admitted


def test_another_content_of_a_name_gets_a_name_and_a_number_of_its_own(
    admissions: Admissions, contents: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(contents[0], place)
    first = taken(admissions, "legal", 7, str(place))
    shutil.copytree(contents[1], place, dirs_exist_ok=True)
    assert taken(admissions, "legal", 7, str(place)) is first  # not asked to read again
    second = taken(admissions, "legal", 7, str(place), load_inplace=True)
    assert second.lora_name.startswith("legal@")
    assert second.lora_int_id >= FIRST_OWN_NUMBER
    assert second.lora_path != first.lora_path
    assert taken(admissions, "legal", 7, str(place)) is second
    shutil.copytree(contents[0], place, dirs_exist_ok=True)
    assert taken(admissions, "legal", 7, str(place), load_inplace=True) is first


def test_a_number_that_is_taken_is_not_given_again(admissions: Admissions, contents: list[Path]) -> None:
    made = [taken(admissions, f"name-{i}", 1, str(path)) for i, path in enumerate(contents)]
    assert [of(each)[0] for each in made] == ["name-0", "name-1", "name-2"]
    assert [of(each)[1] for each in made] == [1, FIRST_OWN_NUMBER, FIRST_OWN_NUMBER + 1]


def test_loading_a_name_again_under_another_number_is_the_same_adapter(
    admissions: Admissions, contents: list[Path]
) -> None:
    """A server does so after unloading: two requests of one name in a step must be one adapter."""
    first = taken(admissions, "legal", 1, str(contents[0]))
    assert taken(admissions, "legal", 2, str(contents[0])) is first


def test_bad_files_change_nothing(admissions: Admissions, contents: list[Path], tmp_path: Path) -> None:
    place = tmp_path / "place"
    shutil.copytree(contents[0], place)
    first = taken(admissions, "legal", 7, str(place))
    (place / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError):
        taken(admissions, "legal", 7, str(place), load_inplace=True)
    assert taken(admissions, "legal", 7, str(place)) is first
    with pytest.raises(CheckpointError):
        taken(admissions, "other", 8, str(place))


def test_what_the_workers_refuse_leaves_the_name_as_it_was(
    admissions: Admissions, contents: list[Path], tmp_path: Path
) -> None:
    place = tmp_path / "place"
    shutil.copytree(contents[0], place)
    first = taken(admissions, "legal", 7, str(place))
    shutil.copytree(contents[1], place, dirs_exist_ok=True)
    refused = admissions.admit(LoRARequest("legal", 7, str(place), load_inplace=True))
    assert of(refused) != of(first)
    assert taken(admissions, "legal", 7, str(place)) is first
    assert not admissions.is_loaded(refused)


def test_copies_that_nothing_stands_for_go_after_a_while(
    contents: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admissions, now = Admissions(AdapterStore()), [0.0]
    monkeypatch.setattr(admission.time, "monotonic", lambda: now[0])
    old, kept, other = (
        taken(admissions, name, i + 1, str(path)) for i, (name, path) in enumerate(zip("abc", contents, strict=True))
    )
    admissions.unload("a")
    now[0] = KEPT_S - 1
    admissions.unload("c")
    assert Path(old.lora_path).exists()
    now[0] = KEPT_S + 1
    admissions.unload("nothing")
    assert not Path(old.lora_path).exists()
    assert not admissions.is_loaded(old)
    assert Path(kept.lora_path).exists()
    assert Path(other.lora_path).exists()  # not unused for long enough
    again = taken(admissions, "a", 1, str(contents[0]))
    assert again.lora_int_id >= FIRST_OWN_NUMBER  # the workers may still hold what the old number was
    assert Path(again.lora_path).exists()


BLEND = "blend:legal=0.7+terse=-0.3"


@pytest.fixture
def named(tmp_path: Path) -> dict[str, Path]:
    """Adapters that blend; "terse" is in the folder of names."""
    names = ("legal", "folder/terse", "other")
    return {
        name.rpartition("/")[2]: cases.save_random(tmp_path / name, {"group_size": 32}, seed=seed, scale=0.2)
        for seed, name in enumerate(names)
    }


def blend_of(*parts: tuple[Path, float]) -> Any:
    return blend_adapters([checkpoint.load(path) for path, _ in parts], [weight for _, weight in parts])


def test_a_blend_is_made_of_what_its_names_stand_for_and_made_anew_when_one_is_replaced(
    named: dict[str, Path], tmp_path: Path
) -> None:
    admissions = Admissions(AdapterStore(), str(tmp_path / "folder"))
    with pytest.raises(AdapterError, match="got a blend of 'legal', which is no adapter that is loaded"):
        taken(admissions, "mix", 9, BLEND)
    taken(admissions, "legal", 1, str(named["legal"]))
    mix = taken(admissions, "mix", 9, BLEND)
    assert distance(checkpoint.load(mix.lora_path), blend_of((named["legal"], 0.7), (named["terse"], -0.3))) < 1e-6
    assert taken(admissions, "mix", 9, BLEND) is mix
    shutil.copytree(named["other"], named["legal"], dirs_exist_ok=True)
    assert taken(admissions, "mix", 9, BLEND) is mix  # as the name does
    taken(admissions, "legal", 1, str(named["legal"]), load_inplace=True)
    later = taken(admissions, "mix", 9, BLEND)
    assert later.lora_name.startswith("mix@")
    assert distance(checkpoint.load(later.lora_path), blend_of((named["other"], 0.7), (named["terse"], -0.3))) < 1e-6
    admissions.unload("legal")
    with pytest.raises(AdapterError, match="got a blend of 'legal'"):
        taken(admissions, "mix", 9, BLEND)


def test_the_last_blends_that_were_asked_for_are_remembered(
    named: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "MAX_BLENDS", 2)
    admissions = Admissions(AdapterStore())
    taken(admissions, "legal", 1, str(named["legal"]))
    for weight in (0.1, 0.2, 0.1, 0.3):
        taken(admissions, f"legal={weight}", 1, f"blend:legal={weight}")
    assert list(admissions.blends) == ["legal=0.1", "legal=0.3"]
    assert admissions.known(LoRARequest("legal=0.1", 1, "blend:legal=0.1")) is not None
    assert admissions.known(LoRARequest("legal=0.2", 1, "blend:legal=0.2")) is None
    assert admissions.known(LoRARequest("legal", 1, str(named["legal"]))) is not None


def test_a_blend_that_cannot_be_made_is_refused_with_the_reason(
    admissions: Admissions, named: dict[str, Path], tmp_path: Path
) -> None:
    mirrored = cases.save_random(tmp_path / "mirrored", {"group_size": 32, "variant": "road_2"}, seed=3, scale=2)
    smaller = cases.save_random(tmp_path / "smaller", {"group_size": 16}, seed=4, scale=0.2)
    for name, path in {"legal": named["legal"], "mirrored": mirrored, "smaller": smaller}.items():
        taken(admissions, name, 1, str(path))
    with pytest.raises(AdapterError, match=r"layer model\.layers\.0.*mirrored: got a block without a real logarithm"):
        taken(admissions, "mix", 9, "blend:mirrored=0.5")
    with pytest.raises(ConfigError, match=r"layer model\.layers\.0.*group_size"):
        taken(admissions, "mix", 9, "blend:legal=0.5+smaller=0.5")
