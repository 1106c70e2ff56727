"""One compiled round: the training round, reporting rounds, work at the server, simulation."""
