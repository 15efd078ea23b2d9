"""Words of the demo data. `TRAIN` and `TEST` share no name, no item word and no whole sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What requests of one split are made of.

    In sentences, {what} and {who} stand for the values, {when} for a day or a day and a time, and
    {with} for an optional person. A capital ({When}) begins a sentence with the value.
    """

    names: tuple[str, ...]
    activities: dict[str, tuple[str, ...]]  # head word -> words that go before it
    tasks: dict[str, tuple[str, ...]]  # verb -> objects
    event_sentences: tuple[str, ...]
    reminder_sentences: tuple[str, ...]


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TRAIN = Words(
    names=_split(
        "Ana|Ben|Carla|Dev|Elif|Farid|Grace|Hugo|Iris|Jamal|Kai|Lena|Mo|Nora|Omar|Priya|Quinn|Rosa|"
        "Sam|Tara|Uma|Victor|Wen|Xena|Yusuf|Zoe|Adam|Bella|Chen|Diego|Emma|Felix|Gita|Hannah|Ivan|"
        "Julia|Kofi|Laura|Marco|Nina|Oscar|Petra|Rafael|Sofia|Tomas|Ursula|Vera|William|Ximena|Yara|"
        "Zeynep|Abdul|Bianca|Claire|Daniel|Erik|Fiona|Georg|Helen|Ingrid|Jonas|Keiko|Liam|Mateo|"
        "Noah|Olga|Pablo|Rahul|Sven|Theo|Anita|Boris|Camille|Dmitri|Esther|Frank|Greta|Hassan|Isabel"
        "|Jack|Molly|Simon|Paula|Edgar|Nadine|Ruben|Silvia|Tobias|Vivian|Walter|Agnes|Bernard|Cecilia|"
        "Dominic|Edith|Florian|Gloria|Harald|Irene|Joseph|Katrin|Leonard|Miriam|Norbert|Ophelia|Philip|"
        "Ramona|Sebastian|Teresa|Ulysses|Veronica|Wesley|Xavier|Yvonne|Zelda|Andre|Brigitte|Cedric|"
        "Deborah|Emil|Francesca|Gregory|Hilda|Igor|Josephine|Kenneth|Lucinda|Maurice|Natalia|Orlando|"
        "Patricia|Quentin|Rebecca|Stefan|Tamara|Vincent|Winston|Alejandro|Bettina|Christopher|Daniela|"
        "Eduardo|Fabian|Giovanni|Hector|Isolde|Jerome|Konrad|Lydia|Margarita|Nikolai|Octavia|Pavel"
    ),
    activities={
        "appointment": _split("dentist|eye doctor|vet|notary|visa|tax|passport|physio|tailor"),
        "lesson": _split("piano|swimming|guitar|chess|driving|Spanish|cello|riding|math"),
        "review": _split("budget|project|design|contract|sales|code|safety|quarterly|supplier"),
        "call": _split("client|bank|insurance|weekly|landlord|support|recruiter|investor"),
        "meeting": _split("board|staff|parent teacher|planning|neighbourhood|school|finance|team"),
        "class": _split("yoga|cooking|dance|drawing|spin|first aid|knitting|boxing"),
        "lunch": _split("team|birthday|business|farewell|family|Sunday"),
        "dinner": _split("anniversary|graduation|office|charity|wedding|holiday"),
        "training": _split("sales|fire safety|football|leadership|marathon|onboarding"),
        "visit": _split("museum|hospital|factory|campus|gallery|zoo"),
        "haircut": _split("summer|kids|short"),
        "interview": _split("job|radio|exit|student|panel"),
        "check-in": _split("flight|hotel|project|hostel|mentor"),
        "party": _split("birthday|garden|surprise|housewarming|costume"),
        "game": _split("football|hockey|board|basketball|card"),
        "delivery": _split("sofa|fridge|grocery|piano|parcel"),
        "talk": _split("science|history|career|poetry|travel"),
        "walk": _split("dog|forest|city|evening|nature"),
    },
    tasks={
        "water": _split("the plants|the tomatoes|the lawn|the herbs on the balcony"),
        "call": _split("the plumber|the bank|my mother|the school office|the garage"),
        "pay": _split("the rent|the gas bill|the gym fee|the parking fine"),
        "email": _split("the landlord|the tax office"),
        "renew": _split("the passport|the bus pass|the car insurance|the library card"),
        "pick up": _split("the dry cleaning|the kids|the cake"),
        "buy": _split("milk|stamps|cat food|batteries|new socks"),
        "take": _split("the pills|the bins out|the dog to the vet|the car to the wash"),
        "book": _split("the hotel|a table for two|the train tickets|a babysitter"),
        "clean": _split("the oven|the fish tank|the windows|the coffee machine"),
        "return": _split("the library books|the rental car|the shoes"),
        "send": _split("the invoice|the parcel|the signed form"),
        "finish": _split("the essay|the tax form|the slides|chapter four"),
        "charge": _split("the camera|the scooter|the laptop|the headphones"),
        "feed": _split("the cat|the rabbits|the goldfish|the neighbour's dog"),
        "check": _split("the tyre pressure|the oven|the mail|the smoke alarm"),
        "text": _split("the coach"),
        "back up": _split("the photos|the laptop|the phone"),
        "cancel": _split("the gym contract|the trial|the magazine|the hotel room"),
        "write": _split("the shopping list|the toast|the minutes"),
        "lock": _split("the garden gate|the bike|the shed"),
        "sign": _split("the lease|the permission slip"),
    },
    event_sentences=_split(
        "Please book {a what}{with}{when}.|"
        "Can you schedule {a what}{when}{with}?|"
        "Add {a what}{with} to my calendar{when}.|"
        "{When} I have {a what}{with}, please add it.|"
        "I have {a what}{with}{when}, put it in my calendar.|"
        "New event: {what}{with}{when}.|"
        "{What}{when}{with}, please add that.|"
        "Put {a what} in my diary{when}{with}.|"
        "{who} and I have {a what}{when}, add it.|"
        "Set up {a what}{when}. {who} is coming too.|"
        "Could you add {a what} with {who}{when}?|"
        "There is {a what}{when}{with}; save it.|"
        "I need to meet {who}{when} for {a what}.|"
        "Make room{when} for {a what}{with}.|"
        "Save the date: {what}{with}{when}.|"
        "Schedule {a what} with {who}{when}.|"
        "{When}, {a what}{with}. Add it to my calendar.|"
        "Can I have {a what} with {who}{when} in the calendar?|"
        "We agreed on {a what}{when}{with}; please enter it.|"
        "I will be at {a what}{when}{with}.|"
        "My calendar lacks {a what}{with}{when}."
    ),
    reminder_sentences=_split(
        "Remind me to {what}{when}.|"
        "Remind me{when} to {what}.|"
        "{When} I have to {what}, remind me.|"
        "Don't let me forget to {what}{when}.|"
        "Please remind {who} to {what}{when}.|"
        "Remind {who}{when} to {what}.|"
        "Set a reminder{when}: {what}.|"
        "I need to {what}{when}, please remind me.|"
        "Can you remind me{when} that I have to {what}?|"
        "{who} has to {what}{when}, send a reminder.|"
        "Reminder{when}: {what}.|"
        "Tell {who} to {what}{when}.|"
        "Tell me{when} to {what}.|"
        "Let {who} know that it is time to {what}{when}.|"
        "I always forget to {what}; remind me{when}.|"
        "Note for me{when}: {what}.|"
        "Wake my memory{when}, I have to {what}.|"
        "Ask {who} to {what}{when}.|"
        "Give me a shout{when} so that I {what}.|"
        "Message me{when}: {what}.|"
        "Poke {who}{when} to {what}.|"
        "It would be bad if I did not {what}{when}.|"
        "To do{when}: {what}."
    ),
)

TEST = Words(
    names=_split(
        "Aisha|Bruno|Cyril|Delphine|Enzo|Freya|Gideon|Henrik|Imani|Joaquin|Katya|Lorenzo|Mireille|"
        "Nadia|Otto|Phoebe|Ravi|Saoirse|Thandi|Ulrich|Valeria|Wanda|Yolanda|Zachary|Amara|Beatriz|"
        "Callum|Darius|Eleni|Fatima|Gustavo|Hyun|Ines|Jasper|Kwame|Leila|Magnus|Naoko|Ottilie|Stelios"
    ),
    activities={
        "workshop": _split("pottery|carpentry|screenwriting|glass blowing"),
        "rehearsal": _split("choir|orchestra|theatre|puppet show"),
        "tour": _split("brewery|castle|canal boat|lighthouse"),
        "scan": _split("knee|dental|ultrasound"),
        "picnic": _split("lakeside|kindergarten|volunteer"),
        "audit": _split("warehouse|payroll|energy"),
        "webinar": _split("gardening|pension|cybersecurity"),
        "massage": _split("shoulder|sports|neck"),
        "tournament": _split("tennis|fencing|ping pong"),
        "seminar": _split("economics|philosophy|beekeeping"),
    },
    tasks={
        "iron": _split("the linen shirt|the curtains|the tablecloth"),
        "prune": _split("the roses|the apple tree|the hedge"),
        "defrost": _split("the freezer|the salmon|the turkey"),
        "repair": _split("the leaking tap|the fence"),
        "measure": _split("the hallway|the bookshelf|the attic"),
        "download": _split("the boarding passes|the timetable|the podcast"),
        "congratulate": _split("the newlyweds"),
        "polish": _split("the silverware|the trumpet|the boots"),
        "collect": _split("the prescription|the blood results"),
        "unplug": _split("the heater|the toaster|the aquarium pump"),
        "hang": _split("the laundry|the painting|the bird feeder"),
        "rehearse": _split("the speech"),
    },
    event_sentences=_split(
        "Could you reserve time{when} for {a what}{with}?|"
        "Enter {a what}{with}{when}.|"
        "{a what}{with} is coming up{when}, so mark my calendar.|"
        "I'm joining {who} for {a what}{when}, note it down.|"
        "Mark {a what}{when} in my agenda{with}."
    ),
    reminder_sentences=_split(
        "Give me a nudge{when} so that I {what}.|"
        "I must not forget to {what}{when}.|"
        "Make sure {who} remembers to {what}{when}.|"
        "Ping me{when}: {what}.|"
        "My memory is bad; I should {what}{when}."
    ),
)

# Teaching alone: any two of them make an activity, any one a task. Whoever has copied only the
# phrases above has learnt the phrases.
WORDS = _split(
    "airport|album|alley|anchor|angle|apron|arrow|artist|atlas|autumn|bakery|balloon|bamboo|banner|"
    "barrel|basket|beacon|bedroom|bench|biology|blanket|blossom|bottle|bracelet|bridge|broom|bucket|"
    "burger|butter|button|cabin|cactus|camel|canvas|captain|caravan|cargo|carpet|cellar|ceramics|"
    "chain|chapel|cherry|chimney|circus|clarinet|climate|closet|cloud|coach|coffee|comedy|compass|"
    "concert|copper|corner|cottage|cotton|courier|cousin|cradle|crane|cricket|curry|cushion|debate|"
    "delta|desert|diamond|diary|dolphin|donkey|dragon|drama|drum|eagle|elbow|elephant|engine|envoy|"
    "fabric|falcon|feather|ferry|festival|fiddle|fiction|finger|flute|folder|forest|fossil|fountain|"
    "fox|frame|furniture|galaxy|garlic|geology|geometry|giant|giraffe|glacier|globe|goat|granite|grape|"
    "harbour|harvest|hammer|helmet|heron|hill|hobby|honey|horizon|hunter|igloo|index|island|ivory|"
    "jacket|jazz|jewel|jigsaw|jungle|kettle|kitchen|kite|ladder|lagoon|lantern|lemon|leopard|lettuce|"
    "library|lily|linguistics|lizard|locker|logic|lotus|luggage|machine|magnet|mango|maple|marble|"
    "market|mattress|meadow|melody|mineral|mirror|mobile|monkey|mosaic|mountain|mushroom|mustard|napkin|"
    "needle|neighbour|nest|network|novel|oak|ocean|olive|onion|opera|orchid|organ|oven|oyster|paddle|"
    "palace|panda|parade|parrot|pasta|pebble|pencil|pepper|perfume|picture|pillow|pine|planet|plaster|"
    "pocket|polar|pony|porridge|poster|potato|prairie|printer|prism|pumpkin|puzzle|quartz|quilt|rabbit|"
    "radar|railway|rainbow|ranch|recipe|ribbon|river|robot|rocket|rope|ruby|saddle|sailor|salad|sandal|"
    "satellite|saxophone|scarf|sculpture|season|shadow|shelter|silver|singer|skeleton|sketch|sled|"
    "sociology|spice|spider|spinach|squirrel|stadium|statue|stream|studio|sugar|summit|sunset|swan|"
    "tablet|tango|temple|tent|theory|thunder|ticket|tiger|timber|toast|tower|tractor|trail|treasure|"
    "trophy|tulip|tunnel|turtle|umbrella|unicorn|vanilla|velvet|village|vinegar|violet|volcano|wagon|"
    "walnut|wedding|whale|wheat|willow|window|winter|wizard|wolf|yacht|zebra|zoology"
)
VERBS = _split(
    "adjust|admire|arrange|assemble|bake|borrow|bring|brush|carry|change|choose|colour|compare|"
    "count|cover|cut|deliver|design|dig|draw|dry|edit|empty|examine|explain|fetch|fill|find|fix|"
    "fold|hide|hire|inspect|install|invite|label|lend|lift|list|load|mend|mix|move|open|order|pack|"
    "paint|peel|photograph|plan|plant|pour|practise|prepare|press|print|protect|publish|purchase|push|"
    "read|record|recycle|refill|remove|replace|rescue|reserve|review|rinse|sell|sew|share|sharpen|"
    "sort|stack|stir|store|study|sweep|swap|test|tidy|translate|trim|unpack|update|visit|wash|weigh|wrap"
)
