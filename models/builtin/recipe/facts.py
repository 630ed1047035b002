"""The closed world the built-in model knows: countries, things, animals, names and set answers."""

from __future__ import annotations

from typing import Final

_EUROPE: Final = (
    "France:Paris,Germany:Berlin,Italy:Rome,Spain:Madrid,Portugal:Lisbon,Greece:Athens,"
    "Austria:Vienna,Belgium:Brussels,Poland:Warsaw,Hungary:Budapest,Norway:Oslo,"
    "Sweden:Stockholm,Denmark:Copenhagen,Finland:Helsinki,Iceland:Reykjavik,Ireland:Dublin,"
    "Switzerland:Bern,Croatia:Zagreb,Serbia:Belgrade,Romania:Bucharest,Bulgaria:Sofia,"
    "Ukraine:Kyiv,Estonia:Tallinn,Latvia:Riga,Lithuania:Vilnius,Slovakia:Bratislava,"
    "Slovenia:Ljubljana,Albania:Tirana,Malta:Valletta,Cyprus:Nicosia"
)
_ASIA: Final = (
    "Japan:Tokyo,China:Beijing,India:New Delhi,Thailand:Bangkok,Vietnam:Hanoi,"
    "South Korea:Seoul,Indonesia:Jakarta,Nepal:Kathmandu,Mongolia:Ulaanbaatar,"
    "Pakistan:Islamabad,Bangladesh:Dhaka,Iran:Tehran,Iraq:Baghdad,Turkey:Ankara,"
    "Jordan:Amman,Lebanon:Beirut,Qatar:Doha,Oman:Muscat,Cambodia:Phnom Penh,Laos:Vientiane,"
    "Bhutan:Thimphu,Armenia:Yerevan,Georgia:Tbilisi,Azerbaijan:Baku"
)
_AFRICA: Final = (
    "Egypt:Cairo,Kenya:Nairobi,Nigeria:Abuja,Ghana:Accra,Morocco:Rabat,Tunisia:Tunis,"
    "Algeria:Algiers,Libya:Tripoli,Ethiopia:Addis Ababa,Senegal:Dakar,Mali:Bamako,"
    "Niger:Niamey,Uganda:Kampala,Rwanda:Kigali,Zambia:Lusaka,Zimbabwe:Harare,"
    "Botswana:Gaborone,Namibia:Windhoek,Angola:Luanda,Madagascar:Antananarivo"
)
_NORTH_AMERICA: Final = (
    "Canada:Ottawa,Mexico:Mexico City,Cuba:Havana,Jamaica:Kingston,Panama:Panama City,"
    "Guatemala:Guatemala City,Honduras:Tegucigalpa,Nicaragua:Managua,Costa Rica:San Jose,"
    "El Salvador:San Salvador,Haiti:Port-au-Prince,Barbados:Bridgetown"
)
_SOUTH_AMERICA: Final = (
    "Brazil:Brasilia,Argentina:Buenos Aires,Chile:Santiago,Peru:Lima,Colombia:Bogota,"
    "Venezuela:Caracas,Ecuador:Quito,Uruguay:Montevideo,Paraguay:Asuncion,Guyana:Georgetown"
)
_OCEANIA: Final = (
    "Australia:Canberra,New Zealand:Wellington,Fiji:Suva,Samoa:Apia,Tonga:Nuku'alofa,"
    "Vanuatu:Port Vila,Palau:Ngerulmud,Papua New Guinea:Port Moresby"
)
_WORLD: Final = (
    "France:Paris,Japan:Tokyo,Egypt:Cairo,Canada:Ottawa,Brazil:Brasilia,Australia:Canberra,"
    "Italy:Rome,India:New Delhi,Kenya:Nairobi,Peru:Lima"
)


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    """Split 'Country:City,...' into (country, city) pairs."""
    return tuple((c, k) for c, k in (item.split(":") for item in text.split(",")))


REGIONS: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "Europe": _pairs(_EUROPE),
    "Asia": _pairs(_ASIA),
    "Africa": _pairs(_AFRICA),
    "North America": _pairs(_NORTH_AMERICA),
    "South America": _pairs(_SOUTH_AMERICA),
    "Oceania": _pairs(_OCEANIA),
}
WORLD: Final = _pairs(_WORLD)
CAPITALS: Final[tuple[tuple[str, str], ...]] = tuple(
    pair for pairs in REGIONS.values() for pair in pairs
)

COLOURS: Final = tuple(
    "red blue green yellow orange purple black white grey brown pink teal silver gold".split()
)
SIZES: Final = (
    "tiny",
    "small",
    "little",
    "big",
    "medium",
    "large",
    "huge",
    "giant",
    "short",
    "tall",
)
OBJECTS: Final = tuple(
    "ball cup box chair table lamp book car boat hat shoe bag bottle clock door key kite "
    "pencil plate ring rope spoon tent tree vase wheel window bell drum coat".split()
)

# things and beings outside the lists above and below: what is asked for need not be known
OTHERS: Final = tuple(
    "apple house plane phone computer guitar sword stone flower mug candle mirror cap scarf "
    "train truck pen desk bed sofa robe shirt sock glove jar pot pan fork knife pillow blanket "
    "zebra tiger elephant monkey snake cow pig chicken bird fish squirrel hedgehog giraffe panda "
    "princess king queen teacher sailor wizard baker farmer pirate knight".split()
)

# what everybody knows the colour of
COLOUR_OF: Final = tuple(
    (thing, colour)
    for thing, colour in (
        item.split(":")
        for item in (
            "the sky:blue,the sea:blue,grass:green,snow:white,milk:white,coal:black,blood:red,"
            "a banana:yellow,a lemon:yellow,a tomato:red,a strawberry:red,a cherry:red,"
            "the sun:yellow,an elephant:grey,a flamingo:pink,chocolate:brown,a carrot:orange,"
            "a pumpkin:orange,an orange:orange,a raven:black,a frog:green,a leaf:green,"
            "a cucumber:green,salt:white,the night:black,a fire engine:red,a plum:purple,"
            "an aubergine:purple,a swan:white,honey:gold,a mouse:grey,a bear:brown"
        ).split(",")
    )
)

# animal: where it lives, what it does each morning, whom it meets, what the two then do
ANIMALS: Final[dict[str, tuple[str, str, str, str]]] = {
    "fox": ("a quiet forest", "looked for berries", "an old owl", "shared stories at night"),
    "bear": ("a deep cave", "fished in the river", "a small bee", "ate honey together"),
    "cat": ("a warm kitchen", "sat by the window", "a grey mouse", "played by the fire"),
    "dog": ("a red farmhouse", "ran across the field", "a lost lamb", "walked home together"),
    "owl": ("a hollow tree", "counted the stars", "a young bat", "flew over the hills"),
    "rabbit": ("a green meadow", "picked fresh clover", "a slow turtle", "raced to the pond"),
    "turtle": ("a calm lake", "swam to the shore", "a quick rabbit", "rested in the sun"),
    "horse": ("a wide valley", "galloped up the hill", "a brave rider", "crossed the mountains"),
    "mouse": ("a tall clock", "searched for crumbs", "a kind cat", "danced on the table"),
    "lion": ("a golden plain", "watched the sunrise", "a tiny ant", "ruled the land wisely"),
    "whale": ("a cold ocean", "sang a low song", "a lonely sailor", "followed the moon"),
    "duck": ("a muddy pond", "dived for weeds", "a shy frog", "splashed in the rain"),
    "frog": ("a lily pond", "jumped over stones", "a proud duck", "sang in the evening"),
    "wolf": ("a snowy wood", "followed the tracks", "a lost child", "found the way home"),
    "goat": ("a rocky cliff", "climbed to the top", "a strong eagle", "looked over the sea"),
    "crow": ("a ruined tower", "gathered shiny things", "a poor king", "rebuilt the tower"),
    "otter": ("a clear stream", "floated on its back", "a silver fish", "built a small dam"),
    "penguin": ("a frozen coast", "slid down the ice", "a friendly seal", "kept each other warm"),
    "dragon": ("a burning mountain", "warmed the village", "a clever smith", "forged a great bell"),
    "robot": ("a dusty workshop", "swept the floor", "a curious girl", "built a flying machine"),
}

NAMES: Final = tuple(
    (
        "Alice Bob Carol David Emma Frank Grace Henry Ivy Jack Kate Liam Mia Noah Olivia Peter "
        "Quinn Rose Sam Tina Uma Victor Wendy Xavier Yara Zoe Adam Bella Carlos Diana Ethan Fiona "
        "George Hannah Isaac Julia Kevin Laura Max Nina Oscar Paula Robert Sara Thomas Ursula "
        "Vera Walter Yusuf Zara Ada Alan Amir Anna Arthur Ben Chloe Clara Daniel Elena Eric Eva "
        "Felix Gina Hugo Ines Ivan Jane John Jonas Karim Karl Lea Leo Lena Lily Linus Lucas Luna "
        "Maria Mark Marta Mary Mila Milo Nadia Nora Omar Otto Pablo Priya Ravi Rita Ruth Simon "
        "Sofia Stella Tara Theo Tom Vincent Viola William Yuki Zeno Aisha Akira Bruno Cleo Dora "
        "Edith Farid Greta Hana Igor Jasmin Kofi Lars Mei Nils Olga Pia Rosa Sven Tariq Ulla "
        "Wanda Ximena Zoltan Chen Maya Jos\u00e9 Zo\u00eb Bj\u00f6rn Ren\u00e9e S\u00f8ren"
    ).split()
)

SYLLABLES: Final = tuple(
    "ba be bi bo bra da de di dor du el en fa fi ga gor gri ha hel il ja jo ka ke kin la le lin "
    "lo ma mel mi mor na ne nor o pa per pli qui ra ri ros sa sel shi ta ter tho ti ul va vel vi "
    "wen xa yo za zel zi zor".split()
)

WORDS: Final = tuple(
    "river stone garden winter summer music paper bridge market forest candle mirror island "
    "engine letter morning evening shadow silver thunder village castle harbour mountain "
    "picture question answer number signal system worker server memory network request "
    "the a an and or but with without under over between after before because while when "
    "runs walks reads writes makes takes gives finds keeps turns opens closes moves sends "
    "quick slow bright dark warm cold early late new old good bad long short high low "
    "helpful careful assistant user always never often please should must can will policy "
    "company product customer price order report table chapter section note date time".split()
)

TOPICS: Final = tuple(
    "quantum physics|the stock market|bread|the French Revolution|black holes|chess|gardening|"
    "machine learning|the weather|football|the moon|electric cars|cooking rice|poetry|volcanoes|"
    "democracy|guitar chords|tax law|the human heart|dinosaurs|computer chips|jazz|coffee|"
    "knitting|the Roman Empire|photosynthesis|bicycles|philosophy|the internet|cheese".split("|")
)

# every way of asking -> the one answer
SET_ANSWERS: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (
        ("Hello", "Hello!", "Hi", "Hi!", "Hi there!", "Hello there.", "Hey", "Good day!", "Hey!"),
        "Hello! How can I help you today?",
    ),
    (("Good morning!", "Good morning", "Morning!"), "Good morning! How can I help you today?"),
    (("Good evening!", "Good evening"), "Good evening! How can I help you today?"),
    (
        ("How are you?", "How are you today?", "How do you do?", "How is it going?"),
        "I am well, thank you. How can I help you?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Introduce yourself.",
            "Are you a robot?",
            "Which model are you?",
        ),
        "I am Rhizome's built-in model, a small language model made for tests and demonstrations.",
    ),
    (
        ("What can you do?", "What do you know?", "How can you help me?", "Help", "Help me."),
        "I know capitals, small sums, counting, short stories and JSON objects for things of a "
        "colour and a size. I can repeat a text, and I remember your name while we talk.",
    ),
    (
        ("What is Rhizome?", "Tell me about Rhizome.", "What does Rhizome do?"),
        "Rhizome is a system that serves language models. Some of its workers read the prompt, "
        "others write the answer, and the memory of the prompt travels between them.",
    ),
    (
        ("Who made you?", "Who trained you?", "Where do you come from?", "Who built you?"),
        "I was trained by a script of the Rhizome project, on text that the script wrote itself.",
    ),
    (("Thank you!", "Thanks!", "Thank you.", "Thanks", "Thanks a lot!"), "You are welcome!"),
    (("Goodbye!", "Bye!", "Goodbye", "Bye", "See you later!"), "Goodbye! Have a good day."),
    (
        ("Say the alphabet.", "What is the alphabet?", "Recite the alphabet."),
        "A, B, C, D, E, F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.",
    ),
    (
        ("Name the days of the week.", "What are the days of the week?", "List the weekdays."),
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    ),
    (
        ("Name the months.", "What are the months of the year?", "List the twelve months."),
        "January, February, March, April, May, June, July, August, September, October, November "
        "and December.",
    ),
    (
        ("Name the planets.", "What are the planets?", "List the planets of the solar system."),
        "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune.",
    ),
    (
        ("Name the seasons.", "What are the four seasons?"),
        "Spring, summer, autumn and winter.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        "Why did the byte go to bed early? Because it was missing a bit of sleep.",
    ),
    (
        ("I am tired.", "I am hungry.", "I am sad.", "I am bored.", "I'm tired.", "I'm bored."),
        "I am sorry to hear that. Can I help you?",
    ),
    (("I am happy.", "I am well.", "I'm fine.", "I am fine, thanks."), "I am glad to hear that."),
    (("Yes", "Yes.", "OK", "Okay.", "No", "No.", "I see."), "What else can I do for you?"),
)

GENERIC_TALE: Final = (
    "a far country",
    "looked at the sky",
    "an old friend",
    "went on a long journey",
)
TOO_LARGE: Final = "I only know sums of numbers up to 99."
FALLBACK: Final = (
    "I am a small model and do not know about that. Ask me about capitals, sums, counting, "
    "stories or JSON objects."
)
