"""Options that several commands share, and what they stand for."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from tokenstep.config import Precision
from tokenstep.errors import TokenstepError

if TYPE_CHECKING:
    from tokenstep.data.scaling import MaxSide
    from tokenstep.model.any_segmenter import AnySegmenter
    from tokenstep.model.segmenter import Segmenter

Data = Annotated[Path, typer.Option(help="Labelled folder, as the README lays it out.")]
ModelName = Annotated[
    str, typer.Option("--model", help="A shipped name, a folder, or a Hugging Face repository id.")
]
AcceleratorName = Annotated[
    str | None,
    typer.Option(
        "--accelerator", help="What makes a model of transformers cheap: a folder or repository."
    ),
]
PolicyText = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="In place of the model's own policy, without training: entropy:bits=[5.5,4.0].",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PrecisionOf = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="|".join(get_args(Precision)),
        help="16 bits where the device has arithmetic of it; by itself a GPU runs at auto.",
    ),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores if not given.")]
Merge = Annotated[
    str | None,
    typer.Option(help="Merge thresholds, one per superpatch size, as 0.6,0.6,0.6,0.6; 'off'."),
]
Exits = Annotated[
    str | None, typer.Option(help="Exit thresholds, one per exit, as 0.95,0.9; 'off'.")
]
Reducers = Annotated[
    list[str] | None,
    typer.Option(
        "--reducer",
        help="In place of the model's exits, as tome:share=0.1 or evit:keep=0.7; may be repeated.",
    ),
]
BudgetOf = Annotated[
    str | None,
    typer.Option(
        "--budget",
        metavar="point|FILE",
        help="Spend the same on each picture: the budget of the operating point, or a JSON file.",
    ),
]
Names = Annotated[
    list[str] | None, typer.Option(help="Patterns of picture names; '!' before one excludes.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Recipe values to change, as data.root=DIR.")
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Points of mIoU that may be lost, as calibrated; 0 is dense. Else the model's own.",
    ),
]

Side = Annotated[
    str | None,
    typer.Option(
        "--max-side",
        metavar="PIXELS|none",
        help="Scale larger pictures down to this long side first; none: never. [the scale that the "
        "model was trained at, if it has one]",
    ),
]


def max_side_of(given: str | None, *, tile: int | None = None) -> "MaxSide":
    """What ``--max-side`` asks for, beside a ``--tile`` that is for pictures as they are.

    Raises:
        TokenstepError: the option is neither a number of pixels nor none.
    """
    if given is None:
        return "auto" if tile is None else None
    if given.lower() == "none":
        return None
    if len(given) > 9:  # of some thousand digits Python makes no number
        raise TokenstepError(f"--max-side {given[:9]}...: give at most 9 digits, or none")
    if not (given.isdecimal() and int(given) >= 1):
        raise TokenstepError(f"--max-side {given}: give 1 or more pixels, or none")
    return int(given)


def scale_note(count: int, side: int, given: str | None) -> str:
    """That ``count`` pictures were scaled down to ``side``, and how to have it otherwise."""
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    text = f"{pictures} scaled down to a long side of {side} px"
    if given is not None:
        return text
    return f"{text}, the scale that the model was trained at (--max-side none: as they are)"


def load_model(name: str, device: str, threads: int | None) -> "Segmenter":
    """Load a model of ours onto a device.

    Raises:
        TokenstepError: there is no such model or device.
    """
    from tokenstep.hub import is_foreign, load, source_of

    if is_foreign(source_of(name)):
        raise TokenstepError(
            f"model {name}: is one of transformers, which this command does not take; compare "
            "--less measures such a model at several costs"
        )
    return load(name, device=_ready(device, threads))


def load_any(
    name: str,
    device: str,
    threads: int | None,
    precision: str | None = "fp32",
    *,
    accelerator: str | None = None,
    policy: str | None = None,
) -> "AnySegmenter":
    """Load a model onto a device; without a precision, the one that its kind is made for.

    Raises:
        TokenstepError: there is no such model, accelerator, policy, device or precision.
    """
    from tokenstep.hub import load_segmenter
    from tokenstep.policies.named import policy_of

    device = _ready(device, threads)
    try:
        chosen = None if policy is None else policy_of(policy)
        model = load_segmenter(name, device=device, accelerator=accelerator, policy=chosen)
    except TokenstepError as fault:
        given = str(fault).startswith(("policy", "accelerator"))
        raise TokenstepError(f"--{fault}" if given else str(fault)) from fault
    if precision is None:  # a CPU computes as the figures of a model were measured
        precision = "fp32" if model.device.type == "cpu" else "auto"
    known = next((one for one in get_args(Precision) if one == precision.lower()), None)
    if known is None:
        raise TokenstepError(
            f"--precision {precision}: choose from {', '.join(get_args(Precision))}"
        )
    model.use(precision=known)
    return model


def _ready(device: str, threads: int | None) -> str:
    """The device that ``--device`` stands for, once torch has its threads."""
    import torch

    from tokenstep.hub import device_of

    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return device_of(device)
    except TokenstepError as fault:
        raise TokenstepError(f"--{fault}") from fault
