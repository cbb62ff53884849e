"""The order of training: the picture at each place, and the places that each step takes.

Both are functions of the seed, the place and the step, so a training that was killed and started
again goes on as if nothing had happened.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from tokenstep.data.labelled_folder import LabelledFolder


class Stream(Dataset[tuple[Tensor, Tensor]]):
    """The pictures of a phase in the order of training, each drawn from the seed and its place.

    Item ``k`` is the same picture under the same augmentation in every run, whatever came before.
    """

    def __init__(self, folder: LabelledFolder, *, seed: int, length: int) -> None:
        self.folder = folder
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        """The places of the phase."""
        return self.length

    def __getitem__(self, place: int) -> tuple[Tensor, Tensor]:
        """Picture ``(3, *crop)`` float and label ``(*crop)`` int64."""
        epoch, within = divmod(place, len(self.folder))
        shuffle = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        picture = int(torch.randperm(len(self.folder), generator=shuffle)[within])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + place)
            return self.folder[picture]


class Places(Sampler[list[int]]):
    """The places of the stream that each step of one device takes, from step ``first`` on.

    A step takes ``batch`` places for each of ``world`` devices; the device ``rank`` gets the
    ``rank``-th of these shares. The length is that of the whole phase, since Lightning counts its
    batches from ``first`` too.
    """

    def __init__(
        self, *, steps: int, batch: int, first: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        self.steps = steps
        self.batch = batch
        self.first = first
        self.rank = rank
        self.world = world

    def __len__(self) -> int:
        """The steps of the phase."""
        return self.steps

    def __iter__(self) -> Iterator[list[int]]:
        """The places of one step after the other."""
        for step in range(self.first, self.steps):
            start = (step * self.world + self.rank) * self.batch
            yield list(range(start, start + self.batch))


def share_of(count: int, *, rank: int, world: int) -> range:
    """The pictures of ``count`` that one of ``world`` devices looks at; together each of them once.

    Fewer pictures than devices are looked at by all, which leaves the shares of pixels as they are;
    a device without any would not come to where the counts are summed.
    """
    return range(rank, count, world) if count >= world else range(count)
