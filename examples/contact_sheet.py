"""Draw pictures and their captions as one sheet."""

from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont


SCALE = 2  # of all lengths below, so that the sheet is sharp on today's screens
MARGIN, GAP, PICTURE, PADDING, TEXT = 36, 14, 112, 14, 66
GROUND, CARD, EDGE = "#f4f1ea", "#ffffff", "#e4dfd3"
INK, PALE, RIGHT, WRONG = "#2b2a27", "#8a857a", "#2e9e6b", "#cf5b4a"


class Card(NamedTuple):
    """A picture, its generated caption, and the truth."""

    image: Image.Image
    caption: str
    truth: str

    @property
    def right(self):
        return self.caption == self.truth


class Section(NamedTuple):
    """Cards under a heading."""

    heading: str
    note: str
    cards: list[Card]


def draw_contact_sheet(title, subtitle, sections, columns=8):
    """
    Draw sections of cards under a title.

    Args:
        title, subtitle (`str`):
            The lines at the top.
        sections (`list[Section]`):
            What to draw, from the top down.
        columns (`int`, *optional*, defaults to 8):
            Number of cards in a row.

    Returns:
        `PIL.Image.Image`: the sheet.
    """
    card_width, card_height = PICTURE + 2 * PADDING, PICTURE + 2 * PADDING + TEXT
    width = 2 * MARGIN + columns * card_width + (columns - 1) * GAP
    rows = [-(-len(section.cards) // columns) for section in sections]
    height = 2 * MARGIN + 64 + sum(66 + n * (card_height + GAP) for n in rows)
    pen = Pen(Image.new("RGB", (width * SCALE, height * SCALE), GROUND))
    pen.text(MARGIN, MARGIN, title, size=30)
    pen.text(MARGIN, MARGIN + 40, subtitle, size=14, color=PALE)
    top = MARGIN + 64
    for section, n in zip(sections, rows, strict=True):
        pen.text(MARGIN, top + 16, section.heading, size=18)
        pen.text(MARGIN, top + 40, section.note, size=12, color=PALE)
        top += 66
        for i, card in enumerate(section.cards):
            x = MARGIN + i % columns * (card_width + GAP)
            draw_card(pen, x, top + i // columns * (card_height + GAP), card_width, card_height, card)
        top += n * (card_height + GAP)
    return pen.image


def draw_card(pen, x, y, width, height, card):
    """Draw a picture with its caption, a mark, and, if the caption is wrong, the truth in small letters."""
    pen.panel(x, y, width, height)
    pen.picture(x + PADDING, y + PADDING, PICTURE, card.image)
    middle, top = x + width / 2, y + PADDING + PICTURE + 12
    color = RIGHT if card.right else WRONG
    lines = pen.wrap(card.caption or "(nothing)", 13, width - 2 * PADDING, most=2)
    for i, line in enumerate(lines):
        pen.text(middle, top + i * 16, line, size=13, color=color, center=True)
    if not card.right:
        truth = pen.wrap(card.truth, 11, width - 2 * PADDING, most=2)
        for i, line in enumerate(truth):
            pen.text(middle, top + len(lines) * 16 + 2 + i * 13, line, size=11, color=PALE, center=True)
    pen.mark(x + width - 13, y + 13, card.right, color)


class Pen:
    """Draws on an image. Lengths are in points of [`SCALE`] pixels."""

    def __init__(self, image):
        self.image = image
        self.draw = ImageDraw.Draw(image)
        self.fonts = {}

    def font(self, size):
        return self.fonts.setdefault(size, ImageFont.load_default(size * SCALE))

    def text(self, x, y, text, size, color=INK, center=False):
        self.draw.text((x * SCALE, y * SCALE), text, color, self.font(size), anchor="ma" if center else "la")

    def wrap(self, text, size, width, most):
        """Break a text into at most `most` lines of at most `width`. A text that is cut ends in an ellipsis."""
        font, lines = self.font(size), [""]
        for word in text.split():
            longer = f"{lines[-1]} {word}".strip()
            if font.getlength(longer) <= width * SCALE or not lines[-1]:
                lines[-1] = longer
            else:
                lines.append(word)
        if len(lines) > most:
            lines = lines[:most]
            lines[-1] += " …"
        return [self.cut(line, font, width) for line in lines]

    def cut(self, line, font, width):
        while font.getlength(line) > width * SCALE:
            line = line.rstrip(" …")[:-1] + " …"
        return line

    def panel(self, x, y, width, height):
        box = [v * SCALE for v in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(box, radius=12 * SCALE, fill=CARD, outline=EDGE, width=SCALE)

    def picture(self, x, y, size, image):
        image = image.convert("RGB").resize((size * SCALE, size * SCALE), Image.Resampling.LANCZOS)
        self.image.paste(image, (x * SCALE, y * SCALE))

    def mark(self, x, y, right, color):
        """Draw a tick or a cross, because the font has neither."""
        strokes = [[(-4, 0), (-1, 3), (4, -3)]] if right else [[(-3, -3), (3, 3)], [(-3, 3), (3, -3)]]
        for stroke in strokes:
            points = [((x + dx) * SCALE, (y + dy) * SCALE) for dx, dy in stroke]
            self.draw.line(points, fill=color, width=2 * SCALE, joint="curve")
