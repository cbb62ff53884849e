"""Other token reducers, each as strong as makes it cost what STEP costs."""

from collections.abc import Callable
from functools import partial

from tokenstep.config import Budget, Thresholds
from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.measure.quality import Method, measure
from tokenstep.model.any_segmenter import AnySegmenter
from tokenstep.policies.entropy import BITS, threshold_of

NEAR = 0.002  # share of a cost within which the search for it ends
CLOSE = 0.02  # share of a cost within which another is called equal
ROUNDS = 12  # that halve the interval of strengths


def _tome(model: AnySegmenter, strength: float) -> Method:
    return _by(f"tome:share={strength / 2:.5f}")


def _evit(model: AnySegmenter, strength: float) -> Method:
    return _by(f"evit:{_third_parts(model)},keep={1 - 0.99 * strength:.5f}")


def _evit_dropping(model: AnySegmenter, strength: float) -> Method:
    return _by(f"evit:{_third_parts(model)},keep={1 - 0.99 * strength:.5f},fuse=false")


def _algm(model: AnySegmenter, strength: float) -> Method:
    half = max(2, model.depth // 2)
    return _by(f"algm:threshold={1 - 2 * strength:.5f},far={half}")


def _mctf(model: AnySegmenter, strength: float) -> Method:
    return _by(f"mctf:share={strength / 2:.5f}")


def _mpm(model: AnySegmenter, strength: float) -> Method:
    """In as many blocks as the strength says, spread evenly: it has no other."""
    depth = model.depth
    count = round(strength * depth)
    return _by(f"mpm:blocks={[1 + index * depth // count for index in range(count)]}")


def _random_drop(model: AnySegmenter, strength: float) -> Method:
    return _by(f"random:share={strength / 2:.5f}")


def _cts(model: AnySegmenter, strength: float) -> Method:
    """Content-aware token sharing (CVPR 2023): a fixed number of 2x2 superpatches, no others."""
    return Method(Budget(merge={2: strength} if 2 in model.config.policy.sizes else {}))


def _entropy(model: AnySegmenter, strength: float) -> Method:
    """APT's policy (arXiv 2510.18091) with one threshold of entropy for all sides."""
    merge = (threshold_of(BITS * strength),) * len(model.config.policy.sizes)
    return Method(Thresholds(merge), partition="entropy")


def _smaller(model: AnySegmenter, strength: float) -> Method:
    """The picture scaled down, to a tenth of its sides at most."""
    return Method(scale=1 - 0.9 * strength)


def _by(text: str) -> Method:
    return Method(Thresholds(reducers=(text,)))


def _third_parts(model: AnySegmenter) -> str:
    """EViT's blocks 4, 7 and 10 of 12, as deep in a model of another depth."""
    depth = model.depth
    blocks = dict.fromkeys(1 + depth * quarter // 4 for quarter in (1, 2, 3))
    return f"blocks={[*blocks]}"


# A rival by a model and its strength, 0 (nothing is reduced) to 1 (all that it can).
RIVALS: dict[str, Callable[[AnySegmenter, float], Method]] = {
    "ToMe": _tome,
    "EViT, fused": _evit,
    "EViT, dropped": _evit_dropping,
    "ALGM": _algm,
    "MCTF": _mctf,
    "MPM": _mpm,
    "random drop": _random_drop,
    "CTS": _cts,
    "entropy (APT)": _entropy,
    "lower resolution": _smaller,
}


def rivals_at(model: AnySegmenter, folder: LabelledFolder, wanted: float) -> dict[str, Method]:
    """Each rival at the cost of ``wanted`` GMAC a picture of ``folder``, by its name.

    One that cannot cost so much or so little stands at its nearest, and its name says so. A lower
    resolution is none for a model that brings pictures to a size of its own.
    """
    methods = {}
    for name, rival in RIVALS.items():
        if model.resizes and rival is _smaller:
            continue
        strength, gmac = strength_at(partial(_gmac_at, model, folder, rival), wanted)
        close = abs(gmac / wanted - 1) < CLOSE
        where = f"at {gmac:.4g} GMAC" if close else f"at its nearest, {gmac:.4g} GMAC"
        methods[f"{name} {where}"] = rival(model, strength)
    return methods


def _gmac_at(
    model: AnySegmenter,
    folder: LabelledFolder,
    rival: Callable[[AnySegmenter, float], Method],
    strength: float,
) -> float:
    return gmac_of(model, folder, rival(model, strength))


def gmac_of(model: AnySegmenter, folder: LabelledFolder, method: Method) -> float:
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
