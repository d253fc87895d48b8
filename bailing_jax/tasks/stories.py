"""The settings of the word problems: who, where, what is counted, and how it comes and goes.

A story opens with a person o who has n things, and brings the sentences in which o gets n more of
them or loses n of them. Sentences about other things (containers, traded or bought things,
dollars) are the same in all stories.
"""

from __future__ import annotations

from typing import NamedTuple


class Noun(NamedTuple):
    """Something to count."""

    singular: str
    plural: str


class Story(NamedTuple):
    """One setting; `openings`, `gains` and `losses` are wordings, see `step_kinds`."""

    name: str
    item: Noun
    container: Noun
    openings: tuple[str, ...]
    gains: tuple[str, ...]
    losses: tuple[str, ...]


def _noun(text: str) -> Noun:
    """Singular and plural from "penny pennies", or from a regular singular alone."""
    singular, _, plural = text.partition(" ")
    return Noun(singular, plural or f"{singular}s")


def _story(name: str, item: str, container: str, *sentences: str) -> Story:
    """A story from two openings, two gains and two losses."""
    first, second, *rest = sentences
    gains, losses = (rest[0], rest[1]), (rest[2], rest[3])
    return Story(name, _noun(item), _noun(container), (first, second), gains, losses)


DOLLAR = _noun("dollar")

HER = (
    "Mia", "Anna", "Lucy", "Emma", "Nora", "Ruby", "Ella", "Lily", "Zoe", "Clara",
    "Rosa", "Maya", "Alice", "Grace", "Julia", "Sara", "Tina", "Olga", "Kate", "Jane",
)  # fmt: skip
HIS = (
    "Tom", "Ben", "Leo", "Sam", "Max", "Jack", "Adam", "Noah", "Paul", "Eric",
    "Omar", "Ivan", "Luke", "Dean", "Carl", "Hugo", "Finn", "Oscar", "Peter", "David",
)  # fmt: skip
NAMES = (*HER, *HIS)
POSSESSIVE = dict.fromkeys(HER, "her") | dict.fromkeys(HIS, "his")

CONTAINERS = tuple(map(_noun, (
    "bag", "box boxes", "crate", "chest", "sack", "case", "trunk", "bundle", "barrel", "parcel",
)))  # fmt: skip
TRADED = tuple(map(_noun, (
    "sticker", "marble", "bead", "button", "token", "ribbon", "stamp", "feather", "badge",
)))  # fmt: skip
BOUGHT = tuple(map(_noun, (
    "pencil", "ticket", "notebook", "candle", "balloon", "mug", "puzzle", "spoon", "sponge",
)))  # fmt: skip

OTHER_GAINS = ("{then}{o} gets {n} more {w}.", "{then}{o} finds {n} more {w}.")
OTHER_LOSSES = ("{then}{o} gives away {n} {w}.", "{then}{o} loses {n} {w}.")
DOLLAR_GAINS = ("{then}{o} earns {n} more dollars.", "{then}{o} gets a gift of {n} dollars.")
DOLLAR_LOSSES = ("{then}{o} spends {n} dollars on lunch.", "{then}{o} pays a bill of {n} dollars.")

STORIES = (
    _story("orchard", "apple", "basket",
           "At the orchard, {o} picks {n} apples.",
           "{o} works in an orchard and picks {n} apples in the morning.",
           "{then}{o} picks {n} more apples.", "{then}{o} finds {n} more apples under a tree.",
           "{then}{o} throws away {n} bad apples.", "{then}{o} uses {n} apples to make juice."),
    _story("bakery", "muffin", "tray",
           "{o} bakes {n} muffins for the market.", "In a small bakery, {o} bakes {n} muffins.",
           "{then}{o} bakes {n} more muffins.", "{then}{o} takes {n} more muffins from the oven.",
           "{then}{o} drops {n} muffins and throws them away.",
           "{then}{o} serves {n} muffins to guests."),
    _story("farm", "egg", "carton",
           "{o} collects {n} eggs on the farm.", "This morning, {o} finds {n} eggs in the barn.",
           "{then}{o} collects {n} more eggs.", "{then}{o} finds {n} more eggs in the grass.",
           "{then}{o} drops {n} eggs and throws them away.", "{then}{o} uses {n} eggs to bake."),
    _story("library", "book", "box boxes",
           "{o} owns {n} books.", "{o} has a small library with {n} books.",
           "{then}{o} buys {n} more books.", "{then}{o} gets {n} more books as a present.",
           "{then}{o} gives {n} books to a school.", "{then}{o} loses {n} books in a flood."),
    _story("beach", "shell", "bucket",
           "On the beach, {o} collects {n} shells.", "{o} finds {n} shells near the sea.",
           "{then}{o} finds {n} more shells.", "{then}{o} collects {n} more shells in the sand.",
           "{then}{o} throws {n} shells back into the sea.", "{then}{o} loses {n} shells."),
    _story("garden", "rose", "vase",
           "{o} grows {n} roses in the garden.", "In the garden, {o} cuts {n} roses.",
           "{then}{o} cuts {n} more roses.", "{then}{o} grows {n} more roses.",
           "{then}{o} gives {n} roses to a neighbor.", "{then}{o} loses {n} roses in a storm."),
    _story("toys", "block", "bin",
           "{o} has {n} toy blocks.", "{o} plays with {n} blocks, all of them new.",
           "{then}{o} gets {n} more blocks as a present.", "{then}{o} buys {n} more blocks.",
           "{then}{o} gives {n} blocks to a cousin.", "{then}{o} loses {n} blocks."),
    _story("cards", "card", "album",
           "{o} collects baseball cards and has {n} cards.", "{o} keeps {n} cards in a drawer.",
           "{then}{o} wins {n} more cards.", "{then}{o} buys {n} more cards.",
           "{then}{o} loses {n} cards in a game.", "{then}{o} gives {n} cards to a cousin."),
    _story("kitchen", "cookie", "jar",
           "{o} makes {n} cookies in the kitchen.", "For a party, {o} bakes {n} cookies.",
           "{then}{o} bakes {n} more cookies.", "{then}{o} makes {n} more cookies.",
           "{then}{o} serves {n} cookies to guests.",
           "{then}{o} burns {n} cookies and throws them away."),
    _story("forest", "mushroom", "basket",
           "In the forest, {o} finds {n} mushrooms.", "{o} picks {n} mushrooms in the forest.",
           "{then}{o} picks {n} more mushrooms.",
           "{then}{o} finds {n} more mushrooms under a tree.",
           "{then}{o} throws away {n} bad mushrooms.",
           "{then}{o} cooks {n} mushrooms for dinner."),
    _story("workshop", "stool", "truck",
           "In the workshop, {o} builds {n} stools.", "{o} works with wood and makes {n} stools.",
           "{then}{o} builds {n} more stools.", "{then}{o} makes {n} more stools.",
           "{then}{o} gives {n} stools to a school.", "{then}{o} throws away {n} broken stools."),
    _story("bike shop", "bell", "drawer",
           "{o} runs a bike shop and has {n} bells.", "For a bike shop, {o} orders {n} bells.",
           "{then}{o} orders {n} more bells.", "{then}{o} finds {n} more bells in the shop.",
           "{then}{o} uses {n} bells to repair bikes.",
           "{then}{o} throws away {n} broken bells."),
    _story("school", "pen", "cup",
           "A teacher gives {o} {n} pens for school.", "{o} brings {n} pens to school.",
           "{then}{o} buys {n} more pens.", "{then}{o} finds {n} more pens in a desk.",
           "{then}{o} gives {n} pens to other students.", "{then}{o} loses {n} pens in class."),
    _story("art class", "brush brushes", "jar",
           "{o} is a painter and owns {n} brushes.", "For an art class, {o} has {n} brushes.",
           "{then}{o} buys {n} more brushes.",
           "{then}{o} gets {n} more brushes from a teacher.",
           "{then}{o} throws away {n} old brushes.",
           "{then}{o} gives {n} brushes to other students."),
    _story("sewing", "shirt", "suitcase",
           "{o} sews {n} shirts.", "{o} works with cloth and makes {n} shirts.",
           "{then}{o} sews {n} more shirts.", "{then}{o} makes {n} more shirts.",
           "{then}{o} gives {n} shirts to poor families.",
           "{then}{o} burns {n} shirts with the iron and throws them away."),
    _story("pond", "frog", "tank",
           "{o} catches {n} frogs at a pond.", "{o} keeps {n} frogs in a pond.",
           "{then}{o} catches {n} more frogs.", "{then}{o} brings {n} more frogs home.",
           "{then}{o} lets {n} frogs go.", "{then}{o} gives {n} frogs to a zoo."),
    _story("ranch", "goat", "pen",
           "{o} raises {n} goats on a ranch.", "On the hill, {o} keeps {n} goats.",
           "{then}{o} buys {n} more goats.", "{then}{o} brings {n} more goats home.",
           "{then}{o} loses {n} goats in a storm.", "{then}{o} gives {n} goats to a neighbor."),
    _story("fruit stall", "melon", "crate",
           "{o} brings {n} melons to the market.", "At a fruit stall, {o} has {n} melons.",
           "{then}{o} orders {n} more melons.", "{then}{o} brings {n} more melons.",
           "{then}{o} drops {n} melons and throws them away.",
           "{then}{o} throws away {n} bad melons."),
    _story("festival", "pie", "box boxes",
           "For a festival, {o} makes {n} pies.", "{o} bakes {n} pies for the whole town.",
           "{then}{o} makes {n} more pies.", "{then}{o} takes {n} more pies from the oven.",
           "{then}{o} serves {n} pies to guests.",
           "{then}{o} burns {n} pies and throws them away."),
    _story("old coins", "coin", "purse",
           "{o} collects old coins and has {n} coins.", "Under the house, {o} finds {n} coins.",
           "{then}{o} finds {n} more coins.", "{then}{o} gets {n} more coins from an uncle.",
           "{then}{o} gives {n} coins to a museum.", "{then}{o} loses {n} coins."),
    _story("music", "record", "case",
           "{o} loves music and owns {n} records.", "{o} plays music and has {n} records.",
           "{then}{o} buys {n} more records.", "{then}{o} gets {n} more records from an uncle.",
           "{then}{o} throws away {n} broken records.",
           "{then}{o} gives {n} records to a museum."),
    _story("autumn", "walnut", "sack",
           "In autumn, {o} collects {n} walnuts.", "{o} finds {n} walnuts under a tree.",
           "{then}{o} collects {n} more walnuts.", "{then}{o} finds {n} more walnuts.",
           "{then}{o} throws away {n} bad walnuts.", "{then}{o} uses {n} walnuts to bake."),
    _story("gym", "ball", "net",
           "A coach gives {o} {n} balls for the team.", "In the gym, {o} has {n} balls.",
           "{then}{o} buys {n} more balls.", "{then}{o} finds {n} more balls in the gym.",
           "{then}{o} loses {n} balls in the grass.", "{then}{o} gives {n} balls to a school."),
    _story("camp", "blanket", "trunk",
           "At a summer camp, {o} has {n} blankets.", "For a camp, {o} buys {n} blankets.",
           "{then}{o} buys {n} more blankets.", "{then}{o} finds {n} more blankets in a tent.",
           "{then}{o} gives {n} blankets to poor families.",
           "{then}{o} loses {n} blankets in a storm."),
    _story("harbor", "crab", "bucket",
           "In the harbor, {o} catches {n} crabs.", "{o} goes out by boat and catches {n} crabs.",
           "{then}{o} catches {n} more crabs.", "{then}{o} finds {n} more crabs in a net.",
           "{then}{o} throws {n} crabs back into the sea.",
           "{then}{o} cooks {n} crabs for dinner."),
    _story("flower shop", "tulip", "bunch bunches",
           "{o} runs a flower shop and has {n} tulips.", "For a flower shop, {o} cuts {n} tulips.",
           "{then}{o} cuts {n} more tulips.", "{then}{o} orders {n} more tulips.",
           "{then}{o} throws away {n} old tulips.", "{then}{o} gives {n} tulips to guests."),
    _story("cellar", "onion", "sack",
           "{o} keeps {n} onions in the cellar.", "{o} brings {n} onions from the field.",
           "{then}{o} brings {n} more onions from the field.", "{then}{o} buys {n} more onions.",
           "{then}{o} throws away {n} bad onions.", "{then}{o} uses {n} onions to make soup."),
    _story("field", "pumpkin", "wagon",
           "{o} grows {n} pumpkins in a field.", "In autumn, {o} cuts {n} pumpkins.",
           "{then}{o} cuts {n} more pumpkins.", "{then}{o} brings {n} more pumpkins home.",
           "{then}{o} uses {n} pumpkins to make soup.",
           "{then}{o} gives {n} pumpkins to a school."),
    _story("sweet shop", "candy candies", "bag",
           "{o} runs a sweet shop and makes {n} candies.", "For a party, {o} buys {n} candies.",
           "{then}{o} makes {n} more candies.", "{then}{o} buys {n} more candies.",
           "{then}{o} eats {n} candies.", "{then}{o} gives {n} candies to a class."),
    _story("river", "stone", "bucket",
           "At the river, {o} collects {n} stones.", "{o} takes {n} flat stones from the river.",
           "{then}{o} collects {n} more stones.", "{then}{o} finds {n} more stones in the sand.",
           "{then}{o} throws {n} stones back into the river.",
           "{then}{o} uses {n} stones to build a wall."),
    _story("knitting", "scarf scarves", "drawer",
           "In winter, {o} knits {n} scarves.", "{o} knits {n} warm scarves for the market.",
           "{then}{o} knits {n} more scarves.", "{then}{o} makes {n} more scarves.",
           "{then}{o} gives {n} scarves to poor families.",
           "{then}{o} ruins {n} scarves in the wash and throws them away."),
    _story("pottery", "bowl", "crate",
           "{o} works with clay and makes {n} bowls.", "In a clay workshop, {o} makes {n} bowls.",
           "{then}{o} makes {n} more bowls.", "{then}{o} takes {n} more bowls from the oven.",
           "{then}{o} throws away {n} broken bowls.", "{then}{o} gives {n} bowls to a museum."),
    _story("photos", "photo", "album",
           "On a trip, {o} takes {n} photos.", "{o} prints {n} photos of the mountains.",
           "{then}{o} takes {n} more photos.", "{then}{o} prints {n} more photos.",
           "{then}{o} throws away {n} dark photos.", "{then}{o} gives {n} photos to an aunt."),
    _story("post office", "letter", "sack",
           "{o} works at the post office and has {n} letters.",
           "A mail truck brings {o} {n} letters.",
           "{then}{o} gets {n} more letters.", "{then}{o} finds {n} more letters in a drawer.",
           "{then}{o} sends out {n} letters.", "{then}{o} brings {n} letters to the school."),
    _story("zoo", "banana", "bucket",
           "{o} works at a zoo and has {n} bananas.", "For the monkeys, {o} buys {n} bananas.",
           "{then}{o} orders {n} more bananas.", "{then}{o} buys {n} more bananas.",
           "{then}{o} gives {n} bananas to the monkeys.",
           "{then}{o} throws away {n} bad bananas."),
    _story("theater", "mask", "trunk",
           "For a theater, {o} makes {n} masks.", "{o} plays in a theater and owns {n} masks.",
           "{then}{o} makes {n} more masks.", "{then}{o} gets {n} more masks from an aunt.",
           "{then}{o} throws away {n} broken masks.", "{then}{o} gives {n} masks to a museum."),
    _story("robots", "battery batteries", "pack",
           "{o} builds robots and has {n} batteries.", "{o} orders {n} batteries for a robot club.",
           "{then}{o} orders {n} more batteries.", "{then}{o} finds {n} more batteries in a desk.",
           "{then}{o} uses {n} batteries in a robot.",
           "{then}{o} throws away {n} old batteries."),
    _story("tools", "nail", "tin",
           "{o} has {n} nails to build a barn.", "For a tree house, {o} buys {n} nails.",
           "{then}{o} buys {n} more nails.", "{then}{o} finds {n} more nails in the barn.",
           "{then}{o} uses {n} nails to repair a roof.", "{then}{o} loses {n} nails."),
    _story("building", "brick", "stack",
           "{o} wants to build a house and has {n} bricks.", "A truck brings {o} {n} bricks.",
           "{then}{o} orders {n} more bricks.", "{then}{o} makes {n} more bricks from clay.",
           "{then}{o} uses {n} bricks to build a wall.",
           "{then}{o} throws away {n} broken bricks."),
    _story("greenhouse", "plant", "tray",
           "{o} grows {n} plants in a greenhouse.", "In spring, {o} buys {n} young plants.",
           "{then}{o} grows {n} more plants.", "{then}{o} buys {n} more plants.",
           "{then}{o} throws away {n} dry plants.", "{then}{o} gives {n} plants to a neighbor."),
    _story("seeds", "seed", "packet",
           "{o} keeps {n} seeds for the spring.", "From a sunflower, {o} takes {n} seeds.",
           "{then}{o} collects {n} more seeds.", "{then}{o} buys {n} more seeds.",
           "{then}{o} feeds {n} seeds to the birds.", "{then}{o} uses {n} seeds in the garden."),
    _story("sports", "medal", "case",
           "{o} runs fast and owns {n} medals.", "For a sports day, {o} orders {n} medals.",
           "{then}{o} wins {n} more medals.", "{then}{o} orders {n} more medals.",
           "{then}{o} gives {n} medals to a museum.", "{then}{o} loses {n} medals."),
    _story("lanterns", "lantern", "box boxes",
           "{o} makes {n} paper lanterns.", "For a night festival, {o} buys {n} lanterns.",
           "{then}{o} makes {n} more lanterns.", "{then}{o} buys {n} more lanterns.",
           "{then}{o} burns {n} lanterns.", "{then}{o} gives {n} lanterns to guests."),
    _story("kites", "kite", "bundle",
           "{o} builds {n} paper kites.", "On a windy day, {o} brings {n} kites to the beach.",
           "{then}{o} builds {n} more kites.", "{then}{o} buys {n} more kites.",
           "{then}{o} loses {n} kites in the wind.", "{then}{o} gives {n} kites to a class."),
    _story("hotel", "towel", "cart",
           "{o} works in a hotel and has {n} towels.", "A hotel gives {o} {n} clean towels.",
           "{then}{o} washes and adds {n} more towels.", "{then}{o} orders {n} more towels.",
           "{then}{o} gives {n} towels to guests.", "{then}{o} throws away {n} old towels."),
    _story("restaurant", "plate", "stack",
           "{o} runs a restaurant and has {n} plates.", "For a wedding, {o} buys {n} plates.",
           "{then}{o} buys {n} more plates.", "{then}{o} orders {n} more plates.",
           "{then}{o} drops {n} plates and throws them away.",
           "{then}{o} gives {n} plates to a neighbor."),
    _story("jewels", "ring", "case",
           "{o} makes {n} silver rings.", "{o} runs a jewel shop and has {n} rings.",
           "{then}{o} makes {n} more rings.", "{then}{o} orders {n} more rings.",
           "{then}{o} loses {n} rings.", "{then}{o} gives {n} rings to a museum."),
    _story("dolls", "doll", "trunk",
           "{o} collects dolls and has {n} dolls.", "{o} sews {n} small dolls.",
           "{then}{o} sews {n} more dolls.", "{then}{o} buys {n} more dolls.",
           "{then}{o} gives {n} dolls to a cousin.", "{then}{o} throws away {n} old dolls."),
)  # fmt: skip

MONEY_STORIES = (
    _story("savings", "dollar", "envelope",
           "{o} saves {n} dollars.", "{o} has {n} dollars in the bank.",
           *DOLLAR_GAINS, *DOLLAR_LOSSES),
    _story("summer job", "dollar", "purse",
           "{o} earns {n} dollars with a summer job.", "{o} works all week and earns {n} dollars.",
           *DOLLAR_GAINS, *DOLLAR_LOSSES),
    _story("birthday", "dollar", "envelope",
           "On a birthday, {o} gets {n} dollars.", "An uncle gives {o} {n} dollars as a present.",
           *DOLLAR_GAINS, *DOLLAR_LOSSES),
    _story("prize", "dollar", "purse",
           "{o} wins a prize of {n} dollars.", "For the best painting, {o} gets {n} dollars.",
           *DOLLAR_GAINS, *DOLLAR_LOSSES),
)  # fmt: skip
