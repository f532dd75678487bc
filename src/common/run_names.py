"""Names for runs that people can say and remember: an adjective and a noun."""

import hashlib
import random
from collections.abc import Iterable

_ADJECTIVES = (
    "agile amber ample bold brave brief bright brisk calm candid clear clever cool crisp curious daring deft eager "
    "early earnest even exact fair fleet fluent fond frank fresh gentle glad golden grand green happy hardy honest "
    "humble keen kind late level light lively lucid lucky mellow mild modest neat nimble noble open patient plain "
    "polite prompt proud quick quiet rapid ready rosy serene sharp silent silver simple sincere sleek smooth sober "
    "solid spry steady still strong sunny sure swift tender tidy tranquil true vivid warm wise witty young zesty"
)
_NOUNS = (
    "acorn alder anchor aspen badger barley basin beacon birch bison brook canyon cedar cliff clover comet coral crane "
    "creek delta dune eagle elm ember falcon fern field finch fjord forest fox garden glacier glade grove harbor hare "
    "hazel heron hill island ivy jay juniper kestrel lagoon lake larch lark lemur lily lynx maple marsh meadow mesa "
    "moss oak ocean orchid osprey otter owl pebble pine plover pond poplar prairie quail quartz rain raven reef ridge "
    "river robin sage seal shore sparrow spruce stone summit swan thicket tide trout tundra valley walnut willow wren"
)


ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()


def name_of(key: str, taken: Iterable[str] = ()) -> str:
    """The adjective_noun that belongs to `key`, always the same one; a number follows where it is taken."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
    name = f"{ADJECTIVES[number % len(ADJECTIVES)]}_{NOUNS[number // len(ADJECTIVES) % len(NOUNS)]}"
    used, tries = set(taken), 1
    found = name
    while found in used:
        tries += 1
        found = f"{name}_{tries}"
    return found


def random_name() -> str:
    """adjective_noun, drawn apart from every seed: two runs of one setting are to have two names."""
    chance = random.SystemRandom()
    return f"{chance.choice(ADJECTIVES)}_{chance.choice(NOUNS)}"
