"""The stories as data: who, what, and the events that can happen to one running quantity.

Contract: an `Event` is one or two sentences of the question together with the one or two steps that solve it. A step is
`(result, left, operator, right, line)`; operands name the running total `t`, the event's own numbers `a` and `b`, its
intermediate result `x`, or a literal. `{eq}` in a line becomes `3 * 4 = 12`. The kinds of number (`count`, `each`, ...) get
their ranges from the difficulty in `problem_generator.py`; this module draws nothing and checks nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

Step = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Event:
    sentences: tuple[str, ...]
    steps: tuple[Step, ...]
    a: str = ""
    b: str = ""


@dataclass(frozen=True)
class Theme:
    name: str
    objects: tuple[str, ...]
    starts: tuple[Event, ...]
    middles: tuple[Event, ...]
    endings: tuple[Event, ...]
    """Those without steps only ask for the total."""


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Ada Amy Anna Bella Carla Clara Dana Ella Emma Eva Fay Grace Hana Ida Iris Jane Julia Kate Lea Lily Lucy Maria Mia Nina"
    " Nora Olga Paula Rosa Ruth Sara Tina Vera Zoe"
)
MEN = _words(
    "Adam Ali Ben Carl Dan David Emil Erik Felix Finn Gus Hugo Ian Ivan Jack James Jon Karl Leo Liam Luis Mark Max Milo Nick"
    " Noah Omar Oscar Paul Peter Sam Theo Tom"
)

DISTRACTORS = (
    "{p} is {n} years old.",
    "{q}, a friend, is {n} years old.",
    "It is {n} degrees outside that day.",
    "The bus ride into town takes {n} minutes.",
    "{p} lives in house number {n}.",
    "{q} has been away for {n} days.",
    "{p} listens to {n} songs meanwhile.",
    "The clock on the wall is {n} minutes slow.",
)

CONTAINERS = ("boxes", "bags", "packs", "tins", "jars")

COLLECTION = Theme(
    "collection",
    _words(
        "stamps marbles cards shells coins stickers beads buttons crayons pencils badges comics stones feathers dominoes"
        " postcards magnets keys"
    ),
    starts=(
        Event(("{p} has {a} {o}.", "{p} starts with {a} {o}.", "There are {a} {o} on the desk of {p}."), (), a="count"),
        Event(
            ("{p} has {a} {c} with {b} {o} in each.", "{p} fills {a} {c} with {b} {o} each."),
            (("t", "a", "*", "b", "{p} has {eq} {o}.|The {c} hold {eq} {o}."),),
            a="few",
            b="each",
        ),
    ),
    middles=(
        Event(
            ("{He} finds {a} more {o}.", "{q} gives {him} {a} {o}.", "Then {he} buys {a} {o}."),
            (("t", "t", "+", "a", "Now {p} has {eq} {o}.|That makes {eq} {o}."),),
            a="count",
        ),
        Event(
            ("{He} gives {a} {o} to {q}.", "{He} loses {a} {o}.", "{He} sells {a} of the {o}."),
            (("t", "t", "-", "a", "{p} has {eq} {o} left.|That leaves {eq} {o}."),),
            a="less",
        ),
        Event(
            ("{He} buys {a} {c} of {b} {o} each.", "{q} brings {a} {c} with {b} {o} in each."),
            (
                ("x", "a", "*", "b", "The new {c} hold {eq} {o}.|{a} {c} hold {eq} {o}."),
                ("t", "t", "+", "x", "Now {p} has {eq} {o}.|That makes {eq} {o}."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("{He} gives {b} {o} to each of {a} friends.", "{a} friends get {b} {o} each from {him}."),
            (
                ("x", "a", "*", "b", "The friends get {eq} {o}.|{He} gives away {eq} {o}."),
                ("t", "t", "-", "x", "{p} has {eq} {o} left.|That leaves {eq} {o}."),
            ),
            a="few",
            b="small",
        ),
        Event(
            ("{He} gives away half of the {o}.", "Half of the {o} get lost."),
            (("t", "t", "/", "2", "Half are gone, so {eq} {o} are left.|{p} keeps {eq} {o}."),),
        ),
        Event(
            ("By summer {he} has {a} times as many {o}.", "A year later the number of {o} is {a} times as large."),
            (("t", "t", "*", "a", "Then {p} has {eq} {o}.|That grows to {eq} {o}."),),
            a="times",
        ),
    ),
    endings=(
        Event(("How many {o} does {p} have now?", "How many {o} does {he} have in the end?"), ()),
        Event(
            (
                "{He} shares them equally among {a} friends. How many {o} does each friend get?",
                "{He} puts all {o} into {a} equal rows. How many {o} are in a row?",
            ),
            (("t", "t", "/", "a", "Each gets {eq} {o}.|There are {eq} {o} in each."),),
            a="divisor",
        ),
        Event(
            ("{He} puts {a} {o} into each new album. How many albums does {he} need?",),
            (("t", "t", "/", "a", "{p} needs {eq} albums.|{He} fills {eq} albums."),),
            a="divisor",
        ),
        Event(
            ("{He} sells them all for ${a} each. How much money does {he} get?",),
            (("t", "t", "*", "a", "{p} gets {eq} dollars.|They bring {eq} dollars."),),
            a="times",
        ),
        Event(
            ("{q} has {a} {o}. How many {o} do the two have together?",),
            (("t", "t", "+", "a", "Together they have {eq} {o}.|The two have {eq} {o}."),),
            a="count",
        ),
    ),
)

SHOP = Theme(
    "shop",
    _words(
        "apples pears cakes mugs plates lamps chairs hats scarves books pens rulers balls kites pies melons rolls candles"
        " shirts socks"
    ),
    starts=(
        Event(
            ("{p} buys {a} {o} at ${b} each.", "At the market {p} pays ${b} each for {a} {o}."),
            (("t", "a", "*", "b", "The {o} cost {eq} dollars.|{p} pays {eq} dollars for the {o}."),),
            a="few",
            b="each",
        ),
        Event(
            ("A shop asks ${a} for a set of {o}, and {p} takes {b} sets.",),
            (("t", "a", "*", "b", "The sets cost {eq} dollars.|{b} sets cost {eq} dollars."),),
            a="each",
            b="few",
        ),
    ),
    middles=(
        Event(
            ("{He} also buys {a} {i} at ${b} each.", "Then {he} takes {a} {i} for ${b} each."),
            (
                ("x", "a", "*", "b", "The {i} cost {eq} dollars.|{p} pays {eq} dollars for the {i}."),
                ("t", "t", "+", "x", "That is {eq} dollars so far.|Together this is {eq} dollars."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("{He} adds a box of {i} for ${a}.", "A bag of {i} costs {him} another ${a}."),
            (("t", "t", "+", "a", "With the {i} it is {eq} dollars.|That makes {eq} dollars."),),
            a="count",
        ),
        Event(
            ("A coupon takes ${a} off the bill.", "The seller lowers the price by ${a}."),
            (("t", "t", "-", "a", "After that the bill is {eq} dollars.|The bill falls to {eq} dollars."),),
            a="less",
        ),
        Event(
            ("The whole bill is cut in half.", "Everything is at half price that day."),
            (("t", "t", "/", "2", "Half of the bill is {eq} dollars.|At half price it is {eq} dollars."),),
        ),
    ),
    endings=(
        Event(("How much does {he} spend?", "How many dollars does {p} pay in total?"), ()),
        Event(
            ("{He} pays with ${a}. How much change does {he} get?", "{He} had ${a}. How many dollars are left?"),
            (("t", "a", "-", "t", "{p} gets {eq} dollars back.|{He} has {eq} dollars left."),),
            a="more",
        ),
        Event(
            ("{a} friends split the bill equally. How much does each pay?",),
            (("t", "t", "/", "a", "Each friend pays {eq} dollars.|That is {eq} dollars each."),),
            a="divisor",
        ),
        Event(
            ("{He} does the same every week. How much does {he} spend in {a} weeks?",),
            (("t", "t", "*", "a", "In {a} weeks that is {eq} dollars.|{p} spends {eq} dollars."),),
            a="times",
        ),
    ),
)

WORK = Theme(
    "work",
    _words("bike phone guitar tent camera trip piano course boat laptop"),
    starts=(
        Event(
            ("{p} works {a} hours for ${b} an hour.", "{p} earns ${b} an hour and works {a} hours."),
            (("t", "a", "*", "b", "{p} earns {eq} dollars.|The work pays {eq} dollars."),),
            a="few",
            b="each",
        ),
        Event(("{p} has saved ${a}.", "{p} has ${a} in the bank."), (), a="count"),
    ),
    middles=(
        Event(
            ("{He} gets a bonus of ${a}.", "{q} pays {him} back ${a}."),
            (("t", "t", "+", "a", "Now {p} has {eq} dollars.|With that {he} has {eq} dollars."),),
            a="count",
        ),
        Event(
            ("{He} spends ${a} on food.", "Rent takes ${a} of it."),
            (("t", "t", "-", "a", "{p} has {eq} dollars left.|That leaves {eq} dollars."),),
            a="less",
        ),
        Event(
            ("In the evenings {he} works {a} hours at ${b} an hour.", "{He} washes {a} cars for ${b} each."),
            (
                ("x", "a", "*", "b", "That pays {eq} dollars.|{He} earns {eq} dollars more."),
                ("t", "t", "+", "x", "Now {p} has {eq} dollars.|With that {he} has {eq} dollars."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("{He} pays {a} bills of ${b} each.", "{He} buys {a} tickets for ${b} each."),
            (
                ("x", "a", "*", "b", "{He} pays {eq} dollars.|These cost {eq} dollars."),
                ("t", "t", "-", "x", "{p} has {eq} dollars left.|That leaves {eq} dollars."),
            ),
            a="few",
            b="small",
        ),
        Event(
            ("Half of the money goes to {q}.", "{He} gives half of the money away."),
            (("t", "t", "/", "2", "{p} keeps {eq} dollars.|Half of it is {eq} dollars."),),
        ),
        Event(
            ("{He} does this for {a} weeks in all.", "This repeats until {he} has {a} times the money."),
            (("t", "t", "*", "a", "That makes {eq} dollars.|In the end this is {eq} dollars."),),
            a="times",
        ),
    ),
    endings=(
        Event(("How much money does {p} have?", "How many dollars does {he} have in the end?"), ()),
        Event(
            ("A {o} costs ${a}. How much more does {he} need?", "{He} wants a {o} for ${a}. How many dollars are missing?"),
            (("t", "a", "-", "t", "{p} needs {eq} dollars more.|The {o} is {eq} dollars away."),),
            a="more",
        ),
        Event(
            ("{He} spends it evenly over {a} days. How much is that a day?",),
            (("t", "t", "/", "a", "That is {eq} dollars a day.|Each day {he} spends {eq} dollars."),),
            a="divisor",
        ),
    ),
)

FACTORY = Theme(
    "factory",
    _words("toys cups bottles bricks tiles clocks pipes shoes gloves lids bells nails"),
    starts=(
        Event(
            ("A machine makes {b} {o} an hour and runs for {a} hours.", "A workshop makes {b} {o} an hour for {a} hours."),
            (("t", "a", "*", "b", "It makes {eq} {o}.|In {a} hours that is {eq} {o}."),),
            a="few",
            b="each",
        ),
        Event(
            ("{a} workers make {b} {o} each.", "Each of {a} workers makes {b} {o}."),
            (("t", "a", "*", "b", "The workers make {eq} {o}.|Together they make {eq} {o}."),),
            a="few",
            b="each",
        ),
    ),
    middles=(
        Event(
            ("{a} of the {o} break.", "{p} takes {a} bad {o} away."),
            (("t", "t", "-", "a", "That leaves {eq} {o}.|There are {eq} good {o}."),),
            a="less",
        ),
        Event(
            ("A second machine adds {a} {o}.", "There were {a} {o} in store before."),
            (("t", "t", "+", "a", "Together there are {eq} {o}.|That makes {eq} {o}."),),
            a="count",
        ),
        Event(
            ("Then {a} trucks bring {b} {o} each.", "{p} adds {a} crates of {b} {o}."),
            (
                ("x", "a", "*", "b", "They bring {eq} {o}.|{a} times {b} is {eq} {o}."),
                ("t", "t", "+", "x", "Together there are {eq} {o}.|That makes {eq} {o}."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("Half of the {o} are sold.", "Half of the {o} go to another town."),
            (("t", "t", "/", "2", "That leaves {eq} {o}.|Half of them are {eq} {o}."),),
        ),
        Event(
            ("This happens on {a} days.", "The same is done {a} times."),
            (("t", "t", "*", "a", "In all that is {eq} {o}.|Over {a} days it is {eq} {o}."),),
            a="times",
        ),
    ),
    endings=(
        Event(("How many {o} are there now?", "How many {o} does that make?"), ()),
        Event(
            ("They are packed {a} to a box. How many boxes are needed?", "Each box holds {a} {o}. How many boxes get full?"),
            (("t", "t", "/", "a", "They fill {eq} boxes.|That needs {eq} boxes."),),
            a="divisor",
        ),
        Event(
            ("Each is sold for ${a}. How much money is that?",),
            (("t", "t", "*", "a", "That brings {eq} dollars.|The {o} bring {eq} dollars."),),
            a="times",
        ),
    ),
)

TRIP = Theme(
    "trip",
    _words("train truck van ship plane coach"),
    starts=(
        Event(
            ("A {o} travels {a} hours at {b} km an hour.", "{p} takes a {o} that goes {b} km an hour for {a} hours."),
            (("t", "a", "*", "b", "The {o} goes {eq} km.|In {a} hours that is {eq} km."),),
            a="few",
            b="each",
        ),
        Event(("A {o} has {a} km behind it.", "{p} has gone {a} km by {o}."), (), a="count"),
    ),
    middles=(
        Event(
            ("Then it goes {a} hours at {b} km an hour.", "After a stop it does {b} km an hour for {a} hours."),
            (
                ("x", "a", "*", "b", "That part is {eq} km.|In {a} hours it goes {eq} km."),
                ("t", "t", "+", "x", "So far it is {eq} km.|Together that is {eq} km."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("A detour adds {a} km.", "It goes on for {a} km."),
            (("t", "t", "+", "a", "So far it is {eq} km.|Then the way is {eq} km."),),
            a="count",
        ),
        Event(
            ("The same way is done {a} times.", "{p} makes this journey {a} times."),
            (("t", "t", "*", "a", "In all that is {eq} km.|{a} times the way is {eq} km."),),
            a="times",
        ),
    ),
    endings=(
        Event(("How many km is that in total?", "How far does the {o} go?"), ()),
        Event(
            ("The goal is {a} km away from the start. How many km remain?", "The whole way is {a} km. How many km are left?"),
            (("t", "a", "-", "t", "There are {eq} km left.|It still has {eq} km to go."),),
            a="more",
        ),
        Event(
            ("It needs a liter of fuel every {a} km. How many liters does it use?",),
            (("t", "t", "/", "a", "It uses {eq} liters.|The fuel is {eq} liters."),),
            a="divisor",
        ),
        Event(
            ("Each km costs ${a}. How much does it cost?",),
            (("t", "t", "*", "a", "It costs {eq} dollars.|The price is {eq} dollars."),),
            a="times",
        ),
    ),
)

SCHOOL = Theme(
    "school",
    _words("children students players singers dancers guests"),
    starts=(
        Event(
            ("A school has {a} groups of {b} {o}.", "{a} groups with {b} {o} each meet in a hall."),
            (("t", "a", "*", "b", "The groups have {eq} {o}.|That is {eq} {o}."),),
            a="few",
            b="each",
        ),
        Event(("There are {a} {o} at a party of {p}.", "{p} counts {a} {o} in a hall."), (), a="count"),
    ),
    middles=(
        Event(
            ("{a} more {o} come.", "Later {a} {o} join them."),
            (("t", "t", "+", "a", "Now there are {eq} {o}.|That makes {eq} {o}."),),
            a="count",
        ),
        Event(
            ("{a} {o} are ill and stay home.", "{a} {o} go home early."),
            (("t", "t", "-", "a", "That leaves {eq} {o}.|There are {eq} {o} left."),),
            a="less",
        ),
        Event(
            ("Then {a} buses arrive with {b} {o} each.",),
            (
                ("x", "a", "*", "b", "The buses bring {eq} {o}.|{a} buses carry {eq} {o}."),
                ("t", "t", "+", "x", "Now there are {eq} {o}.|That makes {eq} {o}."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("Half of the {o} leave.", "Half of them have to go."),
            (("t", "t", "/", "2", "Half stay, so {eq} {o} are left.|That leaves {eq} {o}."),),
        ),
    ),
    endings=(
        Event(("How many {o} are there?", "How many {o} are there in the end?"), ()),
        Event(
            ("They form {a} equal teams. How many {o} are in a team?", "They sit at {a} tables. How many {o} sit at each?"),
            (("t", "t", "/", "a", "There are {eq} {o} in each.|Each takes {eq} {o}."),),
            a="divisor",
        ),
        Event(
            ("Each gets {a} sandwiches. How many sandwiches is that?",),
            (("t", "t", "*", "a", "They get {eq} sandwiches.|That needs {eq} sandwiches."),),
            a="times",
        ),
        Event(
            ("The hall has {a} seats. How many seats stay free?",),
            (("t", "a", "-", "t", "There are {eq} free seats.|So {eq} seats stay free."),),
            a="more",
        ),
    ),
)

FARM = Theme(
    "farm",
    _words("peas plums figs roses tulips carrots onions beans pumpkins lemons cherries nuts"),
    starts=(
        Event(
            ("{p} has a garden with {a} rows of {b} {o}.", "{p} grows {a} rows of {b} {o}."),
            (("t", "a", "*", "b", "The rows hold {eq} {o}.|In the rows there are {eq} {o}."),),
            a="few",
            b="each",
        ),
        Event(("{p} picks {a} {o}.", "A farm of {p} has {a} {o}."), (), a="count"),
    ),
    middles=(
        Event(
            ("Birds eat {a} of the {o}.", "{a} {o} turn bad."),
            (("t", "t", "-", "a", "That leaves {eq} {o}.|There are {eq} {o} left."),),
            a="less",
        ),
        Event(
            ("{q} brings {a} more {o}.", "The next day there are {a} more {o}."),
            (("t", "t", "+", "a", "Now there are {eq} {o}.|That makes {eq} {o}."),),
            a="count",
        ),
        Event(
            ("{q} adds {a} baskets with {b} {o} each.",),
            (
                ("x", "a", "*", "b", "The baskets hold {eq} {o}.|{a} baskets hold {eq} {o}."),
                ("t", "t", "+", "x", "Now there are {eq} {o}.|That makes {eq} {o}."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("{a} families take {b} {o} each.",),
            (
                ("x", "a", "*", "b", "The families take {eq} {o}.|{a} families take {eq} {o}."),
                ("t", "t", "-", "x", "That leaves {eq} {o}.|There are {eq} {o} left."),
            ),
            a="few",
            b="small",
        ),
        Event(
            ("A third of the {o} are sold.", "{He} sells a third of the {o}."),
            (
                ("x", "t", "/", "3", "A third of them are {eq} {o}.|{He} sells {eq} {o}."),
                ("t", "t", "-", "x", "That leaves {eq} {o}.|There are {eq} {o} left."),
            ),
        ),
        Event(
            ("The next year there are {a} times as many {o}.",),
            (("t", "t", "*", "a", "Then there are {eq} {o}.|That grows to {eq} {o}."),),
            a="times",
        ),
    ),
    endings=(
        Event(("How many {o} are left?", "How many {o} are there in the end?"), ()),
        Event(
            ("{He} packs {a} {o} into each crate. How many crates does {he} fill?",),
            (("t", "t", "/", "a", "{p} fills {eq} crates.|That makes {eq} crates."),),
            a="divisor",
        ),
        Event(
            ("Each is worth ${a}. How much are they worth together?",),
            (("t", "t", "*", "a", "They are worth {eq} dollars.|That is {eq} dollars."),),
            a="times",
        ),
    ),
)

READING = Theme(
    "reading",
    _words("pages letters lines verses notes recipes"),
    starts=(
        Event(
            ("{p} reads {b} {o} a day for {a} days.", "For {a} days {p} reads {b} {o} each day."),
            (("t", "a", "*", "b", "{p} reads {eq} {o}.|In {a} days that is {eq} {o}."),),
            a="few",
            b="each",
        ),
        Event(("{p} has read {a} {o}.", "{p} wrote {a} {o} last month."), (), a="count"),
    ),
    middles=(
        Event(
            ("On Sunday {he} does {a} more {o}.", "Then {he} does another {a} {o}."),
            (("t", "t", "+", "a", "Now it is {eq} {o}.|That makes {eq} {o}."),),
            a="count",
        ),
        Event(
            ("Then {he} does {b} {o} a day for {a} days.", "For {a} more days {he} does {b} {o} a day."),
            (
                ("x", "a", "*", "b", "Those days bring {eq} {o}.|In {a} days that is {eq} {o}."),
                ("t", "t", "+", "x", "Now it is {eq} {o}.|That makes {eq} {o}."),
            ),
            a="few",
            b="each",
        ),
        Event(
            ("{q} does {a} times as many {o}.",),
            (
                ("x", "t", "*", "a", "{q} does {eq} {o}.|For {q} it is {eq} {o}."),
                ("t", "t", "+", "x", "Together it is {eq} {o}.|The two have {eq} {o}."),
            ),
            a="times",
        ),
        Event(
            ("{a} of the {o} do not count.",),
            (("t", "t", "-", "a", "That leaves {eq} {o}.|There are {eq} {o} left."),),
            a="less",
        ),
    ),
    endings=(
        Event(("How many {o} is that?", "How many {o} are there in all?"), ()),
        Event(
            ("There are {a} {o} to do. How many {o} remain?", "The goal is {a} {o}. How many {o} are missing?"),
            (("t", "a", "-", "t", "There are {eq} {o} to go.|So {eq} {o} remain."),),
            a="more",
        ),
        Event(
            ("Spread over {a} days, how many {o} is that a day?",),
            (("t", "t", "/", "a", "That is {eq} {o} a day.|Each day has {eq} {o}."),),
            a="divisor",
        ),
        Event(
            ("Each takes {a} minutes. How many minutes is that?",),
            (("t", "t", "*", "a", "That takes {eq} minutes.|It is {eq} minutes."),),
            a="times",
        ),
    ),
)

THEMES = (COLLECTION, SHOP, WORK, FACTORY, TRIP, SCHOOL, FARM, READING)
