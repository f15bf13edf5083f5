"""
The tokens of COCO's caption evaluation: those of the Penn Treebank, in lower case, without punctuation.

The reference is Stanford's PTBTokenizer 3.4.1 with `-preserveLines -lowerCase`, which pycocoevalcap runs in Java. The
rules below were written from its behaviour; docs/metrics.md lists the differences.
"""

import re


# Beyond ASCII, letters and digits are what Python says; these go with letters or stand alone; the rest is skipped.
_MARKS = (
    r"\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02eb\u02ed\u02ef-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4"
    r"\u05c5\u05c7\u0615-\u061a\u064b-\u065e\u0670\u06d6-\u06e4\u0711\u0730-\u074c\u07a6-\u07b0\u07eb-\u07f3"
    r"\u0900-\u0903\u093c\u093e-\u094e\u0951-\u0955\u0962\u0963\u0981-\u0983\u09bc\u09be-\u09c4\u09c7\u09c8\u09cb-\u09cd"
    r"\u09d7\u09e2\u09e3\u0a01-\u0a03\u0a3c\u0a3e-\u0a4f\u0a81-\u0a83\u0abc\u0abe-\u0acf\u0b82\u0bbe-\u0bc2\u0bc6-\u0bc8"
    r"\u0bca-\u0bcd\u0c01-\u0c03\u0c3e-\u0c56\u0d3e-\u0d44\u0d46-\u0d48\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1"
    r"\u0eb4-\u0ebc\u0ec8-\u0ecd"
)
_SYMBOLS = (
    r"\xa1\xa5-\xa9\xac\xae-\xb4\xb6-\xb9\xbf\xd7\xf7\u037e\u0387\u0589\u05be\u05c0\u05c3\u05c6\u05f3\u05f4"
    r"\u0606-\u060c\u0614\u061b\u061e\u061f\u066a\u066d\u06d4\u0700-\u070d\u07f6-\u07f8\u0964\u0965\u0e3f\u0e4f\u1fbd"
    r"\u2016\u2017\u201a\u201e-\u2023\u2030-\u2038\u203b\u203e-\u2042\u2044\u2070\u2074-\u207e\u2080-\u208e\u20a4\u2100"
    r"\u2101\u2103-\u2106\u2108\u2109\u2114\u2116-\u2118\u211e-\u2123\u2125\u2127\u2129\u212e\u213a\u213b\u2140-\u2144"
    r"\u214a-\u214d\u214f\u2155-\u215e\u2190-\u2bff\u3001\u3002\u3012\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40"
    r"\uff5b-\uff65\uffe0\uffe1\uffe5\uffe6"
)
_CURLY = {"\u2018": "`", "\u2019": "'", "\u201b": "`", "\u2039": "`", "\u203a": "'"}
_CURLY |= {"\u201c": "``", "\u201d": "''", "\xab": "``", "\xbb": "''"}
_REWRITTEN = {
    "\xa2": "cents",
    "\xa3": "#",
    "\xa4": "$",
    "\u20a0": "$",
    "\u20ac": "$",
    "\xbc": "1/4",
    "\xbd": "1/2",
    "\xbe": "3/4",
    "\u2153": "1/3",
    "\u2154": "2/3",
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
}
_HYPHENS = r"\u058a\u2010\u2011"  # between letters only
_CURLY_QUOTES, _DASHES = "".join(_CURLY), r"\u2013-\u2015"
_SKIPPED = re.compile(
    rf"[^\w\t\n\x20-\x7e{_MARKS}{_SYMBOLS}{_HYPHENS}{_CURLY_QUOTES}{_DASHES}\u2026\xa2-\xa4\u20a0\u20ac]"
    rf"|(?<!\w)[{_HYPHENS}]|[{_HYPHENS}](?!\w)|[\U00010000-\U0010ffff]"
)
_SKIP = "\0"  # stands for what is skipped: a token of its own, but for inside an address
# Spaces that do not join a number and its fraction, line breaks among them; signs of Windows-1252
_SPACES = dict.fromkeys(
    "\r\v\f\x85\u1680\u202f\u205f\u3000\u2028\u2029" + "".join(map(chr, range(0x2000, 0x200B))), "\n"
)
_READ_AS = str.maketrans(
    {**_SPACES, "\xa0": " ", "\x80": "\u20ac", "\x91": "\u2018", "\x92": "\u2019", "\x93": "\u201c", "\x94": "\u201d"}
)
_ENTITIES = {"amp": "&", "lt": " < ", "gt": " > ", "quot": '"', "apos": "'", "nbsp": " ", "mdash": "--"}
_ENTITY = re.compile("&(amp|lt|gt|quot|apos|nbsp|mdash);", re.IGNORECASE)

# Cut off with their full stop.
_ABBREVIATIONS = (
    r"adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|attys?|aug|ave|bancorp|bhd|bldg|blvd|"
    r"brig|bros|calif|capt|cf|cie|cmdr|co|col|colo|comdr|conn|corp|cos|cpl|ct|dak|dec|dept|det|"
    r"drs?|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|gen|govs?|hon|inc|ind|insp|intl|invt|"
    r"jan|jos|jr|jul|jun|kans?|ky|lieut|lt|ltd|maj|mar|md|messrs|mfg|mich|minn|mlle|mme|mo|"
    r"mon|mont|mrs?|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph\.d|ph|plc|p?ptes?|"
    r"p?ptys?|pres|profs?|pvt|rd|reps?|rev|rt|sens?|sept?|seq|sfc|sgt|spc|sq|sr|ste?|supt|sys|"
    r"tel|tenn|thu|thurs|treas|tues?|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
_ABBREVIATIONS_IN_CAPITALS = r"ark|az|del|ill|la|mass|miss|ore|pa|tex|wash"
_ABBREVIATIONS_BEFORE_DIGITS = r"art|ca|figs?|nos?|op|pp|prop"
# "plan B. The man" ends a sentence where "J. Smith" does not.
_SENTENCE_STARTS = (
    r"a|about|according|after|an|as|at|but|earlier|he|her|here|however|if|in|it|last|many|more|"
    r"now|once|one|other|our|she|since|so|some|such|that|the|their|then|there|these|they|this|"
    r"we|what|when|while|yet|you|mr\.|ms\."
)
_APOSTROPHE_WORDS = r"c'est|cap'n|d'y[ae]|d'you|d'yer|dunkin'|ol'|somethin'"
_ASCII_APOSTROPHE_WORDS = "c'mon|e'er|ev'ry|li'l|nat'l|nor'easter|s'mores"
_FILE_NAMES = (
    r"bat|bmp|c|class|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|"
    r"ppt|ps|py|rtf|sql|tar|txt|wav|xml|zip"
)
_IN_TWO = {"cannot": 3, "gimme": 3, "gonna": 3, "gotta": 3, "lemme": 3, "wanna": 3}


def _capitalised(words: str) -> str:
    return "|".join(f"{word[0].upper()}(?i:{word[1:]})" for word in words.split("|"))


_NUMERALS = r"\xb2\xb3\xb9\xbc-\xbe\u2070-\u208e\u2150-\u215e\u2460-\u2bff"  # \w for Python, no letters here
_LETTER = rf"[^\W\d_{_NUMERALS}]"
_ALNUM = rf"[^\W_{_NUMERALS}]"
_ALNUM_OR_MARK = rf"(?:{_ALNUM}|[{_MARKS}])"
_WORD = rf"(?:{_LETTER}|[{_MARKS}]){_ALNUM_OR_MARK}*"
_APOSTROPHE = "['\u2019]"
_ANY_APOSTROPHE = "['\u2019`\u2018\u201b]"
_NOT = f"[Nn]{_ANY_APOSTROPHE}[Tt]"
_CLITIC = r"(?:\u2019(?i:[sdm]|ll|re|ve)|'(?i:[sdm]|ll|re|ve)(?![A-Za-z]))"
_PREFIX = f"(?:[dDoOlL]{_ANY_APOSTROPHE}(?={_ALNUM}{{2}}))?"
_INITIALS = r"[A-Za-z](?:\.[A-Za-z])+\.?"
_SLASHED = "[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}"
_TAG_NAME = "[A-Za-z][A-Za-z0-9:._-]*"
_TAG = rf"""<(?:[!?][A-Za-z-][^>]{{0,999}}|/?{_TAG_NAME}(?: +{_TAG_NAME}(?: *= *(?:"[^"]*"|'[^']*'))?)* *(?:/ *)?)>"""
_PATH = r"[^\s\"<>|()]+[^\s\"<>|.!?(){},-]"
_HOST = r"(?:[^\s\"<>|.!?(){},/_@$=;:'`\[\]-]{1,63}\.){1,9}"
_HOST_WITH_HYPHENS = r"(?:[^\s\"<>|.!?(){},/@]{1,63}\.){1,9}"
_EMAIL_HOST = r"[^\s\"<>|(){}.]+"

# The longest match is the token; of equal ones, the first. A group is the token where more has to follow it. What is
# read beyond the token has an end, so that a run of tokens is not read to its own end at each of them.
_RULES = [
    # words, also those with full stops in them; what stands before n't
    rf"{_WORD}(?:[.!?]{_WORD})*",
    rf"{_ALNUM}+",
    _INITIALS,
    rf"([A-Za-z]*[A-MO-Za-mo-z]){_NOT}",
    # words with hyphens, underscores, slashes
    rf"{_PREFIX}{_ALNUM}+(?:[-_{_HYPHENS}]{_PREFIX}{_ALNUM}+)+",
    rf"{_PREFIX}[A-Za-z0-9][A-Za-z0-9.,]{{0,99}}(?:-{_PREFIX}[A-Za-z0-9]+)*"
    rf"-(?:[A-Za-z](?:\.[A-Za-z])+\.|{_PREFIX}[A-Za-z0-9]+)",
    r"(?i:canada|sino|korean|eu|japan|non)-U\.S|U\.S\.-U\.(?:K|S\.S\.R)",
    rf"{_SLASHED}(?:\\?/{_SLASHED}){{1,2}}",
    # contractions and other apostrophes
    _NOT,
    _CLITIC,
    rf"(?i:'t(?=is|was)|{_ASCII_APOSTROPHE_WORDS}|{_APOSTROPHE}(?:em|till?|cause)|{_APOSTROPHE}n{_APOSTROPHE}|\u2019n|'n(?=\s|$))",
    rf"(?:n|[A-HJ-XZ])(?!{_CLITIC}(?!{_LETTER})){_ANY_APOSTROPHE}{_LETTER}{{2,}}",
    rf"{_LETTER}+[aeiouyAEIOUY](?!{_CLITIC}(?!{_LETTER})){_ANY_APOSTROPHE}[aeiouA-Z]{_LETTER}*",
    rf"[dDoOlL](?!{_CLITIC}(?!{_ALNUM})){_ANY_APOSTROPHE}{_ALNUM}{{2,}}|[oO]{_ANY_APOSTROPHE}[oO]",
    rf"(?!.{_CLITIC})(?:[dDlLjJ]{_APOSTROPHE}|[yY]{_APOSTROPHE}(?={_LETTER}))",
    "(?i:" + _APOSTROPHE_WORDS.replace("'", _APOSTROPHE) + ")",
    rf"{_APOSTROPHE}(?:\d\d(?=\s|$)|[2-9]0s)",
    # abbreviations
    rf"(?i:(?:{_ABBREVIATIONS})\.)",
    rf"(?:{_capitalised(_ABBREVIATIONS_IN_CAPITALS)})\.",
    rf"(?i:(?:{_ABBREVIATIONS_BEFORE_DIGITS})\.)(?=\s?\d)",
    rf"[A-Za-z]\.(?!\s+(?:(?:{_capitalised(_SENTENCE_STARTS)})(?:\s|$)|{_TAG}))",
    rf"{_ALNUM_OR_MARK}(?:(?:{_ALNUM_OR_MARK}|[-_]){{0,99}}{_ALNUM_OR_MARK})?\.(?=[,;:])",
    r"[A-Z]+(?:&[A-Z]+)+|[A-Z]+\$|[CcFf]\#|[Cc]\+\+",
    # numbers, fractions, telephone numbers
    r"[-+]?(?:\d*(?:[.:,\u2044]\d+)+|\d+)",
    r"(?:\d{1,4}[- ])?\d{1,4}(?:\\?/|\u2044)\d{1,4}",
    r"(?:\(\d{2,3}\) ?|(?:\+\+?)?(?:\d{2,4}[- ])?\d{2,4}[- ])\d{3,4}[- ]?\d{3,5}",
    r"(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}",
    # the web
    _TAG,
    rf"(?i:https?://){_PATH}",
    rf"(?:(?i:www\.){_HOST_WITH_HYPHENS}[A-Za-z]{{2,4}}|(?!\d){_HOST}(?i:com|net|org|edu))(?:/{_PATH})?",
    rf"<?[A-Za-z0-9][^\s\"<>|(){{}}]{{0,99}}@(?:{_EMAIL_HOST}\.)*{_EMAIL_HOST}>?",
    rf"{_ALNUM}{{1,99}}(?:\.{_ALNUM}{{1,99}}){{0,9}}\.(?i:{_FILE_NAMES})(?![A-Za-z0-9])",
    rf"@[A-Za-z_][A-Za-z0-9_]*|\#{_LETTER}+|&\#\d+;",
    # faces
    r"[<>]?[:;=](?:[o*'-]?[()DPdp\\{@|\[\]]|-O)(?![A-Za-z0-9])",
    r"[-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\(\^-\^\)",
    # punctuation, and whatever else there is
    rf"\*+|\#+|@+|_+|[!?]+|-{{2,}}|\.{{3,}}|\. \. \.|[`{_CURLY_QUOTES}]{{2}}|''|<<|>>|\S",
]
_PATTERNS = [re.compile(rule) for rule in _RULES]
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?=\s|$|,\s)")  # which no rule would make longer
_DROPPED = re.compile(rf"[\"'`.?!,:;\-\u2026{_CURLY_QUOTES}{_DASHES}]|''|``|-{{2,4}}|\.{{3,}}|\.\s\.\s\.")
_FOLLOWED_BY_CLITIC = re.compile(rf"{_APOSTROPHE}(?i:[sdm]|ll|re|ve)")


def ptb_tokenize(caption: str) -> list[str]:
    r"""
    Return the words of a caption as pycocoevalcap's `PTBTokenizer` gives them, without Java.

    Args:
        caption (`str`):
            The caption. Line breaks count as spaces.

    Returns:
        `list[str]`: the words, in lower case; none for an empty caption. A mixed number (`1 1/2`), a telephone number
        and an HTML tag are one token each, with no-break spaces inside.

    Example:

    ```python
    >>> ptb_tokenize("The dog's owner doesn't wear a T-shirt, it's $5.")
    ['the', 'dog', "'s", 'owner', 'does', "n't", 'wear', 'a', 't-shirt', 'it', "'s", '$', '5']
    ```"""
    written = _prepared(caption)
    text = _SKIPPED.sub(_SKIP, written)
    tokens: list[str] = []
    position = 0
    while position < len(text):
        if text[position].isspace() or text[position] == _SKIP:
            position += 1
            continue
        start, position = position, _token_end(text, position)
        token = written[start:position]
        middle = _IN_TWO.get(token.lower(), 0)
        if middle and not _FOLLOWED_BY_CLITIC.match(text, position):
            tokens += [token[:middle].lower(), token[middle:].lower()]
        else:
            tokens.append(_written(token))
    return [token for token in tokens if not _DROPPED.fullmatch(token)]


def _prepared(caption: str) -> str:
    text = caption.replace("\xad", "")
    if "&" in text:
        text = _ENTITY.sub(lambda entity: _ENTITIES[entity[1].lower()], text)
    return text.translate(_READ_AS)


def _token_end(text: str, start: int) -> int:
    plain = _PLAIN_WORD.match(text, start)
    if plain:
        return plain.end()
    matches = [match for pattern in _PATTERNS if (match := pattern.match(text, start))]
    longest = max(matches, key=lambda match: match.end())
    return longest.end(longest.lastindex or 0)


def _written(token: str) -> str:
    if len(token) == 1:
        return _REWRITTEN.get(token, token.lower())
    if _CURLY.keys() | {"`"} >= {*token}:
        return "".join(_CURLY.get(quote, quote) for quote in token)
    if re.fullmatch(f"{_NOT}|{_CLITIC}", token):
        token = token.replace("\u2019", "'").replace("\u2018", "`").replace("\u201b", "`")
    return token.replace(" ", "\xa0").replace("(", "-LRB-").replace(")", "-RRB-").lower()
