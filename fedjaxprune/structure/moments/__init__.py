"""Moments of what a network's weights meet: squares of inputs and of the gradients of outputs."""

from fedjaxprune import namespace

__all__, __getattr__, __dir__ = namespace.offer(__name__, names={"losses": "Moments of_loss uses"})
