"""The words and sentences of the story generator: data only, every list in a fixed order.

In a sentence ``[x|y]`` is a free choice, made anew each time; ``{a.pet}`` is a fact of the story, fixed when the story
starts and the same wherever it comes up. Facts are what a long context is for.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _phrases(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(","))


WOMEN = _words(
    "Ada Agnes Alma Anna Beth Bridget Cora Clara Daisy Della Dora Edith Ella Emma Esther Fay Flora Freya Gemma Greta "
    "Hanna Hattie Hazel Helga Ida Ingrid Irma Ivy Jane Joan Judith June Karin Kate Lena Lily Lotte Lucy Mabel Maja "
    "Marta Maud Mina Mira Nadia Nell Nora Olga Olive Orla Paula Pearl Petra Polly Rhoda Rosa Ruth Sally Selma Signe "
    "Stella Sylvia Tess Thea Tilda Ursula Vera Viola Wilma Winnie Yvonne Zelda Zora"
)
MEN = _words(
    "Abel Adam Alban Albert Anton Arne Arthur Axel Basil Benno Bruno Carl Caspar Cedric Clem Conrad Cyril Daniel David "
    "Edgar Edmund Emil Ernest Felix Finn Frank Fred Gilbert Gregor Gus Hans Harald Henry Hugo Ivan Jack Jacob Jasper "
    "Jonas Josef Julius Karl Kurt Lars Leo Linus Lucas Magnus Martin Max Miles Moritz Ned Nils Oscar Otto Owen Paul "
    "Percy Peter Ralph Robin Rolf Roman Rufus Samuel Simon Sven Theo Tobias Tom Victor Walter Willem Yorick"
)
FIRST = _words(
    "Ash Bar Birch Black Brack Bram Cold Cran Dale Dun East Elder Elm Fal Fen Fox Glen Gold Gran Green Hart Haw Hay "
    "Heron High Hol Kel King Lang Long Mar Mill North Oak Old Pen Quarn Raven Red Rock Rose Sand Silver Stan Stone "
    "Strat Swan Tarn Thorn Wal West White Wind Win Wood Yar"
)
LAST = _words(
    "bank beck berg bourne bridge brook burgh bury by combe croft dale den fell field ford gate ham haven hill holm "
    "hurst land leigh ley low marsh mere mouth port ridge shaw stead stone stow thorpe ton well wick wood worth"
)
PET_NAMES = _words(
    "Bramble Button Captain Cinder Clover Copper Duke Echo Fidget Flint Ginger Hobnob Inky Juniper Kip Lady Marble "
    "Mustard Nettle Nibs Nutmeg Patch Pepper Pickle Pip Prince Pudding Queenie Rags Rusty Scamp Shadow Smoke Snap "
    "Sorrel Sparrow Sultan Tansy Thistle Thunder Toffee Tuppence Whisper Wink"
)
PETS = _words("dog cat goat pony hen goose parrot donkey rabbit raven tortoise ferret duck mule calf lamb pig owl")
COLOURS = _words("black white brown grey red yellow green blue golden silver spotted striped pale dark russet cream")
MATERIALS = _words("brass copper wooden silver glass leather iron paper velvet ivory tin stone silk clay bone pewter")
THINGS = _words(
    "key whistle box lamp compass map bell ring flute mirror knife cup clock purse lantern brooch drum hammer spoon "
    "comb mask book button kettle needle chain bottle helmet fiddle basket"
)
DISHES = _phrases(
    "apple cake, barley soup, onion pie, roast goose, plum jam, fish stew, cheese toast, honey bread, pea soup, "
    "pickled herring, rice pudding, smoked eel, mushroom broth, ginger biscuits, lamb stew, potato dumplings, "
    "cabbage rolls, cherry tart, baked pears, walnut loaf, carrot cake, oat porridge, leek pie, lemon pudding"
)
TRADES = _phrases(
    "baker, miller, smith, carpenter, tailor, cobbler, teacher, doctor, fisher, weaver, potter, gardener, "
    "judge, clerk, painter, printer, shepherd, sailor, butcher, brewer, mason, cook, piper, locksmith, ferryman, "
    "beekeeper, clockmaker, schoolmaster, harbour pilot, bookseller, roofer, barber, tanner, tinker"
)
HOMES = _phrases(
    "beside the mill, behind the church, above the harbour, at the end of the lane, near the old bridge, "
    "under the great oak, across the river, on the market square, over the bakery, next to the school, "
    "below the castle wall, at the edge of the wood, by the north gate, opposite the inn, on top of the hill, "
    "between the two wells"
)
FEARS = _words("thunder spiders ghosts heights wolves darkness geese fire bats strangers snakes ladders mirrors bees")
HABITS = _phrases(
    "hummed an old tune, rubbed one ear, counted to ten, looked at the ceiling, tugged at a sleeve, whistled softly, "
    "tapped the table, closed one eye, coughed twice, bit a fingernail, scratched a knee, stood on one leg, "
    "folded both hands, chewed a straw, blinked three times, spoke in rhymes"
)
GOODS = _phrases(
    "brown eggs, red apples, white candles, iron nails, lemons, wool blankets, onions, fresh rolls, clay jars, "
    "goose feathers, copper wires, tea bags, yellow pears, thick ropes, fish hooks, black buttons, oat cakes, "
    "cotton sheets, sharp needles, wooden spoons, bars of soap, bags of flour, jars of honey, pounds of salt, "
    "bottles of ink, balls of string, bunches of mint, sacks of coal, boxes of matches, rolls of paper, cups of rice, "
    "pots of glue, sticks of chalk, barrels of cider, slices of ham, wheels of cheese"
)
NUMBERS = _words(
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty thirty forty"
)
ORDINALS = _words("first second third fourth fifth sixth")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday")
CHORES = _phrases(
    "sweep the hall, feed the hens, carry the water, light the stove, mend the nets, wash the plates, chop the wood, "
    "ring the bell, milk the goats, lock the gate, bake the bread, weed the garden, read the letters, "
    "polish the boots, "
    "count the coins, watch the road, brush the horses, fill the lamps"
)
CHORES_PAST = _phrases(
    "swept the hall, fed the hens, carried the water, lit the stove, mended the nets, washed the plates, chopped the "
    "wood, rang the bell, milked the goats, locked the gate, baked the bread, weeded the garden, read the letters, "
    "polished the boots, counted the coins, watched the road, brushed the horses, filled the lamps"
)
SPOTS = {
    "sea": _phrases("the harbour, the lighthouse, the fish market, the boat shed, the long pier, the sandy cove"),
    "hills": _phrases("the quarry, the high meadow, the stone hut, the waterfall, the narrow pass, the goat path"),
    "farm": _phrases("the barn, the orchard, the duck pond, the hayloft, the wheat field, the dairy"),
    "town": _phrases("the town hall, the library, the clock tower, the market, the theatre, the station"),
    "wood": _phrases("the clearing, the hollow tree, the charcoal pit, the mossy well, the fox den, the hunting lodge"),
}
VIEWS = {
    "sea": _phrases(
        "gulls cried over the masts, the tide pulled at the ropes, salt hung in the air, the waves beat on the wall, "
        "a far ship showed its sails, crabs hid between the stones"
    ),
    "hills": _phrases(
        "clouds lay on the peaks, a stone rolled down the slope, eagles circled over the pass, snow shone in the "
        "gullies, bells rang from the pasture, the wind sang in the rocks"
    ),
    "farm": _phrases(
        "the cows were calling, hay lay drying in rows, sparrows picked at the corn, the cart stood in the mud, bees "
        "hung about the clover, smoke rose from the kitchen"
    ),
    "town": _phrases(
        "carts rattled over the stones, the clock struck the hour, children ran between the stalls, shutters opened "
        "along the street, a crowd stood at the corner, lamps burned in every window"
    ),
    "wood": _phrases(
        "leaves dripped on the moss, an owl called twice, roots crossed the path, a deer looked up and fled, the "
        "pines creaked, mushrooms stood in a ring"
    ),
}
WEATHERS = {
    "rain": _phrases("rain ran down the windows, the gutters overflowed, every coat was wet, puddles filled the road"),
    "snow": _phrases(
        "snow covered the roofs, frost drew ferns on the glass, breath hung in the air, the pump was frozen"
    ),
    "heat": _phrases("dust lay on every leaf, the dogs slept in the shade, the tar grew soft, even the wells ran low"),
    "fog": _phrases(
        "fog hid the chimneys, every sound came from nowhere, lamps were lit at noon, the road ended in grey"
    ),
    "storm": _phrases("the shutters banged, tiles flew from the roofs, the trees bent low, thunder shook the doors"),
}
SONG_SUBJECTS = _phrases(
    "the moon, the miller, my mother, the river, the old king, a blackbird, the winter, the sailor, my love"
)
SONG_VERBS = _phrases(
    "sings to, waits for, runs from, forgets, follows, carries, remembers, laughs at, sleeps beside, hides"
)
SONG_OBJECTS = _phrases(
    "the sun, the sea, a stranger, the road, the corn, a candle, the bell, the snow, my sorrow, the door"
)
SONG_ENDS = _phrases(
    "in May, all day, so far away, and will not stay, at dawn, in the morn, till it is gone, on and on"
)

OPENINGS = (
    "[In|Near] {town} there lived a {a.trade} named {a.full}, who was {a.age} years old.",
    "{a.full} was a {a.trade} of {a.age} years and lived in {town}.",
    "[Long ago|Once upon a time|Many years ago], a {a.trade} called {a.full} lived in {town}.",
)
INTRODUCTIONS = (
    "{p.He} lived {p.home} with a {p.coat} {p.pet} [called|named] {p.petname}.",
    "{p.His} [house|home] stood {p.home}, and {p.his} {p.coat} {p.pet} {p.petname} [slept|lay|sat] on the step.",
    "{p.He} owned a {p.material} {p.thing}, and [never lent it to anybody|was very proud of it|kept it under the bed].",
    "{p.He} [loved|liked] {p.dish} [more than anything|above all things] and was afraid of {p.fear}.",
    "Whenever {p.he} was [nervous|worried|thinking], {p.he} {p.habit}.",
)
ARRIVALS = (
    "[Then|One morning|One evening|Soon] {p.full} came to {spot}. {p.He} was a {p.trade}, {p.age} years old.",
    "{p.full}, a {p.trade} of {p.age} years, was [waiting at|walking to|sitting near] {spot}.",
    "The {p.trade} of {town} was {p.full}, who [had just turned|was] {p.age}.",
)
SCENES = (
    "At {spot} {view}, and {weather}.",
    "{p} [went|walked|hurried] to {spot}, where {view}.",
    "{p} called {p.petname}, and the {p.pet} [came at once|did not come|came slowly|ran to {spot}].",
    "{p} {p.habit}, as always. {q} [knew what it meant|laughed|said nothing].",
    "{q} brought some {p.dish}, because {p} [liked it so much|had asked for it|was hungry].",
    "{p} looked for the {p.material} {p.thing}, but {p.petname} the {p.pet} was [sitting|lying|asleep] on it.",
    "{weather_cap}, so {p} stayed {p.home} and [ate|shared|cooked] {p.dish}.",
    "{p} heard something about {p.fear} and turned pale. {q} took {p.his} hand.",
    (
        "[All of {town}|Everybody in {town}|Nobody in {town}] [talked about|had heard of] the {q.trade} and "
        "{q.his} {q.coat} {q.pet}."
    ),
    (
        "As a {p.trade}, {p} had seen [many|some] [odd|strange|useful] things, but nothing like the "
        "{q.material} {q.thing} of {q}."
    ),
    "{p} and {q} [met|sat|talked] at {spot} until [dark|noon|supper]. [Far away|Behind them|Outside] {view}.",
)
QUESTIONS = (
    ('"What is the name of your {p.pet}?" asked {q}.', '"{p.petname}," said {p}.'),
    ('"How old are you, {p}?" [asked|said] {q}.', '"I am {p.age} years old," [answered|said] {p}.'),
    ('"Where do you live, {p}?" asked {q}.', '"I live {p.home}," {p} [answered|replied].'),
    ('"What are you afraid of, {p}?" asked {q}.', '"Of {p.fear}," [whispered|admitted] {p}, and {p.habit}.'),
    ('"What shall I cook for you?" {q} asked {p}.', '"Make me some {p.dish}," said {p}.'),
    ('"What is your {p.thing} made of?" asked {q}.', '"It is a {p.material} {p.thing}," said {p}.'),
    ('"What colour is {p.petname}?" asked {q}.', '"My {p.pet} is {p.coat}," said {p}.'),
    ('"What is your trade, {p}?" asked {q}.', '"I am the {p.trade} of {town}," said {p}.'),
    ('"Do you remember the word?" asked {q}.', '"The word is {word}," said {p}.'),
)
CLAUSES = (
    "is the {p.trade}",
    "is {p.age} years old",
    "lives {p.home}",
    "owns a {p.material} {p.thing}",
    "likes {p.dish}",
    "is afraid of {p.fear}",
    "keeps a {p.coat} {p.pet} [called|named] {p.petname}",
)
RIDDLE = ('"Who {clauses}?" asked {q}.', '"[That is|It must be|You mean|I think it is] {p.full}," [said|answered] {r}.')
REGISTER = (
    "{p.full}, {p.trade}, {p.age} years, {p.home}, one {p.pet} ({p.coat}, {p.petname}), one {p.material} {p.thing}."
)
RUMOUR = "[They say|Everybody knows|It was well known|The children said] that {p.full} {one}, {two}, and {three}."
GIFTS = (
    "{p} [gave|handed|lent] the {o.material} {o.thing} to {q}.",
    "{q} [took|borrowed|begged] the {o.material} {o.thing} from {p}.",
)
HOLDING = (
    '"Who has the {o.material} {o.thing} of {o} now?" asked {q}. "{h} has it," [said|answered] {r}.',
    '"Have you seen the {o.material} {o.thing}, {q}?" asked {r}. "Ask {h}," said {q}.',
    "{q} knew that {h} still [had|kept|carried] the {o.material} {o.thing}.",
)
ENDINGS = (
    (
        "So {a.full} the {a.trade} [went home|returned] to the house {a.home}, and {a.petname} the {a.pet} "
        "[was glad|slept well]."
    ),
    "At last {a} [sat down|came home], ate {a.dish}, and put the {a.material} {a.thing} [away|on the shelf].",
    (
        "In {town} they still tell of {a.full} and {b.full}, of {a.petname} the {a.coat} {a.pet} and "
        "{b.petname} the {b.coat} {b.pet}."
    ),
    "And that is how {a} the {a.trade} and {b} the {b.trade} became [friends|good neighbours] in {town}.",
)
