"""Owning: requests whose tensors nobody else writes to.

Duty: copy what a ticket was given, for requests that run while their caller goes on. Used where
requests are submitted, streamed, or tried.
"""

from __future__ import annotations

import torch

from cellc.carry import Late
from cellc.copier import Copier
from cellc.ticket import Ticket


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
    """As `clone`, by numpy where it can: torch takes longer for small ones, and for large ones
    wakes threads, which then spin for long on processors that launches need.
    """
    given = tensor.detach() if tensor.requires_grad else tensor
    if type(given) is torch.Tensor:
        try:
            return torch.from_numpy(given.numpy().copy("K"))
        except (TypeError, RuntimeError):  # numpy has no such numbers, or nothing of that device
            pass
    return given.detach().clone()
