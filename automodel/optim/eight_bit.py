"""The AdamW of bitsandbytes, in the form in which its state can be saved parameter by parameter."""

from __future__ import annotations

import torch
from bitsandbytes.optim import AdamW8bit as _AdamW8bit


class AdamW8bit(_AdamW8bit):
    """AdamW whose state has 8 bits a number, in blocks of 256 with a scale each (Dettmers et al. 2022).

    The package nests its state for another wrapper; torch's form is flat, as checkpoints need it.
    """

    state_dict = torch.optim.Optimizer.state_dict
