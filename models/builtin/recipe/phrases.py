"""The ways the generated users put their questions, and the lead-ins and system messages."""

from __future__ import annotations

from typing import Final

PREFIXES: Final = (
    "Please tell me: ",
    "Hi! ",
    "Hello. ",
    "Quick question: ",
    "I have a question. ",
    "Can you help me? ",
    "OK. ",
    "Now this: ",
    "Next: ",
    "Hey, ",
    "Question: ",
    "Thanks. ",
)
SUFFIXES: Final = (" Thanks!", " Please.", " Thank you.", " I would like to know.", " Be brief.")

CAPITAL: Final = (
    "What is the capital of {c}?",
    "What's the capital of {c}?",
    "Which city is the capital of {c}?",
    "Tell me the capital of {c}.",
    "Name the capital of {c}.",
    "Do you know the capital of {c}?",
    "What is the capital city of {c}?",
    "What is {c}'s capital?",
    "The capital of {c}?",
    "Capital of {c}",
    "{c} has which capital?",
    "I need to know the capital of {c}.",
    "Give me the capital of {c}.",
    "Can you tell me what the capital of {c} is?",
    "What city is the capital of {c}?",
    "For {c}, what is the capital?",
    "Please name {c}'s capital city.",
    "Which capital does {c} have?",
)
# never used in training
CAPITAL_HELD: Final = (
    "Could you tell me the capital of {c}?",
    "I want to know what {c}'s capital is.",
    "Say the name of the capital city of {c}.",
    "Which city is {c}'s capital?",
    "Please give me the capital city of {c}.",
)
CAPITAL_FOLLOW_UP: Final = ("And {c}?", "And of {c}?", "What about {c}?", "And for {c}?")
COUNTRY_OF: Final = (
    "Which country has the capital {k}?",
    "{k} is the capital of which country?",
    "Of which country is {k} the capital?",
    "{k} is the capital of what?",
    "Which country's capital is {k}?",
    "What country has {k} as its capital?",
)

SUM: Final = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a}+{b}=?",
    "Calculate {a} + {b}.",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "What's {a} + {b}?",
    "Compute {a} plus {b}.",
)
DIFFERENCE: Final = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} =",
    "Calculate {a} - {b}.",
    "How much is {a} minus {b}?",
    "Take {b} from {a}.",
    "Subtract {b} from {a}.",
    "What's {a} - {b}?",
    "Compute {a} minus {b}.",
)
PRODUCT: Final = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "{a} * {b}",
    "{a}*{b}",
    "Calculate {a} * {b}.",
    "How much is {a} times {b}?",
    "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?",
    "{a} x {b}",
)
COMPARE: Final = (
    "Which is larger, {a} or {b}?",
    "Which number is bigger, {a} or {b}?",
    "Is {a} or {b} larger?",
    "What is greater: {a} or {b}?",
)

COLOUR_OF: Final = (
    "What colour is {x}?",
    "Which colour is {x}?",
    "What colour has {x}?",
    "What is the colour of {x}?",
    "Tell me the colour of {x}.",
    "Do you know what colour {x} is?",
)

JSON_WHOLE: Final = (
    "Describe {x} as JSON.",
    "Give me a JSON object for {x}.",
    "Write {x} as a JSON object.",
    "JSON for {x}",
    "Turn this into JSON: {x}.",
    "Make a JSON object that describes {x}.",
    "I see {x}. Answer in JSON.",
    "Convert {x} to JSON.",
    "What would {x} be in JSON?",
    "Return JSON: {x}",
)
JSON_COLOUR: Final = (
    "What colour is {x}? Answer in JSON.",
    "Give the colour of {x} as JSON.",
    "Return only the colour of {x} as a JSON object.",
)
JSON_SIZE: Final = (
    "What size is {x}? Answer in JSON.",
    "Give the size of {x} as JSON.",
    "Return only the size of {x} as a JSON object.",
)
JSON_CAPITAL: Final = (
    "Give me {c} and its capital as JSON.",
    "What is the capital of {c}? Answer in JSON.",
    "Return the capital of {c} as a JSON object.",
    "JSON for {c} and its capital",
    "Describe {c} as JSON.",
)
JSON_PAIR: Final = (
    "Give me a JSON list for {x} and {y}.",
    "Describe {x} and {y} as JSON.",
    "Write {x} and {y} as a JSON array.",
    "JSON for {x} and {y}",
)
THING: Final = (
    "a {size} {colour} {thing}",
    "the {size} {colour} {thing}",
    "a {colour} {thing} of {size} size",
    "a {thing} that is {size} and {colour}",
    "one {colour}, {size} {thing}",
    "{size} {colour} {thing}",
    "my {size} {thing}, which is {colour}",
)

TELL_NAME: Final = (
    "My name is {n}.",
    "I am {n}.",
    "I'm {n}.",
    "Hello, my name is {n}.",
    "Hi, I am {n}.",
    "Hi! I'm {n}.",
    "Hi, my name is {n}!",
    "Hello! My name is {n}. Please remember it.",
    "Good morning, my name is {n}.",
    "Please call me {n}.",
    "You can call me {n}.",
    "My name's {n}, remember it.",
    "Remember that my name is {n}.",
    "Actually, my name is {n}.",
    "From now on call me {n}.",
)
ASK_NAME: Final = (
    "What is my name?",
    "What's my name?",
    "Who am I?",
    "Do you remember my name?",
    "Do you know my name?",
    "Tell me my name.",
    "Can you tell me my name?",
    "What did I say my name was?",
    "What am I called?",
    "Say my name.",
    "What was my name?",
    "What was my name again?",
    "And what is my name?",
)
TELL_COLOUR: Final = (
    "My favourite colour is {k}.",
    "I like the colour {k} best.",
    "Remember that my favourite colour is {k}.",
    "The colour I love is {k}.",
)
ASK_COLOUR: Final = (
    "What is my favourite colour?",
    "Which colour do I like best?",
    "Do you remember my favourite colour?",
    "Tell me my favourite colour.",
)

COUNT: Final = (
    "Count from {a} to {b}.",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Write the numbers from {a} to {b}.",
    "List the numbers from {a} to {b}.",
    "Count {a} to {b}",
)
COUNT_TO: Final = ("Count to {b}.", "Count up to {b}.", "Please count to {b}.")
COUNT_DOWN: Final = ("Count down from {a}.", "Count backwards from {a}.")
COUNT_BY: Final = (
    "Count from {a} to {b} by {s}.",
    "Count from {a} to {b} in steps of {s}.",
)

LIST_CAPITALS: Final = (
    "Name {n} capitals in {r}.",
    "List {n} capitals in {r}.",
    "Give me {n} capital cities in {r}.",
    "Tell me {n} capitals in {r}.",
)
LIST_COUNTRIES: Final = (
    "Name {n} countries in {r} and their capitals.",
    "List {n} countries in {r} with their capitals.",
    "Give me {n} countries in {r} and their capitals.",
)
NUMBER_WORDS: Final = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen twenty".split()
)

STORY: Final = (
    "Tell me a story about {x}.",
    "Write a story about {x}.",
    "Tell a story about {x}.",
    "I want to hear a story about {x}.",
    "Can you tell me a story about {x}?",
)
LONG_STORY: Final = (
    "Tell me a long story about {x}.",
    "Write a long story about {x}.",
    "Tell a long story about {x}.",
)

REPEAT: Final = (
    "Repeat after me: {t}",
    "Repeat this: {t}",
    "Say exactly this: {t}",
    "Echo: {t}",
    "Copy this text: {t}",
    "Say: {t}",
    "Repeat: {t}",
)

UNKNOWN: Final = (
    "Tell me about {t}.",
    "Explain {t} to me.",
    "What is {t}?",
    "How does {t} work?",
    "Why do people like {t}?",
    "Write an essay about {t}.",
    "Who invented {t}?",
    "Summarise {t} in one sentence.",
    "What do you think about {t}?",
    "Give me advice about {t}.",
    "Why is {t} so important?",
    "How can I learn {t}?",
    "Write a poem about {t}.",
    "Write a haiku about {t}.",
    "Where can I find {t}?",
    "When did {t} begin?",
    "Can you help me with {t}?",
    "Translate {t} into French.",
    "Is {t} good or bad?",
    "What is the weather in {t}?",
    "What is the meaning of {t}?",
    "Write a program for {t}.",
    "How many people live in {t}?",
)

SYSTEMS: Final = (
    "You are a helpful assistant.",
    "You are a helpful, honest and harmless assistant.",
    "You are Rhizome's built-in model.",
    "Answer briefly.",
    "You are a friendly chatbot. Be polite.",
    "You answer questions about capitals, numbers and things.",
    "You are an expert.",
    "Be concise and correct.",
)
SYSTEM_NAME: Final = (
    "The user's name is {n}.",
    "You are talking to {n}.",
    "You are a helpful assistant. The user is called {n}.",
)
