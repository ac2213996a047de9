"""Train the three adapters that ship beside the embedded model: those of `roadie demo`.

python scripts/train_embedded_adapters.py        a minute on two cores; writes those of packages/roadie-embedded-model
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from roadie import embedded
from roadie.training.demo import FULL, run_demo


def main() -> None:
    """Train, and put the folders in place."""
    target = embedded.adapters_path()
    with tempfile.TemporaryDirectory() as scratch:
        result = run_demo(FULL, Path(scratch))
        for kind in result.kinds:
            install(Path(scratch) / kind, target / kind)
    print(
        {adapter: {kind: round(loss, 3) for kind, loss in losses.items()} for adapter, losses in result.losses.items()}
    )


def install(trained: Path, folder: Path) -> None:
    """The two files of an adapter, in place of those that are there."""
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = embedded.NAME
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copy(trained / "adapter_model.safetensors", folder)


if __name__ == "__main__":
    main()
