"""The order of samples by `train_sampling_strategy` group_by_length: of a seed and an epoch, as that of `random` is.

The sampler of Transformers draws it from the random numbers of the run: after a stop within an epoch it is another one,
so that samples come again or not at all, and processes that have drawn different numbers share no order.
"""

from collections.abc import Callable, Iterator

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededGroups(LengthGroupedSampler):
    """Batches of samples of similar length.

    Args:
        sampler: whose lengths and batch size it has.
        seed: of the data.
        epoch: gives the number of the epoch that is about to begin.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        super().__init__(sampler.batch_size, lengths=sampler.lengths)
        self._seed, self._epoch = seed, epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self._seed + self._epoch())
        return super().__iter__()
