"""The best RoAd adapter for a change that is known already, in closed form, without training.

    from_checkpoints(base, tuned)               from a base and a fully fine-tuned model on the disk, a pair of tensors at a time
    from_lora(lora, base)                       from a LoRA or DoRA adapter and its base
    from_activations(base, wanted, batches)     from two models that are run on a text

Each gives a `Fit`: an `Adapter` like any other (``roadie.checkpoint.save`` writes it, stock PEFT loads it), and how much of the
change of each layer it explains. A pair of outputs has a 2 x 2 block, fitted by least squares over its two rows
(`closed_form`); what a block cannot say of them, which is most of what a large change does, is left out, and reported.

Torch and safetensors alone; nothing here writes.
"""

from roadie.fit.activations import Inputs, from_activations
from roadie.fit.checkpoints import from_checkpoints
from roadie.fit.closed_form import Moments, best_rotation, moments
from roadie.fit.low_rank import from_lora
from roadie.fit.places import Place
from roadie.fit.report import Fit, LayerReport, NotFitted, Reason
from roadie.fit.settings import Settings

__all__ = [
    "Fit",
    "Inputs",
    "LayerReport",
    "Moments",
    "NotFitted",
    "Place",
    "Reason",
    "Settings",
    "best_rotation",
    "from_activations",
    "from_checkpoints",
    "from_lora",
    "moments",
]
