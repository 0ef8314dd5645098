"""Draw the sprite sheet from the Noto Color Emoji font (only needed to remake `sprites.webp`).

python data/emoji-world/render_sprites.py /path/to/NotoColorEmoji.ttf
"""

import sys

from PIL import Image, ImageDraw, ImageFont
from world import HERE, NAMES, OBJECTS, SHEET_COLUMNS, SPRITE


def main(font_file: str) -> None:
    font = ImageFont.truetype(font_file, 109)  # the one size at which the font holds bitmaps
    rows = -(-len(NAMES) // SHEET_COLUMNS)
    sheet = Image.new("RGBA", (SHEET_COLUMNS * SPRITE, rows * SPRITE))
    for i, name in enumerate(NAMES):
        glyph = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(glyph).text((8, 8), chr(OBJECTS[name][0]), font=font, embedded_color=True)
        if glyph.getbbox() is None:
            raise ValueError(f"the font {font_file} has no glyph for {name!r} (U+{OBJECTS[name][0]:X})")
        glyph = glyph.crop(glyph.getbbox())
        glyph.thumbnail((SPRITE, SPRITE), Image.Resampling.LANCZOS)
        corner = (
            i % SHEET_COLUMNS * SPRITE + (SPRITE - glyph.width) // 2,
            i // SHEET_COLUMNS * SPRITE + (SPRITE - glyph.height) // 2,
        )
        sheet.paste(glyph, corner)
    sheet.save(HERE / "sprites.webp", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main(sys.argv[1])
