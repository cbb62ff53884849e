"""Other token reducers, each as strong as makes it cost what STEP costs."""

from collections.abc import Callable
from functools import partial

from tokenstep.config import Budget
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Method, measure
from tokenstep.model.segmenter import Segmenter
from tokenstep.reducers.evit import EViT
from tokenstep.reducers.random_drop import RandomDrop
from tokenstep.reducers.tome import ToMe

NEAR = 0.002  # share of the cost within which two costs are equal
ROUNDS = 12  # that halve the interval of strengths


def _tome(strength: float) -> Method:
    return Method(reducers=(ToMe(share=strength / 2),))


def _evit(strength: float) -> Method:
    return Method(reducers=(EViT(keep=1 - 0.99 * strength),))


def _evit_dropping(strength: float) -> Method:
    return Method(reducers=(EViT(keep=1 - 0.99 * strength, fuse=False),))


def _random_drop(strength: float) -> Method:
    return Method(reducers=(RandomDrop(share=strength / 2),))


def _cts(strength: float) -> Method:
    """Content-aware token sharing (CVPR 2023): a fixed number of 2x2 superpatches, no others."""
    return Method(Budget(merge={2: strength}))


# A rival by its strength, 0 (nothing is reduced) to 1 (all that it can).
RIVALS: dict[str, Callable[[float], Method]] = {
    "ToMe": _tome,
    "EViT, fused": _evit,
    "EViT, dropped": _evit_dropping,
    "random drop": _random_drop,
    "CTS": _cts,
}


def rivals_at(model: Segmenter, folder: LabelledFolder, wanted: float) -> dict[str, Method]:
    """Each rival at the cost of ``wanted`` GMAC a picture of ``folder``, by its name.

    One that cannot cost so much or so little stands at its nearest, and its name says so.
    """
    methods = {}
    for name, rival in RIVALS.items():
        if name == "CTS" and 2 not in model.config.policy.sizes:
            continue
        costs = partial(_gmac_at, model, folder, rival)
        strength, gmac = strength_at(costs, wanted)
        nearest = "" if abs(gmac / wanted - 1) < 0.02 else ", its nearest"
        methods[f"{name} at {wanted:.1f} GMAC{nearest}"] = rival(strength)
    return methods


def _gmac_at(
    model: Segmenter, folder: LabelledFolder, rival: Callable[[float], Method], strength: float
) -> float:
    return gmac_of(model, folder, rival(strength))


def gmac_of(model: Segmenter, folder: LabelledFolder, method: Method) -> float:
    """Mean GMAC of a picture."""
    (report,) = measure(model, folder, [method])
    return float(report["gmac"]["total"])


def strength_at(cost: Callable[[float], float], wanted: float) -> tuple[float, float]:
    """The strength of which the ``cost`` is nearest to ``wanted``, and its cost.

    Costs fall as the strength rises.
    """
    low, high = 0.0, 1.0
    best = min(((cost(end), end) for end in (low, high)), key=lambda pair: abs(pair[0] - wanted))
    for _ in range(ROUNDS):
        if abs(best[0] / wanted - 1) < NEAR:
            break
        middle = (low + high) / 2
        now = cost(middle)
        low, high = (middle, high) if now > wanted else (low, middle)
        best = min(best, (now, middle), key=lambda pair: abs(pair[0] - wanted))
    return best[1], best[0]
