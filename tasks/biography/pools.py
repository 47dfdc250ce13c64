"""Names and values of the made-up world, put together from syllables and word lists."""

from collections.abc import Callable, Iterator
from itertools import islice, product

from cl_bench.contracts.errors import UsageError

ATTRIBUTES = ("birthday", "birth_city", "university", "major", "company", "company_city")
"""In the order in which questions about a person are asked."""

FULL_SIZES = {
    "birthday": 200 * 12 * 28,
    "birth_city": 200,
    "university": 300,
    "major": 100,
    "company": 263,
    "company_city": 200,
}
NAME_SIZES = (400, 400, 1000)
"""First, middle and last names."""


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words("Al Be Ca Da El Fa Ga He Is Jo Ka Le Ma Ne Or Pe Ro Sa Te Vi")
_SECOND = _words(
    "bra dan del dric fina gar lan len lia lin mar mir na nell nor ra ric rina sel son "
    "ta than thea tor va vard vin wen xa zel bert cina dora fred gild helm jun kor lotte mund"
)
_FAMILY = _words(
    "Ack Bar Bren Cald Corn Dray Eld Fen Gart Hal Hart Kess Lang Lind Marl Nor Oak Pem Quil Rad "
    "Stan Thorn Ulver Wex Yar"
)
_FAMILY_END = _words(
    "away berg bourne by combe croft dale den dyke ell erman ett field gate ham hart house hurst "
    "ing ker land ley lock man mere mond more nell ney quist ridge ris row shaw son stead ton "
    "ward well wick"
)
_PLACE = _words("Ald Birch Clear Deer Ever Fair Glen High Iron Lake Maple New Oster Pine River")
_PLACE += _words("Silver Stone West Wind Winter")
_PLACE_END = _words("borough bridge burg bury dale fall field ford grove haven mill mont mouth")
_PLACE_END += _words("port ridge side stead ton view ville")
_STATES = _words(
    "AL AK AZ AR CA CO CT DE FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ NM "
    "NY NC ND OH OK OR PA RI SC SD TN TX UT VT VA WA WV WI WY"
)
_FOUNDERS = _words("Ash Bel Cor Dun Ems Fal Gor Hol Ivers Jar")
_FOUNDERS_END = _words("bury court don ford gate lyn mere stoke well worth")
_SUBJECTS = _words(
    "Accounting Acoustics Agronomy Anthropology Archaeology Architecture Astronomy Biochemistry "
    "Biology Botany Chemistry Cinematography Climatology Criminology Dance Demography Dentistry "
    "Ecology Economics Education Engineering Epidemiology Ethics Finance Forestry Genetics "
    "Geography Geology History Horticulture Hydrology Immunology Journalism Law Linguistics "
    "Logistics Marketing Mathematics Metallurgy Music Nursing Nutrition Optics Pharmacy Philosophy "
    "Physics Psychology Sociology Statistics Theology"
)
_BRANDS = _words(
    "Acrion Belmira Centora Dynexa Elvaro Fulgent Granidor Helixon Inverta Jovian Kestrel Lumeris "
    "Morvana Nexalo Orbisa Paragon Quantor Rivalis Solvent Tectora Umbrix Veridia Wendell Xylon "
    "Yarrow Zephyra Argonix Brightmoor Cobalta Dorsey"
)
_BRANDS_END = _words("Energy Foods Group Holdings Industries Labs Logistics Motors Systems")
_MONTHS = _words(
    "January February March April May June July August September October November December"
)


def names(sizes: tuple[int, int, int]) -> list[list[str]]:
    """First, middle and last names; first and middle ones have none in common.

    Raises:
        UsageError: more are asked for than there are.
    """
    given = [head + tail for tail, head in product(_SECOND, _FIRST)]
    family = [head + tail for tail, head in product(_FAMILY_END, _FAMILY)]
    pools = [given[:400], given[400:800], family[:1000]]
    for key, size, pool in zip(("first", "middle", "last"), sizes, pools, strict=True):
        if not 1 <= size <= len(pool):
            raise UsageError(f"stream.names: {size} {key} names; there are {len(pool)}")
    return [pool[:size] for pool, size in zip(pools, sizes, strict=True)]


def values(attribute: str, size: int) -> list[str]:
    """The texts of an attribute's values.

    Raises:
        UsageError: no such attribute, or more values than it has.
    """
    if attribute not in FULL_SIZES:
        raise UsageError(
            f"stream.attributes: no attribute {attribute!r}; there are {', '.join(ATTRIBUTES)}"
        )
    if not 2 <= size <= FULL_SIZES[attribute]:
        raise UsageError(
            f"stream.attributes.{attribute}={size}: between 2 and {FULL_SIZES[attribute]} values"
        )
    found = list(islice(_POOLS[attribute](), size))
    assert len(set(found)) == size
    return found


def _birthdays() -> Iterator[str]:
    for year, month, day in product(range(1900, 2100), _MONTHS, range(1, 29)):
        yield f"{month} {day}, {year}"


def _cities() -> Iterator[str]:
    for i, (tail, head) in enumerate(product(_PLACE_END, _PLACE)):
        yield f"{head}{tail}, {_STATES[7 * i % len(_STATES)]}"


def _universities() -> Iterator[str]:
    # All shapes occur in a small pool too: first tokens are then shared, as they are in life.
    for tail, head in product(_FOUNDERS_END, _FOUNDERS):
        yield from (f"University of {head}{tail}", f"{head}{tail} State University")
        yield f"{head}{tail} Institute of Technology"


def _majors() -> Iterator[str]:
    return (subject + form for form in ("", " Studies") for subject in _SUBJECTS)


def _companies() -> Iterator[str]:
    return (f"{brand} {end}" for end in _BRANDS_END for brand in _BRANDS)


_POOLS: dict[str, Callable[[], Iterator[str]]] = {
    "birthday": _birthdays,
    "birth_city": _cities,
    "university": _universities,
    "major": _majors,
    "company": _companies,
    "company_city": lambda: islice(_cities(), FULL_SIZES["birth_city"], None),
}
