"""A strategy of one's own: every rank holds the model, and gradients are summed after the last micro-batch."""

from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from automodel.distributed.parallel.handle import Handle, register_handle
from automodel.distributed.parallel.strategy import Strategy, build_mesh


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **options):
        return self.module(*args, **options)


@register_handle(Wrapper)
class SummedHandle(Handle):
    @contextmanager
    def sync_context(self, is_optim_step, *, defer):
        yield
        if is_optim_step:
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)

    def num_ranks_averaged(self, dp_size):
        return 1

    def groups(self):
        return [dist.group.WORLD]


class Summed(Strategy):
    name = "summed"

    def build_mesh(self, dist_info):
        return build_mesh(dist_info)

    def parallelize(self, model, *, dist_info, mesh):
        return Wrapper(model.to(dist_info.device))
