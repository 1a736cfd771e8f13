"""What is made of an llm's answer: one line, without what is no caption."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ella_kd.upsample import clean_caption

FOX = "A red fox sits on a mossy log. Tall grey pines stand behind it."


@pytest.mark.parametrize(("answer", "caption"), [
    (FOX, FOX),
    (f'"{FOX}"', FOX),
    (f"\u201c{FOX}\u201d\n", FOX),
    (f"'{FOX}'", FOX),
    ("'The fox's log is red.'", "The fox's log is red."),
    (f'"{FOX}', FOX),
    (f"Sure, here is the long version:\n\n{FOX}", FOX),
    (f"Sure! Here's a detailed caption for your prompt: \"{FOX}\"", FOX),
    (f"Certainly! {FOX}", FOX),
    (f"Here is the longer caption.\n\n{FOX}", FOX),
    (f"**Long caption:** {FOX}", FOX),
    (f"Assistant: {FOX}", FOX),
    (f"Output: Long: {FOX}", FOX),
    (f"### Caption\n{FOX}".replace("Caption", "Caption:"), FOX),
    (f"```text\n{FOX}\n```", FOX),
    ("A **red** fox sits on a _mossy_ `log`. Tall *grey* pines stand behind it.", FOX),
    ("- A red fox sits on a mossy log.\n- Tall grey pines stand behind it.", FOX),
    ("1. A red fox sits on a mossy log.\n2. Tall grey pines stand behind it.", FOX),
    ("A red fox sits\r\n on a mossy log.\n\n\tTall grey\u2028pines stand behind it.", FOX),
    (f"{FOX} Under the log the", FOX),
    (f'"{FOX} Under the log the', FOX),
    (f"{FOX} It belongs to Mr. Smith and St. J. Mary of", FOX),
    (f"{FOX}\n\nInput: a dog\nOutput: A dog runs.", FOX),
    (f"{FOX} Input: a dog", FOX),
    (f"{FOX}\n**Input:** a dog", FOX),
    (f"Input: a fox\nOutput: {FOX}\n\nInput: a dog", FOX),
    (f"{FOX}\nUser: thanks", FOX),
    (f"{FOX}<|im_end|>\n<|im_start|>user", FOX),
    (f"{FOX}</s>", FOX),
    (f"<think>\nThey want a fox. Fine.\n</think>\n\n{FOX}", FOX),
    (f"{FOX}\n\nLet me know if you want another one!", FOX),
])
def test_cleaned(answer: str, caption: str) -> None:
    assert clean_caption(answer) == caption


@pytest.mark.parametrize("caption", [
    "a red fox on a log",
    "Here is a small shop. Its sign reads: 'open'.",
    "Here is a red door whose caption reads: 'open'.",
    "Here is a long red table: its legs are black.",
    f"Here is {'a big red table and ' * 6}a caption: open.",
    "A fox sits on a log. Beside it is an Ox.",
    "Certainly the largest fox sits on a log.",
    "\"Open\" is on the left door and on the right one is \"closed\"",
    "'Open' on the left door and on the right 'closed'",
    "The sign says \"Open\".",
    "A fox sits on a log. The sign says \"Open.\"",
    "Is it a fox? It is!",
    "A snake_case_name is on the mug, and a 5 - 3 on the board.",
    "The input: a keyboard. It is grey.",
    "The user sits at a desk. A caption: none.",
    "He lives on St. John's Street with Mrs. Smith",
    "The log's bark, the pines' needles.",
    "\u4e00\u53ea\u72d0\u72f8\u3002",
])
def test_a_caption_that_is_clean_stays(caption: str) -> None:
    assert clean_caption(caption) == caption


@pytest.mark.parametrize("answer", ["", " \n", "\"\"", "**", "Output:", "Sure, here is the long caption:",
                                    "Input: a dog", "<think> They want", "```\n```"])
def test_nothing_is_left_of_an_answer_that_says_nothing(answer: str) -> None:
    assert clean_caption(answer) == ""


PIECES = st.sampled_from(["Sure, ", "Here is the caption: ", "Output: ", "Input: ", "\n", "\n\n", " ", ". ", "! ", '"',
                          "'", "\u201c", "\u201d", "**", "_", "`", "- ", "1. ", "# ", "a fox", "Mr. ", "St.", "</s>",
                          "<think>", "</think>", "the long version:", "caption", ":", "```text\n", "(", ")", "\u2028"])


@given(st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3)), max_size=12).map("".join)))
def test_cleaning_is_idempotent_and_gives_one_line(text: str) -> None:
    caption = clean_caption(text)
    assert clean_caption(caption) == caption
    assert caption == " ".join(caption.split())


@pytest.mark.parametrize("piece", ["\n", "a ", '"', "_", "*a", "here is the long ", "a.", "- ", "St. ", "<think>"])
def test_cleaning_a_strange_answer_takes_no_time(piece: str) -> None:
    start = time.process_time()
    clean_caption(piece * 1000)
    assert time.process_time() - start < 3
