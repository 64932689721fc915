"""Small images and untrained networks, for the tests of completion."""

import functools

import torch
from hvpopt.experiments.completion.networks import energy, feedforward

from hvpopt.lightning.phases import Phase
from hvpopt.lightning.spen import SPENModule
from hvpopt.nested import Box, HeavyBall
from hvpopt.nested.losses import EndToEnd, FirstGuess, Minimizer


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=12):
    return torch.rand(count, 1, 8, 8, generator=seeded(9))


def module_of(kind, num_steps=5):
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    if kind == "feedforward":
        return SPENModule(
            feedforward([7]), optimizer, phases={"all": Phase(FirstGuess(task_loss="squared"))}
        )
    minimizer = Minimizer(
        HeavyBall(0.5, num_steps, momentum=0.5), Box(), adjoint="unrolled", start="initial"
    )
    phases = {"all": Phase(EndToEnd(task_loss="squared"))}
    return SPENModule(energy([9]), optimizer, phases=phases, minimizer=minimizer)
