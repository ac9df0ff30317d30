"""Write the pairs of the retention probe: python scripts/make_probe.py (no network, no randomness).

A row of a table is two contexts and two continuations: the first continuation is right after the first context
and wrong after the second, and the other way round. Each row makes two pairs, so over the whole set every
continuation is right as often as it is wrong: a model that only prefers frequent words scores one half, not more.

Continuations are single words, so that right and wrong take equally many tokens wherever a tokenizer knows both.
The sentences are written for this project. No question of the set `facts` is among them; both add small numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

OUT = Path(__file__).parent.parent / "src" / "palimpsest" / "data" / "probe" / "pairs.jsonl"
Row = tuple[str, str, str, str]  # context of a, context of b, a, b

# -- grammar ----------------------------------------------------------------------------------------------------------
# The noun next to the verb has the other number than the subject.
AGREEMENT_BE = [
    ("The key to the old cabinets", "The keys to the old cabinet"),
    ("The label on the bottles", "The labels on the bottle"),
    ("The picture of my sisters", "The pictures of my sister"),
    ("The roof of the houses", "The roofs of the house"),
    ("The teacher of the boys", "The teachers of the boy"),
    ("The road to the villages", "The roads to the village"),
    ("The window above the doors", "The windows above the door"),
    ("The letter from my friends", "The letters from my friend"),
    ("The dog next to the horses", "The dogs next to the horse"),
    ("The leader of the groups", "The leaders of the group"),
    ("The cup beside the plates", "The cups beside the plate"),
    ("The bridge over the rivers", "The bridges over the river"),
]
AGREEMENT: list[Row] = [
    *((one, many, "is", "are") for one, many in AGREEMENT_BE),
    *((f"{one} last summer", f"{many} last summer", "was", "were") for one, many in AGREEMENT_BE[:6]),
    *((f"I think that {one.lower()}", f"I think that {many.lower()}", "has", "have") for one, many in AGREEMENT_BE[6:]),
    ("My uncle, who lives with two cats,", "My uncles, who live with a cat,", "likes", "like"),
    ("The girl behind the trees", "The girls behind the tree", "sings", "sing"),
    ("The nurse near the doctors", "The nurses near the doctor", "works", "work"),
    ("It is known that the king", "It is known that the kings", "rules", "rule"),
    ("Each of the players", "All of the players", "wants", "want"),
    ("Every child", "Most children", "needs", "need"),
]
FORMS: list[Row] = [
    ("Yesterday she", "Tomorrow she will", "went", "go"),
    ("Last night we", "Tonight we will", "ate", "eat"),
    ("An hour ago he", "He has never", "spoke", "spoken"),
    ("Last week she", "She has already", "wrote", "written"),
    ("The day before yesterday they", "They have often", "saw", "seen"),
    ("Last spring the river", "In the winter the river has", "froze", "frozen"),
    ("Two days ago the boy", "The window was", "broke", "broken"),
    ("In 1990 my father", "The prize was", "gave", "given"),
    ("He likes to", "He enjoys", "swim", "swimming"),
    ("She decided to", "She avoided", "leave", "leaving"),
    ("They can", "They are", "dance", "dancing"),
    ("You should", "You are", "sleep", "sleeping"),
    ("We must", "We have been", "wait", "waiting"),
    ("This mountain is higher than that one, but Everest is the", "Compared with a hill, a mountain is", "highest",
     "higher"),
    ("Of the three sisters, Anna is the", "Anna is not as tall as Eve; Eve is", "tallest", "taller"),
    ("The bird sings", "The song of the bird is", "beautifully", "beautiful"),
    ("The soldiers fought", "The soldiers were", "bravely", "brave"),
    ("She closed the door", "The room was", "quietly", "quiet"),
    ("On the table there was one", "On the table there were two", "book", "books"),
    ("He saw a single", "He saw several", "bird", "birds"),
    ("She bought an", "She bought a", "apple", "banana"),
    ("He waited for an", "He waited for a", "hour", "minute"),
    ("This is the house in", "This is the man", "which", "who"),
    ("There is not", "There are not", "much", "many"),
    ("The boy hurt", "The girl hurt", "himself", "herself"),
    ("My sister lost", "My brother lost", "her", "his"),
    ("The queen sat down on", "The king sat down on", "her", "his"),
    ("We enjoyed", "They enjoyed", "ourselves", "themselves"),
]  # fmt: skip

# -- knowledge --------------------------------------------------------------------------------------------------------
FACTS: list[Row] = [
    ("Bread is baked from", "Wine is made from", "flour", "grapes"),
    ("Butter is made from", "Paper is made from", "milk", "wood"),
    ("The sun rises in the", "The sun sets in the", "east", "west"),
    ("Fish breathe with their", "Humans breathe with their", "gills", "lungs"),
    ("Birds are covered with", "Cats are covered with", "feathers", "fur"),
    ("Bees collect", "Cows eat", "nectar", "grass"),
    ("The heart pumps", "The lungs take in", "blood", "air"),
    ("Ice is frozen", "Lava is molten", "water", "rock"),
    ("A doctor works in a", "A teacher works in a", "hospital", "school"),
    ("Trains run on", "Ships sail on the", "rails", "sea"),
    ("Polar bears live in the", "Camels live in the", "Arctic", "desert"),
    ("We see with our", "We hear with our", "eyes", "ears"),
    ("We smell with the", "We taste with the", "nose", "tongue"),
    ("A thermometer measures", "A clock measures", "temperature", "time"),
    ("A telescope is used to look at the", "A microscope is used to look at", "stars", "cells"),
    ("A library lends", "A bank lends", "books", "money"),
    ("Potatoes grow under the", "Apples grow on a", "ground", "tree"),
    ("Water boils when it gets very", "Water freezes when it gets very", "hot", "cold"),
    ("A pilot flies a", "A captain steers a", "plane", "ship"),
    ("The guitar has", "The piano has", "strings", "keys"),
    ("Rust forms on", "Mold grows on", "iron", "bread"),
    ("The Mona Lisa is a", "Hamlet is a", "painting", "play"),
    ("A fire needs", "A seed needs", "oxygen", "soil"),
    ("Lemons taste", "Honey tastes", "sour", "sweet"),
    ("Toothpaste is used to clean the", "Shampoo is used to wash the", "teeth", "hair"),
    ("With a hammer you drive in a", "With a spoon you stir the", "nail", "soup"),
    ("Dinosaurs are", "Elephants are alive, but their numbers are", "extinct", "falling"),
    ("During the day we see the", "At night we see the", "sun", "moon"),
]

# -- numbers ----------------------------------------------------------------------------------------------------------
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COUNTING: list[Row] = [
    *(
        (f"{', '.join(WORDS[i : i + 3])},", f"{', '.join(WORDS[j : j + 3])},", WORDS[i + 3], WORDS[j + 3])
        for i, j in [(0, 3), (1, 5), (2, 6)]
    ),
    *(
        (f"{', '.join(WORDS[i : i - 3 : -1])},", f"{', '.join(WORDS[j : j - 3 : -1])},", WORDS[i - 3], WORDS[j - 3])
        for i, j in [(9, 5), (8, 6), (7, 4)]
    ),
    ("two, four, six,", "one, three, five,", "eight", "seven"),
    ("ten, twenty, thirty,", "twenty, thirty, forty,", "forty", "fifty"),
]
SUMS: list[Row] = [
    (f"{WORDS[a - 1]} plus {WORDS[b - 1]} equals", f"{WORDS[c - 1]} plus {WORDS[d - 1]} equals", WORDS[a + b - 1],
     WORDS[c + d - 1])
    for a, b, c, d in [(1, 1, 2, 2), (2, 1, 3, 2), (4, 1, 2, 5), (3, 3, 4, 4), (5, 5, 6, 3), (1, 3, 1, 5)]
]  # fmt: skip
COMPARISONS: list[Row] = [
    (f"Of the two numbers {WORDS[a]} and {WORDS[b]}, the larger one is",
     f"Of the two numbers {WORDS[a]} and {WORDS[b]}, the smaller one is", WORDS[max(a, b)], WORDS[min(a, b)])
    for a, b in [(0, 8), (9, 1), (2, 7), (6, 3), (1, 9), (7, 0), (4, 8), (9, 5)]
] + [
    ("A hundred is more than ten, and ten is", "Ten is less than a hundred, and a hundred is", "less", "more"),
    ("A child of five is", "A man of ninety is", "young", "old"),
    ("A year is", "A second is", "long", "short"),
    ("An elephant weighs more than a mouse, so the elephant is", "A mouse weighs less than a cat, so the mouse is",
     "heavier", "lighter"),
]  # fmt: skip
NUMBERS = COUNTING + SUMS + COMPARISONS

# -- common sense -----------------------------------------------------------------------------------------------------
COMMON_SENSE: list[Row] = [
    ("He put on a warm coat because it was", "He took off his coat because it was", "cold", "hot"),
    ("She drank some water because she was", "She ate a sandwich because she was", "thirsty", "hungry"),
    ("He went to bed because he was", "He went to the doctor because he was", "tired", "sick"),
    ("They opened their umbrellas because it began to", "They put out the candle because it began to", "rain", "smoke"),
    ("The glass fell on the floor and", "The paper was thrown into the fire and", "broke", "burned"),
    ("She lit a candle because the room was", "She closed the curtains because the room was too", "dark", "bright"),
    ("He won the race and was very", "His dog died and he was very", "happy", "sad"),
    ("To cut the bread he took a", "To eat the soup he took a", "knife", "spoon"),
    ("To open the locked door you need a", "To write a letter you need a", "key", "pen"),
    ("She put the milk into the", "She put the cake into the", "fridge", "oven"),
    ("The baby cried because it wanted its", "The student worried because he had failed his", "mother", "exam"),
    ("After the rain the street was", "After a month without rain the garden was", "wet", "dry"),
    ("The box was so heavy that he could not", "The box was so high up that he could not", "lift", "reach"),
    ("He was afraid of the dog because it might", "He was afraid of the plane because it might", "bite", "crash"),
    ("The soup was too hot, so she waited for it to", "The ice was too hard, so she waited for it to", "cool", "melt"),
    ("The music was so loud that she covered her", "The light was so bright that she covered her", "ears", "eyes"),
    ("The train was late, so they had to", "The train was leaving, so they had to", "wait", "hurry"),
    ("She forgot her money, so she could not", "She forgot her glasses, so she could not", "pay", "read"),
    ("He studied hard and he", "He never studied and he", "passed", "failed"),
    ("Without wings a bird cannot", "Without water a fish cannot", "fly", "swim"),
    ("The knife was so sharp that it", "The stove was so hot that it", "cut", "burned"),
    ("The lion hunted the zebra because it was hungry; it wanted to", "The zebra saw the lion and wanted to", "eat",
     "run"),
    ("In the library you have to be", "At a concert the band is", "quiet", "loud"),
    ("He dropped the egg, and now the floor is", "He mopped the floor, and now the floor is", "dirty", "clean"),
    ("The balloon was filled with too much air and it", "The boat was filled with water and it", "burst", "sank"),
    ("A feather is", "A stone is", "light", "heavy"),
    ("The tortoise walks", "The cheetah runs very", "slowly", "fast"),
    ("She turned on the heater to make the room", "She opened the window to make the room", "warmer", "cooler"),
]  # fmt: skip

# -- spelling ---------------------------------------------------------------------------------------------------------
SPELLING: list[Row] = [
    ("The dog wagged", "I think", "its", "it's"),
    ("The children put on", "Look over", "their", "there"),
    ("Please close", "I know that", "your", "you're"),
    ("First we eat,", "He is taller", "then", "than"),
    ("I do not want to", "The screw is", "lose", "loose"),
    ("I like the sunny", "I do not know", "weather", "whether"),
    ("She ate a", "After the war there was", "piece", "peace"),
    ("Speak up, I cannot", "Please come", "hear", "here"),
    ("The answers you gave are all", "Please take a pencil and", "right", "write"),
    ("Be careful or the glass will", "To stop the car, press the", "break", "brake"),
    ("The butcher sells", "It was nice to", "meat", "meet"),
    ("The ship sailed across the", "It was so dark that I could not", "sea", "see"),
    ("They have a daughter and a", "The earth moves around the", "son", "sun"),
    ("Please sit down and", "He wants to lose", "wait", "weight"),
    ("There are seven days in a", "After the illness he was very", "week", "weak"),
    ("She went to the shop to", "The letter was written", "buy", "by"),
    ("There are sixty minutes in an", "We love", "hour", "our"),
    ("The postman brings the", "The bull is a", "mail", "male"),
    ("We flew to Paris by", "The food was simple and", "plane", "plain"),
    ("The car drove down the", "Yesterday she got on a horse and", "road", "rode"),
    ("The dog has a long", "The old man told a", "tail", "tale"),
    ("The bridge is made of", "Thieves", "steel", "steal"),
    ("To bake a cake you need", "The rose is a beautiful", "flour", "flower"),
    ("The hunter shot a", "She began the letter with the word", "deer", "dear"),
    ("He ate the", "The mouse ran into its", "whole", "hole"),
    ("I am sure that he", "The table is made of", "would", "wood"),
    ("We go", "It is much", "to", "too"),
    ("The wind", "The sky is", "blew", "blue"),
]

# -- copying from the context -----------------------------------------------------------------------------------------
NOUNS = [("tiger", "window"), ("river", "candle"), ("bread", "mountain"), ("garden", "silver"), ("winter", "table"),
         ("music", "stone")]  # fmt: skip


def copying() -> list[Row]:
    templates = (
        "The password is {}. Please remember that the password is",
        "apple, chair, {}, cloud. apple, chair,",
        "He wrote the word {} on the board, and we all read the word",
        "The book is about a {}. It begins with a picture of the",
    )
    return [(template.format(a), template.format(b), a, b) for a, b in NOUNS for template in templates]


# -- harder pairs -----------------------------------------------------------------------------------------------------
# A small model has nearly all pairs above right, and most still when it has lost text. Below, the cue lies far back,
# or the wrong continuation is right for another subject of the same sort (a capital for a capital).
# Tried on SmolLM2-135M-Instruct and left out: sums and counts that are one apart (50 % right), who did what to whom
# (53 %) and which of two things came first (54 %) are at chance undamaged; negation (74 %) hardly moved with damage.
FAR_SUBJECTS = [("report", "reports"), ("painting", "paintings"), ("machine", "machines"), ("story", "stories"),
                ("tower", "towers"), ("lawyer", "lawyers"), ("ticket", "tickets"), ("village", "villages"),
                ("engine", "engines"), ("recipe", "recipes"), ("actor", "actors"), ("bridge", "bridges")]  # fmt: skip
FAR_CLAUSES = [  # after a singular subject, after a plural one: the nouns have the other number
    ("that the managers from the northern offices mentioned", "that the manager from the northern office mentioned"),
    ("which the tourists near the crowded markets described", "which the tourist near the crowded market described"),
    ("behind the walls that the soldiers of the kings built", "behind the wall that the soldier of the king built"),
]


def far_agreement() -> list[Row]:
    verbs = (("was", "were"), ("has", "have"), ("is", "are"))
    return [
        (f"The {one} {FAR_CLAUSES[k][0]}", f"The {many} {FAR_CLAUSES[k][1]}", *verbs[(i + k) % 3])
        for i, (one, many) in enumerate(FAR_SUBJECTS)
        for k in range(3)
    ]


# Of subjects that the built-in question set holds out, so that training on it does not teach them.
CLOSE_FACTS = {
    "The capital of {} is": "Latvia Riga, Estonia Tallinn; Zambia Lusaka, Bangladesh Dhaka; Cuba Havana, "
    "Nicaragua Managua; Iraq Baghdad, Iran Tehran; Algeria Algiers, Tunisia Tunis; Norway Oslo, Iceland Reykjavik; "
    "Poland Warsaw, Albania Tirana; Uruguay Montevideo, Ireland Dublin",
    "In the shops of {} people pay with the": "Iceland krona, Poland zloty; Iran rial, Iraq dinar; Bangladesh taka, "
    "Zambia kwacha; Turkey lira, Uruguay peso; Cuba peso, Algeria dinar; Norway krone, Germany euro",
    "Most people in {} speak": "Iran Persian, Iraq Arabic; Estonia Estonian, Latvia Latvian; Turkey Turkish, "
    "Bangladesh Bengali; Norway Norwegian, Iceland Icelandic; Tunisia Arabic, Uruguay Spanish; Albania Albanian, "
    "Poland Polish",
    "The city of {} lies in": "Bergen Norway, Dresden Germany; Krakow Poland, Vladivostok Russia; Johannesburg Africa, "
    "Istanbul Turkey",
    "The book {} was written by": "Great_Expectations Dickens, Anna_Karenina Tolstoy; The_Time_Machine Wells, "
    "The_Grapes_of_Wrath Steinbeck; Madame_Bovary Flaubert, Peter_Pan Barrie",
    "The opera {} is by": "La_Traviata Verdi, Madame_Butterfly Puccini",
    "The chemical symbol of {} is": "germanium Ge, gallium Ga; palladium Pd, silver Ag",
    "In biology, the {} is a kind of": "chameleon reptile, cod fish; butterfly insect, giraffe mammal; "
    "cockroach insect, sparrow bird; turtle reptile, shark fish",
    "The young of a {} is called a": "swan cygnet, donkey foal; kangaroo joey, giraffe calf",
}


def close_facts() -> list[Row]:
    rows = []
    for statement, table in CLOSE_FACTS.items():
        for entry in table.split("; "):
            (one, a), (two, b) = (part.split(" ") for part in entry.split(", "))
            rows.append((*(statement.format(name.replace("_", " ")) for name in (one, two)), a, b))
    return rows


TABLES: dict[str, list[Row]] = {
    "agreement": AGREEMENT,
    "forms": FORMS,
    "facts": FACTS,
    "numbers": NUMBERS,
    "common_sense": COMMON_SENSE,
    "spelling": SPELLING,
    "copying": copying(),
    "far_agreement": far_agreement(),
    "close_facts": close_facts(),
}


def main() -> None:
    lines = []
    for kind, rows in TABLES.items():
        number = 0
        for context_a, context_b, a, b in rows:
            for prompt, right, wrong in ((context_a, a, b), (context_b, b, a)):
                number += 1
                pair = {"id": f"{kind}-{number:02d}", "kind": kind, "prompt": prompt[0].upper() + prompt[1:],
                        "right": f" {right}", "wrong": f" {wrong}"}  # fmt: skip
                lines.append(json.dumps(pair) + "\n")
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} pairs in {OUT}")


if __name__ == "__main__":
    main()
