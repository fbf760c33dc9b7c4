"""BABILong's prompts for qa1 to qa10 (github.com/booydar/babilong@ffa075fb, prompts.py), its own spelling kept."""

_ONLY_FACTS = "You need to answer the question based only on the information from the facts."
_MOVES = (
    "If a person got an item in the first location and travelled to the second location the item is also in the second "
    "location. If a person dropped an item in the first location and moved to the second location the item remains in "
    "the first location."
)
_LATEST = "If a person was in different locations, use the latest location the person was in to answer the question."
_HIDDEN = f"hidden in some random text and a question. {_ONLY_FACTS}"
_THINGS = f"I will give you context with the facts about people and objects they carry, {_HIDDEN}"
_PLACES = f"I will give you context with the facts about people and their locations {_HIDDEN} {_LATEST}"
_STOP = "Do not write anything else after that."
_NO_REASON = "Do not explain your answer."
_QUOTED = "\u2019{}\u2019"


def _examples(*pairs: tuple[str, str], between: str = "\n", end: str = "") -> str:
    return between.join(f"<example>\n{facts}\nAnswer: {answer}\n</example>" for facts, answer in pairs) + end


# instruction, examples, format of the answer
PROMPTS = {
    "qa1": (
        "I will give you context with the facts about positions of different persons hidden in some random text and a "
        f"question. {_ONLY_FACTS} If a person was in different locations, use the latest location to answer the "
        "question.",
        _examples(
            (
                "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to balcony. "
                "Where is Charlie?",
                "The most recent location of Charlie is balcony.",
            ),
            (
                "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse travelled to "
                "balcony. Where is Alan?",
                "The most recent location of Alan is shop.",
            ),
            between="\n\n",
        ),
        "Always return your answer in the following format: The most recent location of "
        f"{_QUOTED.format('person')} is {_QUOTED.format('location')}. {_STOP}",
    ),
    "qa2": (
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question.{_ONLY_FACTS}\n{_MOVES}",
        _examples(
            (
                "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. Where is the bottle?",
                "The bottle is in the balcony.",
            ),
            (
                "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where is the screw "
                "driver?",
                "The screw driver is in the kitchen.",
            ),
        ),
        f"Always return your answer in the following format: The {_QUOTED.format('item')} is in "
        f"{_QUOTED.format('location')}. {_STOP}",
    ),
    "qa3": (
        "I give you context with the facts about locations and actions of different persons hidden in some random text "
        f"and a question. {_ONLY_FACTS}\n{_MOVES}",
        _examples(
            (
                "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the bathroom. Daniel "
                "journeyed to the bedroom. Daniel moved to the garden. Mary travelled to the kitchen. Where was the "
                "apple before the kitchen?",
                "Before the kitchen the apple was in the bathroom.",
            ),
            (
                "John went back to the bedroom. John went back to the garden. John went back to the kitchen. Sandra "
                "took the football. Sandra travelled to the garden. Sandra journeyed to the bedroom. Where was the "
                "football before the bedroom?",
                "Before the bedroom the football was in the garden.",
            ),
        ),
        "Always return your answer in the following format: Before the $location_1$ the $item$ was in the "
        f"$location_2$. {_STOP}",
    ),
    "qa4": (
        "I will give you context with the facts about different people, their location and actions, hidden in some "
        f"random text and a question. {_ONLY_FACTS}",
        _examples(
            (
                "The hallway is south of the kitchen. The bedroom is north of the kitchen. "
                "What is the kitchen south of?",
                "bedroom",
            ),
            (
                "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west of the bedroom?",
                "garden",
            ),
        ),
        f"Your answer should contain only one word - location. {_STOP}",
    ),
    "qa5": (
        "I will give you context with the facts about locations and their relations hidden in some random text and a "
        f"question. {_ONLY_FACTS}",
        _examples(
            (
                "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the bedroom. Bill took "
                "the milk there. Who did Mary give the apple to?",
                "Fred",
            ),
            (
                "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk there. Bill "
                "travelled to the bedroom. Who gave the football?",
                "Jeff",
            ),
            (
                "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the bedroom. Jeff "
                "went back to the garden. What did Fred give to Bill?",
                "apple",
            ),
        ),
        f"Your answer should contain only one word. {_STOP} {_NO_REASON}",
    ),
    "qa6": (
        _PLACES,
        _examples(
            ("John travelled to the hallway. John travelled to the garden. Is John in the garden?", "yes"),
            (
                "Mary went to the office. Daniel journeyed to the hallway. Mary went to the bedroom. Sandra went to "
                "the garden. Is Mary in the office?",
                "no",
            ),
            end="\n",
        ),
        f"Your answer should contain only one word - $yes$ or $no$. {_STOP} {_NO_REASON}",
    ),
    "qa7": (
        _THINGS,
        _examples(
            ("Daniel went to the bedroom. Daniel got the apple there. How many objects is Daniel carrying?", "one"),
            ("Mary grabbed the apple there. Mary gave the apple to John. How many objects is Mary carrying?", "none"),
            (
                "Sandra travelled to the hallway. Sandra picked up the milk there. Sandra took the apple there. Mary "
                "travelled to the garden. How many objects is Sandra carrying?",
                "two",
            ),
            end="\n",
        ),
        f"Your answer should contain only one word - $none$ or $number_of_objects$. {_STOP} {_NO_REASON}",
    ),
    "qa8": (
        _THINGS,
        _examples(
            ("Sandra travelled to the garden. Mary grabbed the milk there. What is Mary carrying?", "milk"),
            (
                "Mary travelled to the kitchen. Sandra travelled to the office. John travelled to the office. Sandra "
                "discarded the milk there. What is Sandra carrying?",
                "nothing",
            ),
            (
                "Daniel grabbed the apple there. Mary went to the office. Daniel moved to the garden. Daniel grabbed "
                "the milk there. Mary went to the kitchen. What is Daniel carrying?",
                "apple,milk",
            ),
            end="\n",
        ),
        "Your answer should contain only one or two words: $nothing$ or $object$ or $object_1$, $object_2$. Do not "
        f"write anything else. {_NO_REASON}",
    ),
    "qa9": (
        _PLACES,
        _examples(
            ("John is not in the bathroom. Sandra is not in the bedroom. Is John in the bathroom?", "no"),
            (
                "Mary journeyed to the kitchen. John is in the bedroom. Sandra is not in the garden. Is Mary in the "
                "kitchen?",
                "yes",
            ),
            end="\n",
        ),
        f"Your answer should contain only one word - $yes$ or $no$. Do not write anything else. {_NO_REASON}",
    ),
    "qa10": (
        _PLACES,
        _examples(
            ("Bill is in the kitchen. Julie is either in the school or the cinema. Is Bill in the bedroom?", "no"),
            ("Fred is in the bedroom. Mary is either in the school or the cinema. Is Mary in the school?", "maybe"),
            ("Fred is either in the kitchen or the park. Bill moved to the cinema. Is Bill in the cinema?", "yes"),
            end="\n<context>\n",
        ),
        "Your answer should contain only one word - $yes$ or $no$ or $maybe$. Do not write anything else. "
        f"{_NO_REASON}",
    ),
}
