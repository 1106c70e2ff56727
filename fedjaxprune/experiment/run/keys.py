"""What a key is for: numbers folded into the seed's key, so that none is used twice."""

INIT, ROUNDS, COHORT, VALIDATION = range(4)
