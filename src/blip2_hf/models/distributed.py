"""Gathering rows of tensors across the processes of a data-parallel run, with gradients."""

import bisect
import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd import Function
from torch.nn.functional import pad


@dataclass
class GlobalBatch:
    r"""
    The distribution of a batch's rows over processes, those of process 0 first.

    Args:
        rows (`list[int]`):
            Number of rows of each process.
        rank (`int`):
            Rank of this process.
        length (`int`):
            Length of the longest text of all processes.
    """

    rows: list[int]
    rank: int
    length: int

    @classmethod
    def of(cls, rows: int, length: int, device: torch.device) -> "GlobalBatch":
        """Return the global batch to which this process adds `rows` texts of `length`; ask the other processes."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls([rows], 0, length)
        sizes = torch.tensor([[rows, length]], device=device)
        gathered = [torch.empty_like(sizes) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, sizes)
        counts, lengths = zip(*torch.cat(gathered).tolist(), strict=True)
        return cls(list(counts), dist.get_rank(), max(lengths))

    @property
    def world_size(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        return sum(self.rows)

    @property
    def start(self) -> int:
        """Return the index of this process's first row."""
        return sum(self.rows[: self.rank])

    def mean_share(self, num_items: torch.Tensor) -> torch.Tensor:
        """
        Return the divisor of the sum over this process's items that makes the mean over processes, which data
        parallelism takes of losses and gradients, the mean over all items.

        Args:
            num_items (`torch.Tensor` of shape `()`):
                Number of items in this process.
        """
        num_items = num_items.detach().clone().float()
        if self.world_size > 1:
            dist.all_reduce(num_items)
        return num_items / self.world_size

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """
        Return the rows of all processes. Gradients flow back to the process that a row comes from.

        Args:
            tensor (`torch.Tensor` of shape `(rows of this process, ...)`):
                Its trailing shape is the same in every process.

        Returns:
            `torch.Tensor` of shape `(size, ...)`.
        """
        return tensor if self.world_size == 1 else _Gather.apply(tensor, self.rows, self.rank)

    def gather_padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Gather tensors of shape `(rows, length, ...)` whose lengths differ between processes."""
        padding = (0, 0) * (tensor.dim() - 2) + (0, self.length - tensor.shape[1])
        return self.gather(pad(tensor, padding))

    def fetch(self, tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """
        Return some rows of all processes. Only requested rows are sent, once for each time that `index` has them.
        Gradients flow back to the process that a row comes from.

        Args:
            tensor (`torch.Tensor` of shape `(rows of this process, ...)`):
                Its trailing shape is the same in every process.
            index (`torch.LongTensor` of shape `(num_rows,)`):
                The rows, out of `size`, that this process requests: at most the largest number of rows of a process.

        Returns:
            `torch.Tensor` of shape `(num_rows, ...)`.
        """
        return tensor[index] if self.world_size == 1 else _Fetch.apply(tensor, index, self.rows, self.rank)


class _Gather(Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, rows: list[int], rank: int) -> torch.Tensor:
        ctx.rows, ctx.rank = rows, rank
        padded = tensor.new_zeros(max(rows), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(gathered, padded)
        return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        start = sum(ctx.rows[: ctx.rank])
        return gradient[start : start + ctx.rows[ctx.rank]], None, None


class _Fetch(Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, index: torch.Tensor, rows: list[int], rank: int) -> torch.Tensor:
        wanted = _all_gather_index(index, max(rows))
        start = sum(rows[:rank])
        to_send = [[row - start for row in of_one if start <= row < start + rows[rank]] for of_one in wanted]
        ends = list(itertools.accumulate(rows))
        owners = [bisect.bisect_right(ends, row) for row in wanted[rank]]
        # Rows from the same process arrive next to each other
        order = sorted(range(len(owners)), key=owners.__getitem__)
        place = torch.tensor(order, dtype=torch.long, device=index.device).argsort()
        own = torch.tensor([row for of_one in to_send for row in of_one], dtype=torch.long, device=index.device)
        send_counts = [len(of_one) for of_one in to_send]
        receive_counts = [owners.count(owner) for owner in range(len(rows))]
        received = tensor.new_empty(len(owners), *tensor.shape[1:])
        dist.all_to_all_single(received, tensor[own], receive_counts, send_counts)
        ctx.save_for_backward(own, place)
        ctx.counts, ctx.shape = (send_counts, receive_counts), tensor.shape
        return received[place]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        own, place = ctx.saved_tensors
        send_counts, receive_counts = ctx.counts
        received = gradient.new_empty(len(own), *gradient.shape[1:])
        dist.all_to_all_single(received, gradient[place.argsort()], send_counts, receive_counts)
        return gradient.new_zeros(ctx.shape).index_add_(0, own, received), None, None, None


def _all_gather_index(index: torch.Tensor, length: int) -> list[list[int]]:
    """Return the rows that each process requests, at most `length`, on the CPU."""
    padded = pad(index, (0, length - len(index)), value=-1)
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    return [[row for row in of_one if row >= 0] for of_one in torch.stack(gathered).tolist()]
