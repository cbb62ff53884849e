"""The order of training: the same pictures at the same places, whatever came before."""

from collections import Counter
from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenstep.data.labelled_folder import LabelledFolder
from tokenstep.train.stream import Places, Stream, share_of


def test_the_stream_is_a_function_of_seed_and_place(drawn: Path) -> None:
    folder = LabelledFolder(drawn, "train", transform=lambda a, b: (a + torch.rand(()), b))
    whole = Stream(folder, seed=1, length=60)
    for place in (30, 44, 59):
        assert torch.equal(whole[place][0], Stream(folder, seed=1, length=60)[place][0])
    first_epoch = {float(whole[place][0].sum()) for place in range(24)}
    assert len(first_epoch) == 24  # every picture once an epoch


@given(
    steps=st.integers(1, 7),
    batch=st.integers(1, 4),
    world=st.integers(1, 3),
    first=st.integers(0, 7),
)
def test_devices_take_each_place_once_and_a_resumed_run_takes_the_rest(
    steps: int, batch: int, world: int, first: int
) -> None:
    devices = [
        list(Places(steps=steps, batch=batch, rank=rank, world=world)) for rank in range(world)
    ]
    taken = sorted(place for device in devices for share in device for place in share)
    assert taken == list(range(steps * batch * world))
    # A step takes the same places on however many devices they are spread.
    together = list(Places(steps=steps, batch=batch * world))
    for step, shares in enumerate(zip(*devices, strict=True)):
        assert [place for share in shares for place in share] == together[step]
    for rank, device in enumerate(devices):
        rest = Places(steps=steps, batch=batch, first=first, rank=rank, world=world)
        assert list(rest) == device[first:]
        assert len(rest) == steps  # what Lightning counts to


@given(count=st.integers(1, 9), world=st.integers(1, 4))
def test_devices_look_at_each_picture_equally_often(count: int, world: int) -> None:
    shares = [share_of(count, rank=rank, world=world) for rank in range(world)]
    seen = Counter(picture for share in shares for picture in share)
    assert set(seen) == set(range(count))
    assert len(set(seen.values())) == 1
    assert all(len(share) for share in shares), "a device without pictures would not come along"
