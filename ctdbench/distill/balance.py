"""How the terms of a loss are weighted against each other: ratio and gradmag.

Both need what only the whole global batch knows, the terms' values or their gradients, so the step
keeps one gradient per term and weights them at its end; `fixed` needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ctdbench.distill import models
from ctdbench.errors import UserError

EPSILON = 1e-8  # of gradmag, as in tokenkit
NOTHING = 1e-7  # of the largest norm: no gradient, float32's rounding aside


def ratio(ce: float, terms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """Weights of the terms beside a CE of weight 1: the method's own, scaled to the size of CE.

    CE + (|CE| / |KD|) KD with KD the weighted sum of the terms' means; the factor is 1 where KD is
    0. X-Token (arXiv 2605.21699), `dynamic_loss_scaling` of its public code.
    """
    kd = sum(weights[name] * value for name, value in terms.items())
    scale = abs(ce) / abs(kd) if kd else 1.0
    return {name: weights[name] * scale for name in terms}


def gradmag(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """A term's own weight over the norm of its gradient, normalised to sum 1.

    Minixhofer et al. (arXiv 2503.20083), after GradNorm (arXiv 1711.02257); own weights are 1
    there. A term with no gradient but rounding has no say: its weight would take all of the sum.
    """
    least = NOTHING * max(norms.values(), default=0.0)
    inverse = {
        name: weights[name] / (norm + EPSILON) for name, norm in norms.items() if norm > least
    }
    total = sum(inverse.values())
    return {name: inverse[name] / total if name in inverse else 0.0 for name in norms}


def last_layer(model: Any) -> list[nn.Parameter]:
    """Trainable parameters of the body's last layer, on which gradmag takes its norms.

    Raises UserError if there is none.
    """
    last = models.layers(model)[-1:]
    found = [p for layer in last for p in layer.parameters() if p.requires_grad]
    if not found:
        raise UserError(
            "train.balance: gradmag needs trainable parameters in the student's last layer",
            "set train.balance=ratio or fixed",
        )
    return found
