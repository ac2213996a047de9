"""What is installed only where it is wanted: the extras, what each is for, and the one message where one is missing.

    need("serve")                    raises MissingExtra unless all that the extra brings is there
    need("serve", "llguidance")      the same of one package

`pip install roadie` brings what adapters need: torch, transformers, PEFT and safetensors. Nothing is imported here.
"""

from __future__ import annotations

import importlib.util
import sys

from roadie.errors import MissingExtra

EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cli": ("what the command line is made of", ("rich", "typer", "yaml")),
    "demo": ("the embedded model, in a checkout packages/roadie-embedded-model", ("roadie_embedded_model",)),
    "eval": ("lm-eval with its tasks", ("lm_eval",)),
    "inspect": ("what draws pictures", ("matplotlib", "scipy")),
    "measure": ("what sends requests and measures the answers", ("guidellm",)),
    "quant": ("what computes with quantised weights", ("bitsandbytes", "torchao")),
    "ray": ("what a deployment needs", ("fastapi", "fsspec", "ray")),
    "serve": ("what a server needs", ("fastapi", "prometheus_client", "uvicorn", "yaml")),
    "train": ("what reads data sets of the hub", ("datasets",)),
    "train-service": ("the SDK whose types Tinker's API speaks in", ("tinker",)),
    "trl": ("what trains on preferences", ("datasets", "trl")),
}
"""Extra -> what it is for, and the modules without which nothing of that works."""


def need(extra: str, *modules: str) -> None:
    """Raise `MissingExtra`, which says what to install, unless `modules` (default: all of the extra) can be found."""
    purpose, all_modules = EXTRAS[extra]
    missing = [module for module in modules or all_modules if not _is_there(module)]
    if missing:
        raise MissingExtra(f'got no {", ".join(missing)}; wanted {purpose}; run: pip install "roadie[{extra}]"')


def _is_there(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
        return spec is not None and (spec.origin is not None or module in sys.modules)  # not just a folder of that name
    except ImportError:  # of the package around it
        return False
    except ValueError:  # loaded already, by something that gave it no spec
        return True
