"""Words of the demo data. `TRAIN` and `TEST` share no name, no room and no sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What requests of one split are made of.

    In sentences, {room}, {who}, {day} and {time} stand for the values, {when} for a day and a
    time in either order.
    """

    names: tuple[str, ...]
    book: tuple[str, ...]
    cancel: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TRAIN = Words(
    names=_split(
        "Ana|Ben|Carla|Dev|Elif|Farid|Grace|Hugo|Iris|Jamal|Kai|Lena|Mo|Nora|Omar|Priya|Quinn|"
        "Rosa|Sam|Tara|Uma|Victor|Wen|Xena|Yusuf|Zoe|Adam|Bella|Chen|Diego|Emma|Felix|Gita|"
        "Hannah|Ivan|Julia|Kofi|Laura|Marco|Nina|Oscar|Petra|Rafael|Sofia|Tomas|Ursula|Vera|"
        "William|Ximena|Yara|Zeynep|Abdul|Bianca|Claire|Daniel|Erik|Fiona|Georg|Helen|Ingrid|"
        "Jonas|Keiko|Liam|Mateo|Noah|Olga|Pablo|Rahul|Sven|Theo|Anita|Boris|Camille|Dmitri|"
        "Esther|Frank|Greta|Hassan|Isabel|Jack|Molly|Simon|Paula|Edgar|Nadine|Ruben|Silvia|"
        "Tobias|Vivian|Walter|Agnes|Bernard|Cecilia|Dominic|Edith|Florian|Gloria|Harald|Irene|"
        "Joseph|Katrin|Leonard|Miriam|Norbert|Ophelia|Philip|Ramona|Sebastian|Teresa|Ulysses|"
        "Veronica|Wesley|Xavier|Yvonne|Zelda|Andre|Brigitte|Cedric|Deborah|Emil|Francesca|"
        "Gregory|Hilda|Igor|Josephine|Kenneth|Lucinda|Maurice|Natalia|Orlando|Patricia|Quentin|"
        "Rebecca|Stefan|Tamara|Vincent|Winston|Alejandro|Bettina|Christopher|Daniela|Eduardo|"
        "Fabian|Giovanni|Hector|Isolde|Jerome|Konrad|Lydia|Margarita|Nikolai|Octavia|Pavel"
    ),
    book=_split(
        "Please book {room} for {who} {when}.|"
        "Can you book {room} {when} for {who}?|"
        "{who} needs {room} {when}.|"
        "I need {room} {when}. The name is {who}.|"
        "Put {who} down for {room} {when}.|"
        "Is {room} free {when}? If so, book it for {who}.|"
        "Book {room}, {when}, name {who}.|"
        "We would like {room} {when}, it is for {who}.|"
        "Could {who} have {room} {when}, please?|"
        "New booking: {room} {when}, {who}.|"
        "{who} would like to use {room} {when}.|"
        "Reserve {room} for {who} {when}, thanks.|"
        "Hold {room} {when} for {who}.|"
        "{who} is meeting a client in {room} {when}, please book it.|"
        "For {who}: {room} {when}.|"
        "Give {room} to {who} {when}.|"
        "The team of {who} will be in {room} {when}.|"
        "Add a booking of {room} {when} under {who}.|"
        "Let {who} have {room} {when}.|"
        "Make sure that {who} gets {room} {when}."
    ),
    cancel=_split(
        "Please cancel {room} for {who} {when}.|"
        "Cancel the booking of {who} for {room} {when}.|"
        "{who} does not need {room} {when} any more.|"
        "{who} will not come to {room} {when}.|"
        "Free {room} {when}, {who} cannot make it.|"
        "The meeting of {who} in {room} {when} is off.|"
        "Take {who} off {room} {when}.|"
        "We no longer want {room} {when}, it was for {who}.|"
        "Drop the reservation of {room} {when} for {who}.|"
        "Can you cancel {room} {when}? It is under {who}.|"
        "{who} is ill, so cancel {room} {when}.|"
        "Cancelled: {room} {when}, {who}.|"
        "Remove {who} from {room} {when}.|"
        "Nobody will use {room} {when}; it was booked by {who}.|"
        "Please delete the booking {when} of {room} by {who}.|"
        "{room} {when} is not needed, tell {who}.|"
        "Give up {room} {when}, says {who}.|"
        "Sorry, {who} must cancel {room} {when}."
    ),
)

TEST = Words(
    names=_split(
        "Aisha|Bruno|Cyril|Delphine|Enzo|Freya|Gideon|Henrik|Imani|Joaquin|Katya|Lorenzo|"
        "Mireille|Nadia|Otto|Phoebe|Ravi|Saoirse|Thandi|Ulrich|Valeria|Wanda|Yolanda|Zachary|"
        "Amara|Beatriz|Callum|Darius|Eleni|Fatima|Gustavo|Hyun|Ines|Jasper|Kwame|Leila|Magnus|"
        "Naoko|Ottilie|Stelios"
    ),
    book=_split(
        "I'd love to get {room} {when} on behalf of {who}.|"
        "{who} asked me to reserve {room} {when}.|"
        "Write {who} into the schedule of {room} {when}.|"
        "Set {room} aside for {who} {when}.|"
        "Would it be possible to have {room} {when}? {who} is my name."
    ),
    cancel=_split(
        "Change of plan: {who} won't be needing {room} {when}.|"
        "Kindly call off the reservation by {who} of {room} {when}.|"
        "{room} can be given to others {when}, because {who} is away.|"
        "Scrap what {who} booked {when} in {room}.|"
        "Strike {who} from the list of {room} {when}."
    ),
)
