"""
Writes tests/fixtures/captions_pycocoevalcap.json: captions with awkward text, and what pycocoevalcap makes of them.

    pip install pycocoevalcap==1.2 && python tests/helpers/make_caption_fixture.py

It needs Java; the suite needs neither.
"""

import contextlib
import io
import json
import os
import random
import re
from pathlib import Path


PATH = Path(__file__).parents[1] / "fixtures" / "captions_pycocoevalcap.json"
NOUNS = """
    man woman dog cat bus child girl bear giraffe umbrella t-shirt café piñata jalapeño crème brûlée fiancée
    smörgåsbord
    hot-dog fire hydrant stop-sign o'clock
"""
AWKWARD = """
    don't doesn't isn't can't won't it's he's she'll they're we've I'm I'd y'all ma'am cannot gonna wanna
    gotta lemme gimme
    'tis 'twas ain't shouldn't've who's let's DON'T Isn't isn’t don’t it’s he’s they’re I’m can’t y’all
    dog's dogs' James' James's children's boss’s girls’ men's cat's-eye t-shirt's
    don`t o`clock d`angelo rock`n`roll ma`am it`s a`b `a` Ta'u xi’an l`eau \0 dog\x07 two\x1bcats \x01a 5\x7f5
    "quoted" 'quoted' ``quoted'' “curly” ‘curly’ "half “mixed” «guillemets» „low“ "a" 'n' rock'n'roll
    rock-n-roll
    1 2 10 1,000 10,000.50 3.5 .5 50% 1/2 3/4 1st 2nd 21st 3:45 10:30am 7pm 5'10" 6ft 5ft. $5 $5.00 €20 £3
    US$5 #1 No.1
    1990s 1990's '90s 555-1234 747 4x4 2x 3D 24/7 9/11 1080p F-16 mp3 2-3 ½ 1½ 20°C 5×7 10:00 -5 +3
    black-and-white well-known mother-in-law's two-story 10-year-old - -- --- – — up-to-date old-fashioned,
    half- -eaten
    Mr. Mrs. Dr. St. U.S. U.S.A. U.K. a.m. p.m. e.g. i.e. etc. vs. Jr. Inc. Ph.D. Mt. Ave. D.C. approx.
    Sept. Co.
    ... .. .... … ?! !! ??? ; : , ! ? .) !) ." ?" ," .' STOP "STOP" Stop! stop. (stop) stop; 'stop' "stop."
    (brackets) [square] {curly} <tag> <b>bold</b> (a (s) word(s) 1) [sic]
    😀 🍕 👍🏽 👨‍👩‍👧 🇺🇸 ❤️ ☺ ★ ♥ → • ™ ® © 🔥🔥 ✈️ :) :-) ;) :( :D <3 ^_^ o_o
    http://www.example.com/a?b=c www.foo.com foo.com foo.com/bar me@foo.com @user #hashtag #tag1 C++ C#
    node.js photo.jpg
    a&b AT&T & R&B &amp; M&M's salt&pepper black/white and/or w/ w/o his/her c/o / \\ | ~ ^ * ** _
    snake_case + = @ # % $
    東京 привет 日本語 שלום مرحبا हिन्दी ไทย 한국어 Ελλάδα İstanbul straße œuvre 你好, 「引用」 。 ¿qué? ¡hola! naïve
    Zürich
"""
TEMPLATES = (
    "a {noun} with a {word} .",
    "A {noun} {word} on the {word}.",
    "{word} {noun} {word}",
    "The {noun} is {word}, {word} and {word}.",
    "{word}",
    "{word} {word}",
    "a {noun} {word}",
    '"{word}" {noun}',
    "{word}, {word}; {word}: {word}.",
    "{noun} ({word}) {word}",
    "A {noun} says {word}!",
    "a {noun}'s {noun} {word}",
    "two {noun}s and 1 1/2 {word}",
    "{noun} {word} {noun} {word} {noun}.",
    "there's a {noun} near a {noun},\n{word}.",
    "  a {noun}   in front of a {noun}\t",
    "A {noun}, a {noun} and a {word}",
)
# The reference takes the next caption for the rest of the sentence: a last "b." or "no." depends on it.
LEANS_ON_THE_NEXT = re.compile(r"(?:^|\W)(?:[A-Za-z]|no|art|ca|fig|figs|nos|op|pp|prop)\.\W*$", re.IGNORECASE)


def caption(generator: random.Random) -> str:
    """One caption; an empty one at times."""
    if generator.random() < 0.03:
        return generator.choice(["", " ", ".", "!!", "-"])
    text = generator.choice(TEMPLATES)
    for slot, words in (("{noun}", NOUNS.split()), ("{word}", AWKWARD.split())):
        while slot in text:
            text = text.replace(slot, generator.choice(words), 1)
    return caption(generator) if LEANS_ON_THE_NEXT.search(text) else text


def changed(text: str, generator: random.Random) -> str:
    """A caption like this one: some words out, one other in."""
    words = [word for word in text.split(" ") if generator.random() < 0.85]
    words.insert(generator.randint(0, len(words)), generator.choice((AWKWARD + NOUNS).split()))
    text = " ".join(words)
    return caption(generator) if LEANS_ON_THE_NEXT.search(text) else text


def make_captions(number: int, seed: int) -> list[dict]:
    """Predictions with one to five references each."""
    generator = random.Random(seed)
    captions = []
    for _ in range(number):
        references = [caption(generator)]
        for _ in range(generator.randint(0, 4)):
            make = generator.choice([changed, lambda _, generator: caption(generator)])
            references.append(make(references[0], generator))
        kind = generator.random()
        prediction = references[0] if kind < 0.1 else changed(references[0], generator)
        captions.append({"prediction": "" if kind > 0.97 else prediction, "references": references})
    return captions


def add_scores(captions: list[dict]) -> dict:
    """What pycocoevalcap makes of the captions: tokens, scores of each, scores of all."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def tokenize(texts: dict[int, list[str]]) -> dict[int, list[str]]:
        return PTBTokenizer().tokenize({key: [{"caption": text} for text in own] for key, own in texts.items()})

    predictions = tokenize({index: [item["prediction"]] for index, item in enumerate(captions)})
    references = tokenize({index: item["references"] for index, item in enumerate(captions)})
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, bleu_each = Bleu(4).compute_score(references, predictions)
        rouge, rouge_each = Rouge().compute_score(references, predictions)
        cider, cider_each = Cider().compute_score(references, predictions)
    for index, item in enumerate(captions):
        item["prediction_tokens"], item["references_tokens"] = predictions[index][0], references[index]
        each = {f"BLEU-{size}": bleu_each[size - 1][index] for size in range(1, 5)}
        each |= {"ROUGE-L": rouge_each[index], "CIDEr-D": cider_each[index]}
        item["scores"] = {name: float(score) for name, score in each.items()}
    scores = {f"BLEU-{size}": bleu[size - 1] for size in range(1, 5)} | {"ROUGE-L": rouge, "CIDEr-D": cider}
    return {"scores": {name: float(score) for name, score in scores.items()}, "captions": captions}


def main() -> None:
    fixture = add_scores(make_captions(number=240, seed=0))
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in fixture["captions"])
    new = PATH.with_suffix(".new")
    new.write_text(f'{{"scores": {json.dumps(fixture["scores"])},\n"captions": [\n{lines}\n]}}\n', encoding="utf-8")
    os.replace(new, PATH)


if __name__ == "__main__":
    main()
