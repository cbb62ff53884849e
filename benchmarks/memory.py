"""The most memory that torch's tensors took, dense and STEP, on every batch of pictures.

python benchmarks/memory.py OUT.json MODEL WIDTHxHEIGHT,... BATCH,... PICTURES...

`tokenstep bench` gives the resident pages of one batch: they hold what the C library keeps between
tensors, and differ by some 5 % from run to run. Here torch's profiler adds up what tensors take and
give back, so that the same call gives the same figure; what libraries below torch take for
themselves is not in it.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

import tokenstep
from tokenstep.measure.cases import Case, fitting
from tokenstep.measure.machine import MIB
from tokenstep.measure.speed import methods_of
from tokenstep.model.segmenter import Segmenter


def allocated_mib(call: Callable[[], object]) -> float:
    """Highest sum of the tensors that ``call`` held at once, in MiB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]"]
    held = highest = 0
    for change in sorted(changes, key=lambda event: event["ts"]):
        held += change["args"]["Bytes"]
        highest = max(highest, held)
    return highest / MIB


def rows_of(model: Segmenter, case: Case, files: list[Path]) -> dict[str, object]:
    """What each full batch of ``files`` takes, in MiB."""
    _, pictures = fitting(files, case)
    methods = methods_of(model, case, model.config.thresholds)
    rows = []
    for first in range(0, len(pictures) - case.batch + 1, case.batch):
        some = pictures[first : first + case.batch]
        with torch.inference_mode():
            rows.append(
                {
                    name: round(allocated_mib(partial(methods[name], some)), 1)
                    for name in ("dense", "STEP")
                }
            )
    height, width = case.size
    return {"size": f"{width}x{height}", "batch": case.batch, "mib": rows}


if __name__ == "__main__":
    out, name, sizes, batches, *files = sys.argv[1:]
    torch.set_num_threads(1)  # as in the other results
    model = tokenstep.load(name)
    rows = []
    for size, batch in product(sizes.split(","), batches.split(",")):
        width, height = (int(side) for side in size.split("x"))
        case = Case((height, width), int(batch))
        rows.append(rows_of(model, case, [Path(file) for file in files]))
        print(rows[-1], flush=True)
    Path(out).write_text(json.dumps({"model": name, "rows": rows}) + "\n")
