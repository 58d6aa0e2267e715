"""Looks at image files in a process of its own; run as a script by `headers`. No numpy, no torch.

stdin: pickled (decode, paths), one after the other; stdout: for each a pickled list of `look`.
It ends with its stdin, so no worker outlives the process that started it, however that one ends.
"""

import os
import pickle
import signal
import stat
import sys
import warnings

from PIL import Image, UnidentifiedImageError

# What DALI decodes as well. Without this list PIL would run Ghostscript on an EPS file named .jpg.
FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF")


def look(path: bytes, decode: bool) -> tuple[int, int, int, str]:
    """(width, height, bytes, what is wrong or "") of a file.

    The size is that of the pixels as stored: a rotation asked for by EXIF is not applied.
    """
    try:
        status = os.stat(path)  # noqa: PTH116  (pathlib has no paths of bytes)
        if not stat.S_ISREG(status.st_mode):
            return 0, 0, 0, "not a regular file"
        if status.st_size == 0:
            return 0, 0, 0, "empty"
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:  # noqa: PTH123
            width, height = image.size
            if decode:
                image.load()
    except UnidentifiedImageError:
        return 0, 0, 0, "no readable image header"
    except FileNotFoundError:
        return 0, 0, 0, "dangling link" if os.path.islink(path) else "no such file"  # noqa: PTH114
    except Exception as error:  # the decoders raise whatever the bytes lead them to
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return 0, 0, 0, reason or type(error).__name__
    return width, height, status.st_size, ""


def serve() -> None:
    """Answer until stdin ends."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # a huge image is an image
    while True:
        try:
            decode, paths = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump([look(path, decode) for path in paths], sys.stdout.buffer)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    serve()
