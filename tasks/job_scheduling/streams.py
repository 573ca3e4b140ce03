"""Random streams of the cluster simulator: the Mersenne Twister as Python draws from it, and CPython's order of sets.

Published episodes depend on both: durations are drawn with Python's ``random``, and the executor that leaves a pool is
the one that ``set.pop`` gives.
"""

import numpy as np

from tasks.job_scheduling.state import DRAWS, NONE, SEED, inlined, kernel

PROBES = 9
"""Neighbouring entries that CPython's sets look at before they jump."""
EMPTY, DELETED = -1, -2


@inlined
def word(twister):  # type: ignore[no-untyped-def]
    """Next 32 bits of MT19937 (Matsumoto and Nishimura, 1998)."""
    at = twister[624]
    if at >= 624:
        for k in range(624):
            y = (twister[k] & 0x80000000) | (twister[(k + 1) % 624] & 0x7FFFFFFF)
            value = twister[(k + 397) % 624] ^ (y >> 1)
            twister[k] = value ^ 0x9908B0DF if y & 1 else value
        at = 0
    y = twister[at]
    twister[624] = at + 1
    y ^= y >> 11
    y ^= (y << 7) & 0x9D2C5680
    y ^= (y << 15) & 0xEFC60000
    return y ^ (y >> 18)


@inlined
def uniform(twister):  # type: ignore[no-untyped-def]
    """What ``random.random()`` returns."""
    high, low = word(twister) >> 5, word(twister) >> 6
    return (high * 67108864.0 + low) / 9007199254740992.0


@inlined
def below(twister, count):  # type: ignore[no-untyped-def]
    """Index that ``random.choice`` takes of a list with so many elements."""
    bits = 0
    while count >> bits:
        bits += 1
    drawn = word(twister) >> (32 - bits)
    while drawn >= count:
        drawn = word(twister) >> (32 - bits)
    return drawn


@kernel
def uniform_of(seed, draw):  # type: ignore[no-untyped-def]
    """Number in [0, 1) that depends on a seed and a number only (SplitMix64, Steele et al. 2014)."""
    z = np.uint64(seed) * np.uint64(0xD1342543DE82EF95) + np.uint64(draw) * np.uint64(0x9E3779B97F4A7C15)
    for _ in range(2):  # one round leaves consecutive seeds correlated
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return float(z >> np.uint64(11)) / 9007199254740992.0


@inlined
def counted(episode):  # type: ignore[no-untyped-def]
    """Next number in [0, 1) of an episode's own stream."""
    glob = episode.glob
    glob[DRAWS] += 1
    return uniform_of(glob[SEED], glob[DRAWS] - 1)


@kernel
def place(table, mask, key):  # type: ignore[no-untyped-def]
    """Entry for a key that the table does not hold: the first deleted one on its way, or the empty one at its end."""
    at, perturb = key & mask, key
    deleted = NONE
    while True:
        probes = PROBES if at + PROBES <= mask else 0
        for k in range(at, at + probes + 1):
            if table[k] == EMPTY:
                return k if deleted == NONE else deleted
            if table[k] == DELETED:
                deleted = k
        perturb >>= 5
        at = (at * 5 + 1 + perturb) & mask


@kernel
def add(table, shape, key, spare):  # type: ignore[no-untyped-def]
    """Add a key that the set (table, [used, filled, mask]) does not hold; spare: room for a table."""
    at = place(table, shape[2], key)
    shape[0] += 1
    if table[at] == EMPTY:
        shape[1] += 1
    table[at] = key
    if shape[1] * 5 >= shape[2] * 3:
        size = 8
        while size <= shape[0] * 4:
            size <<= 1
        for k in range(shape[2] + 1):
            spare[k] = table[k]
        table[:size] = EMPTY
        for k in range(shape[2] + 1):
            if spare[k] >= 0:
                table[place(table, size - 1, np.int64(spare[k]))] = spare[k]
        shape[1], shape[2] = shape[0], size - 1


@kernel
def discard(table, shape, key):  # type: ignore[no-untyped-def]
    """Remove a key."""
    mask = shape[2]
    at, perturb = key & mask, key
    while True:
        probes = PROBES if at + PROBES <= mask else 0
        for k in range(at, at + probes + 1):
            if table[k] == key:
                table[k] = DELETED
                shape[0] -= 1
                return
        perturb >>= 5
        at = (at * 5 + 1 + perturb) & mask


@kernel
def capacity(keys):  # type: ignore[no-untyped-def]
    """Size of the largest table that a set of so many keys can come to have."""
    size = 8
    while size <= keys * 4:
        size <<= 1
    return size
