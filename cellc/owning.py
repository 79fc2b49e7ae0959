"""Owning: requests whose tensors nobody else writes to.

Duty: copy what a ticket was given, for requests that run while their caller goes on. Used where
requests are submitted, streamed, or tried.
"""

from __future__ import annotations

import numpy as np
import torch

from cellc.carry import Late
from cellc.copier import Copier
from cellc.ticket import Ticket

ALONE = 1 << 15  # elements that torch copies without its threads


def owned(ticket: Ticket) -> Ticket:
    """With tensors of its own, whatever the caller does to those given."""
    late = ticket.tensors
    if isinstance(late, Late):  # nobody writes to what is carried
        given = [copied(t) for t in late.given]
        ticket.tensors = Late(late.form, given, late.blocks, late.row)
    else:
        ticket.tensors = [copied(t) for t in late]
    if ticket.call is not None:
        ticket.call = Copier(lambda leaf, _: copied(leaf)).call(*ticket.call)
    return ticket


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """As `clone`, but torch's threads stay asleep: once woken by a long request, they spin for
    long on processors that launches need.
    """
    given = tensor.detach()
    plain = type(given) is torch.Tensor and given.is_cpu and given.layout is torch.strided
    if not plain or given.numel() <= ALONE or not _in_numpy(given):
        return given.clone()
    made = torch.empty_like(given)
    np.copyto(made.numpy(), given.numpy())
    return made


def _in_numpy(tensor: torch.Tensor) -> bool:
    return tensor.dtype is not torch.bfloat16 and not (tensor.is_neg() or tensor.is_conj())
