"""The picture of the playground in the documentation.

python tests/playground_picture.py MODEL IMAGE docs/images/playground.png
"""

import sys

from PIL import Image

from browser import Browser, served


def main(model: str, image: str, out: str) -> None:
    """Drop the image into the page, choose a method, and take a picture of what is shown."""
    line = "document.querySelector('textarea').value"
    with served(model) as address, Browser(1400, 840) as page:
        page.call("Page.navigate", url=address)
        page.wait(f"document.querySelector('textarea') && {line} != ''")
        page.choose_file(image)
        page.wait(timed := "/\\d\\sms/.test(document.body.innerText)")
        page.choose("schedule", "KeepRate")
        page.wait(f"{line}.includes('KeepRate')")
        page.choose("reducer", "ToMe()")
        page.wait(f"{line}.startsWith('ToMe()')")
        page.wait(timed)
        page.evaluate("window.scrollTo(0, 0)")
        page.picture(out)
    with Image.open(out) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
