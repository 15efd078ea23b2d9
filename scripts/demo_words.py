"""Words of the demo data. `TRAIN` and `TEST` share no name, no item word and no whole sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Words:
    """What requests of one split are made of.

    In sentences, {what} {who} {count} stand for the values, {when} for a day, a time or both, and
    {with} and {for} for an optional person. A capital ({When}) begins a sentence with the value. A
    sentence that names {who} is used only when there is a person, one with {When} only when there
    is a day or a time.
    """

    names: tuple[str, ...]
    activities: dict[str, tuple[str, ...]]  # head word -> words that go before it
    tasks: dict[str, tuple[str, ...]]  # verb -> objects
    products: dict[str, tuple[str, ...]]  # head word -> words that go before it
    event_sentences: tuple[str, ...]
    reminder_sentences: tuple[str, ...]
    order_sentences: tuple[str, ...]
    before: tuple[str, ...]  # small talk
    after: tuple[str, ...]
    syllables: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # of invented names


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("|"))


TRAIN = Words(
    names=_split(
        "Ana|Ben|Carla|Dev|Elif|Farid|Grace|Hugo|Iris|Jamal|Kai|Lena|Mo|Nora|Omar|Priya|Quinn|Rosa|"
        "Sam|Tara|Uma|Victor|Wen|Xena|Yusuf|Zoe|Adam|Bella|Chen|Diego|Emma|Felix|Gita|Hannah|Ivan|"
        "Julia|Kofi|Laura|Marco|Nina|Oscar|Petra|Rafael|Sofia|Tomas|Ursula|Vera|William|Ximena|Yara|"
        "Zeynep|Abdul|Bianca|Claire|Daniel|Erik|Fiona|Georg|Helen|Ingrid|Jonas|Keiko|Liam|Mateo|"
        "Noah|Olga|Pablo|Rahul|Sven|Theo|Anita|Boris|Camille|Dmitri|Esther|Frank|Greta|Hassan|Isabel"
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
        "haircut": ("", "kids", "short"),
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
        "call": _split("the plumber|the bank|my mother|the school office|the garage|{name}"),
        "pay": _split("the rent|the gas bill|the gym fee|the parking fine|{name} for the tickets"),
        "email": _split("the report to {name}|the landlord|the slides to {name}|the tax office"),
        "renew": _split("the passport|the bus pass|the car insurance|the library card"),
        "pick up": _split("the dry cleaning|the kids|the cake|{name} from the station"),
        "buy": _split("milk|stamps|cat food|a gift for {name}|batteries|new socks"),
        "take": _split("the pills|the bins out|the dog to the vet|the car to the wash"),
        "book": _split("the hotel|a table for two|the train tickets|a babysitter"),
        "clean": _split("the oven|the fish tank|the windows|the coffee machine"),
        "return": _split("the library books|the rental car|the shoes|the drill to {name}"),
        "send": _split("the invoice|the birthday card to {name}|the parcel|the signed form"),
        "finish": _split("the essay|the tax form|the slides|chapter four"),
        "charge": _split("the camera|the scooter|the laptop|the headphones"),
        "feed": _split("the cat|the rabbits|the goldfish|the neighbour's dog"),
        "check": _split("the tyre pressure|the oven|the mail|the smoke alarm"),
        "text": _split("{name} the address|{name} about the keys|the coach"),
        "back up": _split("the photos|the laptop|the phone"),
        "cancel": _split("the gym contract|the trial|the magazine|the hotel room"),
        "write": _split("the shopping list|a note to {name}|the toast|the minutes"),
        "lock": _split("the garden gate|the bike|the shed"),
        "sign": _split("the lease|the permission slip|the contract with {name}"),
    },
    products={
        "tea": _split("green|mint|black|ginger|herbal|white"),
        "coffee": _split("ground|instant|dark roast|decaf|iced"),
        "soap": _split("liquid|lavender|olive|dish|hand"),
        "paper": _split("printer|toilet|baking|drawing|photo|kitchen"),
        "milk": _split("oat|whole|soy|almond|goat"),
        "rice": _split("brown|jasmine|basmati|wild|sushi"),
        "pens": _split("blue|gel|red|marker|fountain"),
        "apples": _split("green|red|baking|organic"),
        "cookies": _split("oatmeal|ginger|butter|chocolate"),
        "juice": _split("orange|tomato|carrot|grape|cherry"),
        "nails": _split("steel|roofing|wood|short"),
        "bread": _split("rye|garlic|white|flat"),
        "batteries": _split("AA|camera|watch|long life"),
        "honey": _split("forest|raw|clover|acacia"),
        "candles": _split("white|birthday|scented|tall"),
        "gloves": _split("rubber|winter|work|garden"),
        "noodles": _split("egg|rice|glass|ramen"),
        "sauce": _split("tomato|fish|chilli|barbecue"),
        "towels": _split("bath|beach|paper|tea"),
        "seeds": _split("sunflower|grass|poppy|carrot"),
        "cheese": _split("goat|blue|cream|smoked"),
        "beans": _split("black|coffee|green|kidney"),
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
        "Make room{when} for {a what}{with}."
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
        "Tell me{when} to {what}."
    ),
    order_sentences=_split(
        "Order {count} of {what}{for}{when}.|"
        "Please order {count} of {what}{when}{for}.|"
        "Can you get {count} of {what}{for}{when}?|"
        "We are out of {what}, buy {count}{when}.|"
        "Buy {count} of {what}{for}{when}, please.|"
        "I'd like {count} of {what}{when}{for}.|"
        "{When} we need {count} of {what}{for}.|"
        "{who} wants {count} of {what}{when}.|"
        "Get {who} {count} of {what}{when}.|"
        "{What}, {count}{for}{when}, please order.|"
        "New order: {count} of {what}{when}{for}.|"
        "Send {count} of {what} to {who}{when}."
    ),
    before=_split(
        "Hi!|Hello there.|Hey,|Good morning!|Sorry to bother you.|One more thing:|I almost forgot.|"
        "Quick one:|Hope you are well.|It has been a long day.|Okay, next:|Before I go:"
    ),
    after=_split(
        "Thanks!|Thank you so much.|That would be great.|No rush.|Cheers.|You are a star.|"
        "Let me know if that works.|I keep forgetting these things.|Much appreciated!|Bye!"
    ),
    syllables=(
        _split("Ba|Ce|Di|Fo|Gu|Ha|Ke|Li|Mo|Nu|Pa|Re|Si|To|Vu|Bra|Cle|Dro|Fli|Gra|Sta|Tre"),
        _split("la|me|ni|ro|su|ta|ve|xi|do|ga|ke|li"),
        _split("n|r|s|lo|na|ra|th|x|do|lia|mir|ven|sa"),
    ),
)

TEST = Words(
    names=_split(
        "Aisha|Bruno|Cyril|Delphine|Enzo|Freya|Gideon|Henrik|Imani|Joaquin|Katya|Lorenzo|Mireille|"
        "Nadia|Otto|Phoebe|Ravi|Saoirse|Thandi|Ulrich|Valeria|Wanda|Yolanda|Zachary|Amara|Beatriz|"
        "Callum|Darius|Eleni|Fatima|Gustavo|Hyun|Ines|Jasper|Kwame|Leila|Magnus|Naoko|Ottilie|Stelios"
    ),
    activities={
        "workshop": _split("pottery|carpentry|screenwriting|bread baking"),
        "rehearsal": _split("choir|orchestra|theatre|puppet show"),
        "tour": _split("brewery|castle|canal boat|lighthouse"),
        "scan": _split("knee|dental|ultrasound"),
        "picnic": _split("lakeside|kindergarten|volunteer"),
        "audit": _split("warehouse|payroll|energy"),
        "webinar": _split("gardening|pension|cybersecurity"),
        "massage": ("", "shoulder", "sports"),
        "tournament": _split("tennis|fencing|ping pong"),
        "seminar": _split("economics|philosophy|beekeeping"),
    },
    tasks={
        "iron": _split("the linen shirt|the curtains|the tablecloth"),
        "prune": _split("the roses|the apple tree|the hedge"),
        "defrost": _split("the freezer|the salmon|the turkey"),
        "repair": _split("the leaking tap|the fence|{name}'s bicycle"),
        "measure": _split("the hallway|the bookshelf|the attic"),
        "download": _split("the boarding passes|the bank statement|the podcast"),
        "congratulate": _split("{name} on the promotion|the newlyweds|our neighbour {name}"),
        "polish": _split("the silverware|the trumpet|the boots"),
        "collect": _split("the prescription|the blood results|the sewing machine from {name}"),
        "unplug": _split("the heater|the toaster|the aquarium pump"),
        "hang": _split("the laundry|the painting|the bird feeder"),
        "rehearse": _split("the speech|the duet with {name}"),
    },
    products={
        "marmalade": _split("quince|bitter|apricot"),
        "envelopes": _split("padded|brown|airmail"),
        "lentils": _split("yellow|beluga|split"),
        "detergent": _split("wool|fragrance free|lemon"),
        "muffins": _split("blueberry|banana|pumpkin"),
        "screws": _split("brass|drywall|countersunk"),
        "sponges": _split("bathroom|copper|cellulose"),
        "granola": _split("maple|hazelnut|crunchy"),
        "lightbulbs": _split("LED|halogen|dimmable"),
        "olives": _split("stuffed|Kalamata|pitted"),
        "yoghurt": _split("vanilla|Greek|coconut"),
        "charcoal": _split("barbeque|restaurant|lump"),
    },
    event_sentences=_split(
        "Pencil in {a what}{with}{when}.|"
        "Could you reserve time{when} for {a what}{with}?|"
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
    order_sentences=_split(
        "Put {count} of {what} in the basket{for}{when}.|"
        "Restock {what}: {count}{when}.|"
        "{who} asked for {count} of {what}{when}.|"
        "We'll run low on {what} soon, so grab {count}{for}{when}.|"
        "Purchase {count} of {what}{when}{for}."
    ),
    before=_split(
        "Me again.|Guess what.|Right then.|Ah, yes:|Greetings!|Apologies for the late message."
    ),
    after=_split("Ta!|Have a lovely weekend.|Many thanks in advance.|All the best.|Phew."),
    syllables=(
        _split("Zo|Wy|Qua|Ja|Ey|Og|Ul|Yo|Sko|Thy|Zha"),
        _split("wen|zu|phi|bor|dya|que|jun"),
        _split("k|ph|wick|zo|ya|bert|yn"),
    ),
)
