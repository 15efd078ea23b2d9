"""Words of the demo data. `TRAIN` and `TEST` do not share names, rooms or sentences."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """Vocabulary of the requests of one split.

    In sentences, {room} and {who} are the values, {when} is a day and a time in either order, and
    {do} is one of the verbs.
    """

    names: tuple[str, ...]
    book: tuple[str, ...]
    cancel: tuple[str, ...]
    book_verbs: tuple[str, ...] = ()
    cancel_verbs: tuple[str, ...] = ()


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TRAIN = Words(
    names=_split(
        "Abbott|Acosta|Adler|Ahmed|Alvarez|Andersen|Arnold|Bailey|Baker|Banerjee|"
        "Barros|Bauer|Becker|Bennett|Berg|Bianchi|Bishop|Blanc|Bondar|Bright|Brown|"
        "Burke|Campos|Carter|Castro|Chandra|Chen|Clarke|Cohen|Cooper|Costa|Cruz|"
        "Dalton|Davies|Demir|Dixon|Dubois|Duncan|Eriksen|Evans|Farah|Fischer|Fleming|"
        "Fontaine|Foster|Fraser|Fuchs|Garcia|Gibson|Gomez|Grant|Gupta|Haas|Hansen|"
        "Harper|Hassan|Hayashi|Hernandez|Hoffmann|Holm|Horvat|Hughes|Ibrahim|Ivanov|"
        "Jackson|Jansen|Jensen|Johansson|Joshi|Kaplan|Karlsson|Kaya|Keller|Kelly|"
        "Khan|Kim|Klein|Koch|Kowalski|Kruger|Kumar|Lambert|Larsen|Laurent|Lehmann|"
        "Leroy|Lewis|Lindberg|Lopez|Lund|Maier|Marino|Martin|Mason|Mehta|Meyer|"
        "Mills|Mitchell|Molina|Moreau|Morgan|Moser|Murphy|Nakamura|Navarro|Nelson|"
        "Nguyen|Nielsen|Novak|Ochoa|Olsen|Ortega|Owens|Palmer|Park|Patel|Pereira|"
        "Perez|Petrov|Phillips|Popescu|Porter|Quinn|Rahman|Ramos|Reed|Reyes|Ricci|"
        "Rivera|Rossi|Roy|Russo|Ryan|Sato|Schmidt|Schneider|Serrano|Shah|Sharma|"
        "Silva|Singh|Smith|Sokolov|Suzuki|Tanaka|Taylor|Torres|Turner|Vargas|Vega|"
        "Vogel|Wagner|Walker|Wang|Weber|Wilson|Wolf|Wright|Yamada|Yang|Young|Zhang|"
        "Ziegler"
    ),
    # Many verbs in a few sentences, so that the model generalises to new verbs.
    book_verbs=_split(
        "book|reserve|hold|keep|block|save|secure|get|arrange|schedule|claim|grab|request|take|"
        "assign|allocate|order|find|organise|earmark|lock in|ask for|pick|prepare|sort out|bag|"
        "confirm|guarantee|provide|obtain"
    ),
    book=_split(
        "{do} {room} {when} for {who}.|"
        "Please {do} {room} for {who} {when}.|"
        "Can you {do} {room} {when}? It is for {who}.|"
        "{who} wants to {do} {room} {when}.|"
        "I have to {do} {room} {when}, name {who}.|"
        "We should {do} {room} {when}, {who} has visitors.|"
        "{do} a slot in {room} {when} for {who}.|"
        "{who} told us to {do} {room} {when}.|"
        "Confirm the reservation of {room} by {who} {when}.|"
        "Make a reservation of {room} {when}, {who} is the name.|"
        "Put {who} down for {room} {when}.|"
        "Enter {who} in the calendar of {room} {when}.|"
        "Add {who} to the plan of {room} {when}.|"
        "Sign {who} up for {room} {when}.|"
        "Pencil {who} in for {room} {when}.|"
        "Place {who} on the sheet of {room} {when}.|"
        "Keep {room} clear for {who} {when}.|"
        "Lay {room} by for {who} {when}.|"
        "Put {room} aside for {who} {when}.|"
        "Keep others off {room} {when}, because {who} is coming.|"
        "{who} needs {room} {when}.|"
        "{who} would like to use {room} {when}.|"
        "Is {room} free {when}? If so, {who} will take it.|"
        "{who} is meeting a client in {room} {when}.|"
        "The team of {who} will be in {room} {when}.|"
        "Could {who} have {room} {when}, please?|"
        "Make sure that {who} gets {room} {when}.|"
        "New plan: {who} is going to use {room} {when}.|"
        "{room} goes to {who} {when}.|"
        "New booking: {room} {when}, {who}.|"
        "For {who}: {room} {when}.|"
        "Nobody else may have {room} {when}, because {who} has a talk there."
    ),
    cancel_verbs=_split(
        "cancel|drop|delete|remove|release|free up|clear|undo|withdraw|scratch|void|revoke|"
        "annul|erase|wipe out|give back|let go of|forget|kill|discard|retract|abandon|return|"
        "throw out|dump|get rid of|axe|give up|reverse|rub out|cut|quit"
    ),
    cancel=_split(
        "{do} {room} {when} for {who}.|"
        "Please {do} {room} for {who} {when}.|"
        "Can you {do} {room} {when}? It was for {who}.|"
        "{who} wants to {do} {room} {when}.|"
        "I have to {do} {room} {when}, name {who}.|"
        "We should {do} {room} {when}, {who} has no visitors.|"
        "{do} the slot in {room} {when} for {who}.|"
        "{who} told us to {do} {room} {when}.|"
        "{do} the reservation of {room} by {who} {when}.|"
        "{do} everything that {who} has {when} in {room}.|"
        "{do} the booking {when} that {who} made of {room}.|"
        "{do} whatever is reserved {when} in {room} for {who}.|"
        "Take {who} off {room} {when}.|"
        "Cross {who} out of the calendar of {room} {when}.|"
        "Delete {who} from the plan of {room} {when}.|"
        "Wipe {who} off the sheet of {room} {when}.|"
        "Remove {who} from {room} {when}.|"
        "The meeting of {who} in {room} {when} is off.|"
        "Do not keep {room} {when}, {who} is ill.|"
        "{who} does not need {room} {when} any more.|"
        "{who} will not come to {room} {when}.|"
        "It turns out that {who} has no use for {room} {when}.|"
        "{who} isn't going to use {room} {when} after all.|"
        "New plan: {who} doesn't want {room} {when}.|"
        "Sorry, {who} cannot make it to {room} {when}.|"
        "Nobody will use {room} {when}; it was booked by {who}.|"
        "{room} is not needed {when}, tell {who}.|"
        "Somebody else may have {room} {when}, because {who} is ill.|"
        "{room} is open to anyone {when}, as {who} has left.|"
        "{room} goes back to the pool {when}, since {who} is on leave.|"
        "Let another team use {room} {when}, {who} has no time.|"
        "Cancelled: {room} {when}, {who}."
    ),
)

TEST = Words(
    names=_split(
        "Achebe|Barbosa|Brandt|Calder|Dlamini|Echeverria|Fitzgerald|Gallagher|Hakimi|"
        "Ishikawa|Jovanovic|Kovacs|Lombardi|MacLeod|Mbeki|Nordin|Okafor|Papadakis|"
        "Quispe|Rasmussen|Szabo|Takahashi|Ueda|Vasquez|Whitaker|Xanthos|Yilmaz|"
        "Zielinski|Abernathy|Bergstrom|Castellano|Dimitrov|Eastwood|Ferrari|Goldstein|"
        "Haraldsen|Iyer|Juarez|Kaminski|Lindqvist"
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
