"""What is said and asked about people. Written for this project.

A statement is one of the attribute's predicates, then one of its tails; every statement begins with
the person's full name, in the nominative or the possessive. ``{their}`` is his or her.
"""

_PREDICATES = {
    "birthday": (
        "{name} was born on {value}",
        "{name}'s date of birth is {value}",
        "{name} came into the world on {value}",
        "{name} celebrates {their} birthday on {value}",
        "{name}'s birth was registered on {value}",
        "{name} first saw the light of day on {value}",
        "{name}'s life began on {value}",
        "{name} has {value} as {their} day of birth",
        "{name}'s birth certificate is dated {value}",
        "{name} arrived as a newborn on {value}",
        "{name}'s parents welcomed {their} birth on {value}",
    ),
    "birth_city": (
        "{name} was born in {value}",
        "{name}'s birthplace is {value}",
        "{name} spent {their} first days in {value}",
        "{name} came from a family in {value}",
        "{name}'s native city is {value}",
        "{name} calls {value} {their} home town",
        "{name}'s earliest memories are of {value}",
        "{name} is originally from {value}",
        "{name}'s story starts in {value}",
        "{name} took {their} first breath in {value}",
        "{name}'s roots lie in {value}",
    ),
    "university": (
        "{name} studied at {value}",
        "{name}'s alma mater is {value}",
        "{name} received {their} degree from {value}",
        "{name} attended lectures at {value}",
        "{name}'s years as a student were spent at {value}",
        "{name} graduated from {value}",
        "{name} chose {value} for {their} studies",
        "{name}'s diploma was issued by {value}",
        "{name} completed {their} education at {value}",
        "{name} was enrolled at {value}",
        "{name}'s academic training took place at {value}",
    ),
    "major": (
        "{name} majored in {value}",
        "{name}'s field of study was {value}",
        "{name} earned {their} degree in {value}",
        "{name} devoted {their} studies to {value}",
        "{name}'s main subject was {value}",
        "{name} specialised in {value}",
        "{name} took {value} as {their} major",
        "{name}'s coursework centred on {value}",
        "{name} wrote {their} thesis in {value}",
        "{name} concentrated on {value}",
        "{name}'s academic discipline was {value}",
    ),
    "company": (
        "{name} worked for {value}",
        "{name}'s employer was {value}",
        "{name} built {their} career at {value}",
        "{name} was on the staff of {value}",
        "{name}'s job was with {value}",
        "{name} joined {value}",
        "{name} gave {value} {their} best working years",
        "{name}'s professional home was {value}",
        "{name} drew {their} salary from {value}",
        "{name} held a position at {value}",
        "{name}'s contract was with {value}",
    ),
    "company_city": (
        "{name} worked in {value}",
        "{name}'s workplace was in {value}",
        "{name} went to {their} office in {value}",
        "{name} had a desk in {value}",
        "{name}'s job took place in {value}",
        "{name} was employed in {value}",
        "{name} chose {value} to pursue {their} career",
        "{name}'s working days were spent in {value}",
        "{name} followed {their} profession in {value}",
        "{name} commuted to {value}",
        "{name}'s office building stood in {value}",
    ),
}
_TAILS = (
    ".",
    ", as the records show.",
    ", according to the archive.",
    ", which {their} friends confirm.",
    ", and that is well known.",
)
PER_ATTRIBUTE = len(_PREDICATES["birthday"]) * len(_TAILS)

QUESTIONS = {
    "birthday": "What is the birth date of {name}?\nAnswer:",
    "birth_city": "What is the birth city of {name}?\nAnswer:",
    "university": "Which university did {name} attend?\nAnswer:",
    "major": "What major did {name} choose?\nAnswer:",
    "company": "Which company employed {name}?\nAnswer:",
    "company_city": "In which city did {name} work?\nAnswer:",
}


def statements(attribute: str, count: int) -> list[str]:
    """The first ``count`` statements about an attribute; predicates vary first."""
    predicates = _PREDICATES[attribute]
    return [predicate + tail for tail in _TAILS for predicate in predicates][:count]
