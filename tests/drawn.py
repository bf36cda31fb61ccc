"""What is drawn on Pillow pictures: recorded, then tested for text that is cut off or overprinted."""

from itertools import combinations

from PIL import Image, ImageDraw


def record(monkeypatch) -> list[tuple]:
    """From now on, `(picture, kind, content, box)` of every text, rectangle and pasted picture; boxes in pixels."""
    drawn = []
    text, rectangle, paste = ImageDraw.ImageDraw.text, ImageDraw.ImageDraw.rectangle, Image.Image.paste

    def record_text(self, xy, content, fill=None, font=None, anchor=None, **kwargs):
        drawn.append((self._image, "text", content, self.textbbox(xy, content, font, anchor)))
        text(self, xy, content, fill, font, anchor, **kwargs)

    def record_rectangle(self, xy, fill=None, *args, **kwargs):
        drawn.append((self._image, "rectangle", fill, tuple(xy)))
        rectangle(self, xy, fill, *args, **kwargs)

    def record_paste(self, image, box=None, mask=None):
        if isinstance(image, Image.Image):
            drawn.append((self, "picture", image, (*box[:2], box[0] + image.width, box[1] + image.height)))
        paste(self, image, box, mask)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record_text)
    monkeypatch.setattr(ImageDraw.ImageDraw, "rectangle", record_rectangle)
    monkeypatch.setattr(Image.Image, "paste", record_paste)
    return drawn


def texts(drawn: list[tuple]) -> list[str]:
    return [content for _, kind, content, _ in drawn if kind == "text"]


def check_text(drawn: list[tuple]):
    """All text lies inside its picture, and on no other text, rectangle or pasted picture."""
    for picture in {id(picture): picture for picture, kind, _, _ in drawn if kind == "text"}.values():
        here = [(kind, content, box) for each, kind, content, box in drawn if each is picture]
        check_boxes({f"{kind} {i}: {content}": box for i, (kind, content, box) in enumerate(here)}, picture.size)


def check_boxes(boxes: dict[str, tuple], size: tuple[float, float]):
    """Boxes (left, top, right, bottom) are inside a sheet of `size`; those whose name starts with "text" overlap none."""
    for name, (left, top, right, bottom) in boxes.items():
        assert left >= 0 and top >= 0 and right <= size[0] and bottom <= size[1], f"{name} sticks out of {size}"
    for (name, one), (other, two) in combinations(boxes.items(), 2):
        if name.startswith("text") or other.startswith("text"):
            apart = one[2] <= two[0] or two[2] <= one[0] or one[3] <= two[1] or two[3] <= one[1]
            assert apart, f"{name} and {other} overlap"
