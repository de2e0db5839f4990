"""Text for tests: the same bytes on every machine and with every Python."""

from __future__ import annotations

import math
from random import Random

WORDS = """
the of and to in a is that it was for on are as with they be at one have this from or had by hot but
some what there we can out other were all your when up use word how said an each she which do their
time if will way about many then them would write like so these her long make thing see him two has
look more day could go come did my sound no most number who over know water than call first people
may down side been now find any new work part take get place made live where after back little only
round man year came show every good me give our under name very through just form much great think
say help low line before turn cause same mean differ move right boy old too does tell sentence set
three want air well also play small end put home read hand port large spell add even land here must
big high such follow act why ask men change went light kind off need house picture try us again
animal point mother world near build self earth father head stand own page should country found
answer school grow study still learn plant cover food sun four thought let keep eye never last door
between city tree cross since hard start might story saw far sea draw left late run while press
close night real life few stop open seem together next white children begin got walk example ease
paper often always music those both mark book letter until mile river car feet care second group
carry took rain eat room friend began idea fish mountain north once base hear horse cut sure watch
color face wood main enough plain girl usual young ready above ever red list though feel talk bird
""".split()  # noqa: SIM905
"""The most common first."""


def lines(count: int, seed: int) -> list[str]:
    """Lines of 0 to 96 characters, every seventh empty.

    Words are as frequent as in a language (the r-th in proportion to 1 / r), and which are likely
    depends on the word before, so that a model has something to learn. Only `Random.random` is
    drawn from: it is the one method whose numbers Python promises not to change.
    """
    random = Random(seed).random
    found = []
    for n in range(count):
        line, word = "", int(random() * len(WORDS))
        length = 0 if n % 7 == 6 else 1 + int(95 * random() ** 1.5)
        while len(line) < length:
            rank = int(math.exp(random() * math.log(len(WORDS))))  # 1..len(WORDS)
            word = (7 * word + rank) % len(WORDS) if random() < 0.5 else rank - 1
            line += WORDS[word] + " "
        found.append(line[:length].rstrip())
    return found
