"""Ranks that share one model's experts, or each row's tokens: who they are, and what they tell each other.

Experts: of E routed experts rank r of a group of P holds [r·E/P, (r + 1)·E/P) of every layer; rows go to the rank of
their expert and come back. DeepSpeed's own layer (AutoEP) would bring its own router, which groups, steers and counts
otherwise than ours: of DeepSpeed are the process groups, and the sharding of parameters that only some ranks hold.

Rows: each rank of a group of P computes T/P of each row's tokens, and attention for H/P heads of all T (Ulysses: Jacobs
et al. 2023). Embeddings, convolution and media are computed of whole rows, as their cost is small and their reach is
not. To DeepSpeed these ranks are like any others: gradients are summed over all.

N rows of experts, D model width, E experts of all ranks, L of one, P ranks of a group, B batch, T tokens, H heads.
"""

from collections.abc import Callable, Iterable
from functools import partial

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd

from omniloom.model.attention import GroupedAttention, attend
from omniloom.model.config import ModelConfig
from omniloom.model.decoder import Decoder
from omniloom.model.mla import LatentAttention
from omniloom.model.moe import Experts
from omniloom.model.position import WHOLE_ROWS, Places, Rows


class _Mark(MoE):
    """By it ZeRO 0, 1 and 2 know that some parameters are not every rank's."""

    def __init__(self, experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are made already."""


def share_experts(module: nn.Module, ranks: int, zero_stage: int) -> None:
    """Leave this rank its share of each layer's experts, as they were drawn, in place.

    A group's ranks follow each other. ZeRO shards and sums a share over the ranks that hold the same one, and knows
    them by marks on the parameters.
    """
    if ranks == 1:
        return
    groups._create_expert_and_data_parallel(ranks)
    name = f"ep_size_{ranks}"
    group = groups._get_expert_parallel_group(name)
    for part in [part for part in module.modules() if isinstance(part, Experts)]:
        part.dispatch = partial(exchange, group=group)
        for key, whole in list(part.named_parameters(recurse=False)):
            share = nn.Parameter(whole.detach().chunk(ranks)[dist.get_rank(group)].clone())
            share.global_shape = tuple(whole.shape)  # type: ignore[attr-defined]
            share.global_offset = dist.get_rank(group) * share.numel()  # type: ignore[attr-defined]
            share.allreduce, share.group_name = False, name  # type: ignore[attr-defined]
            share.ds_zero_placement_family = "autoep_expert"  # type: ignore[attr-defined]
            share.ds_zero_partition_group_name = name  # type: ignore[attr-defined]
            same = groups._get_expert_data_parallel_group(name)
            share.ds_zero_partition_process_group = same  # type: ignore[attr-defined]
            setattr(part, key, share)
        mark = _Mark(part.number)
    if zero_stage < 3:
        module.add_module("mark_of_shared_experts", mark)


def is_shared(parameter: nn.Parameter) -> bool:
    """Whether this rank holds a share of it alone."""
    return hasattr(parameter, "global_shape")


def exchange(
    networks: Callable[[Tensor, Tensor], Tensor], sorted_ND: Tensor, rows_E: Tensor, group: dist.ProcessGroup
) -> Tensor:
    """Apply all ranks' experts to this rank's rows, sorted by expert, `rows_E` of each: (N, D), in their order."""
    sent_PL = rows_E.view(dist.get_world_size(group), -1)
    received_PL = torch.empty_like(sent_PL)
    dist.all_to_all_single(received_PL, sent_PL, group=group)
    sent, received = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
    arrived_ND = all_to_all_single_autograd(sorted_ND, received, sent, group)
    # They lie by the rank that they come from, and only within it by expert.
    expert_PL = torch.arange(received_PL.shape[1], device=rows_E.device).expand_as(received_PL)
    expert_N = expert_PL.flatten().repeat_interleave(received_PL.flatten(), output_size=len(arrived_ND))
    order = expert_N.argsort(stable=True)
    out_ND = networks(arrived_ND[order], received_PL.sum(0))
    back_ND = torch.zeros_like(out_ND).index_copy(0, order, out_ND)
    return all_to_all_single_autograd(back_ND, sent, received, group)


class SharedRows(Rows):
    """This rank's part of each row."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)

    def total(self, part_sum: Tensor) -> Tensor:
        dist.all_reduce(part_sum, group=self._group)
        return part_sum


def share_rows(module: nn.Module, ranks: int) -> Rows:
    """Let this rank compute its part of each row's tokens, in place; a group's ranks follow each other."""
    if ranks == 1:
        return WHOLE_ROWS
    group, _ = dist.new_subgroups(ranks)
    rows = SharedRows(group)
    for part in module.modules():
        if isinstance(part, Decoder):
            part.rows = rows
        elif isinstance(part, GroupedAttention | LatentAttention):
            part.attend = partial(attend_by_heads, group=group)
    return rows


@torch.compiler.disable  # type: ignore[untyped-decorator]  # a program for every packing otherwise
def attend_by_heads(
    query_BTHd: Tensor,
    key_BTKd: Tensor,
    value_BTKv: Tensor,
    places: Places,
    scale: float,
    config: ModelConfig,
    group: dist.ProcessGroup,
) -> Tensor:
    """`attend` for a part of the tokens: it is done for all tokens and a part of the heads; (B, T/P, H, v)."""
    ranks, heads, key_heads = dist.get_world_size(group), query_BTHd.shape[2], key_BTKd.shape[2]
    if key_heads % ranks:  # each rank needs the keys that its queries' heads share
        key_BTKd, value_BTKv = (x.repeat_interleave(heads // key_heads, dim=2) for x in (key_BTKd, value_BTKv))
    query, key, value = (_swap(x, 2, 1, group) for x in (query_BTHd, key_BTKd, value_BTKv))
    return _swap(attend(query, key, value, places, scale, config), 1, 2, group)


def _swap(x_BTHd: Tensor, split: int, join: int, group: dist.ProcessGroup) -> Tensor:
    """Send each rank its part of one dimension, and join what comes along another."""
    ranks = dist.get_world_size(group)
    sent = torch.stack(x_BTHd.chunk(ranks, dim=split))
    arrived = all_to_all_single_autograd(sent, [1] * ranks, [1] * ranks, group)
    return torch.cat(arrived.unbind(), dim=join)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm over all parameters of all ranks, of gradients that are summed already."""
    norms: dict[bool, list[Tensor]] = {False: [], True: []}
    group = None
    for parameter in parameters:
        if parameter.grad is not None:
            norms[is_shared(parameter)].append(parameter.grad.norm())
            group = getattr(parameter, "group_name", group)
    common, shared = (torch.stack(each).square().sum() if each else None for each in norms.values())
    if shared is not None:
        dist.all_reduce(shared, group=groups._get_expert_parallel_group(group))
    return sum(square for square in (common, shared) if square is not None) ** 0.5


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The whole model's weights; all ranks call it, rank 0 gets them."""
    weights = dict(module.state_dict())
    for name, parameter in module.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):  # of ZeRO 3's shards
            if is_shared(parameter):
                weights[name] = _join(parameter)
            elif hasattr(parameter, "ds_id"):
                weights[name] = parameter.detach().cpu()
    return weights if dist.get_rank() == 0 else {}


def _join(share: nn.Parameter) -> Tensor:
    """The shares of a group, on its first rank."""
    group = groups._get_expert_parallel_group(share.group_name)  # type: ignore[attr-defined]
    is_first = dist.get_rank(group) == 0
    shares = [torch.empty_like(share.data) for _ in range(dist.get_world_size(group))] if is_first else None
    dist.gather(share.data.contiguous(), shares, group=group, group_dst=0)
    return torch.cat(shares).cpu() if shares else share.detach()
