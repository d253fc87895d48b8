"""Eight worked problems for few-shot prompts, written for this package."""

from __future__ import annotations

from decimal import Decimal

from bailing_jax.evaluation.gsm8k import Example

SHOTS: tuple[Example, ...] = (
    Example(
        "A ferry carries 24 cars on each crossing. On Saturday it crossed 5 times fully loaded "
        "and once with only 9 cars. How many cars did it carry that day?",
        "The full crossings carried 5 * 24 = 120 cars.\n"
        "With the last crossing it carried 120 + 9 = 129 cars.\n#### 129",
        Decimal(129),
    ),
    Example(
        "Noor has 3 jars with 15 buttons each. She sews 4 buttons on each of 7 shirts. How many "
        "buttons are left?",
        "Noor starts with 3 * 15 = 45 buttons.\nThe shirts take 4 * 7 = 28 buttons.\n"
        "So 45 - 28 = 17 buttons are left.\n#### 17",
        Decimal(17),
    ),
    Example(
        "A hall has 18 rows of 12 seats. For a concert 75% of the seats are sold. How many seats "
        "stay empty?",
        "The hall has 18 * 12 = 216 seats.\nOf these 100% - 75% = 25% stay empty.\n"
        "That is 216 / 4 = 54 seats.\n#### 54",
        Decimal(54),
    ),
    Example(
        "Emil rents a kayak for $14 an hour and a life vest for a flat $6. He pays with a $100 "
        "note after 4 hours. How many dollars does he get back?",
        "The kayak costs 4 * 14 = $56.\nWith the vest he owes 56 + 6 = $62.\n"
        "He gets back 100 - 62 = $38.\n#### 38",
        Decimal(38),
    ),
    Example(
        "A tank holds 90 litres. A pump fills it at 8 litres a minute while a leak loses 2 litres "
        "a minute. How many minutes until the empty tank is full?",
        "Each minute the tank gains 8 - 2 = 6 litres.\nIt is full after 90 / 6 = 15 minutes.\n"
        "#### 15",
        Decimal(15),
    ),
    Example(
        "Yuki is twice as old as her brother. In 6 years their ages will add up to 45. How old is "
        "Yuki now?",
        "In 6 years both together will be 2 * 6 = 12 years older, so now their ages add up to "
        "45 - 12 = 33.\nThe brother is 33 / 3 = 11, and Yuki is 2 * 11 = 22.\n#### 22",
        Decimal(22),
    ),
    Example(
        "A printer makes 1,250 leaflets in 50 minutes. At the same speed, how many leaflets does "
        "it make in 3 hours?",
        "In one minute it makes 1,250 / 50 = 25 leaflets.\nThree hours are 3 * 60 = 180 minutes.\n"
        "It makes 25 * 180 = 4500 leaflets.\n#### 4500",
        Decimal(4500),
    ),
    Example(
        "Two thirds of the 48 trees in an orchard bear apples. Half of the other trees bear pears "
        "and the rest plums. How many trees bear plums?",
        "Apples grow on 48 * 2 / 3 = 32 trees.\nThe other trees are 48 - 32 = 16.\n"
        "Half of them bear plums: 16 / 2 = 8.\n#### 8",
        Decimal(8),
    ),
)
